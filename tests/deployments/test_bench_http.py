"""The parts of tests/bench/bench_http.py that can be wrong without a sound."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.llm import LLM
from deployments.tokenizer import ChatTokenizer
from tests.bench.bench_http import time_limit
from tests.bench.engine_client import EngineClient
from tests.bench.results import ratio_interval
from tests.bench.stand_in import write_preset

pytestmark = pytest.mark.timeout(60)

RATIOS = st.lists(st.floats(0.5, 2.0), min_size=2, max_size=30)


@settings(deadline=None, max_examples=60)
@given(RATIOS)
def test_the_interval_holds_the_mean_and_turns_over_with_the_ratio(ratios):
    low, mean, high = ratio_interval(ratios)
    assert low <= mean <= high
    assert math.log(mean) == pytest.approx(sum(map(math.log, ratios)) / len(ratios), abs=1e-9)
    turned = ratio_interval([1 / ratio for ratio in ratios])
    assert turned == pytest.approx((1 / high, 1 / mean, 1 / low))


def test_a_known_interval():
    """Ten values: t is 2.262 with nine degrees of freedom."""
    logs = [0.01, -0.01] * 5
    spread = math.sqrt(sum(each**2 for each in logs) / 9)
    low, mean, high = ratio_interval([math.exp(each) for each in logs])
    assert mean == pytest.approx(1.0)
    assert math.log(high) == pytest.approx(2.262 * spread / math.sqrt(10))
    assert low * high == pytest.approx(1.0)


def test_every_id_of_a_stand_in_has_a_text(tmp_path):
    write_preset("0.6b", tmp_path)
    tokenizer = ChatTokenizer.load(tmp_path)
    texts = {tokenizer.token_bytes[number] for number in range(151936)}
    assert len(texts) == 151936
    assert b"" not in texts


def test_a_client_of_the_engine_has_a_time_for_every_token():
    with LLM(device="cpu", max_num_seqs=2) as llm:
        client = EngineClient(llm.engine.info())
        try:
            times = client.ask([5, 6, 7], 12)
            assert client.tpot([5, 6, 7], 4) >= 0
        finally:
            client.close()
    assert len(times) == 12
    assert times == sorted(times)
    assert times[0] > 0


def test_a_limit_ends_what_takes_too_long():
    with pytest.raises(TimeoutError, match=r"not done after 0.1 s"), time_limit(0.1):
        time.sleep(5)
