"""The parts of tests/bench/bench_http.py and bench_fleets.py that can be wrong without a sound."""

import json
import math
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.llm import LLM
from deployments.tokenizer import ChatTokenizer
from tests.bench import bench_fleets
from tests.bench.engine_client import EngineClient
from tests.bench.limits import time_limit
from tests.bench.process_cpu import cpu_seconds
from tests.bench.results import ratio_interval
from tests.bench.stand_in import write_preset

RATIOS = st.lists(st.floats(0.5, 2.0), min_size=2, max_size=30)


@settings(max_examples=60)
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
            gaps = client.gaps([5, 6, 7], 4)
        finally:
            client.close()
    assert len(times) == 12
    assert len(gaps) == 3
    assert min(gaps) >= 0
    assert times == sorted(times)
    assert times[0] > 0


def test_a_limit_ends_what_takes_too_long():
    with pytest.raises(TimeoutError, match=r"not done after 0.1 s"), time_limit(0.1):
        time.sleep(5)


def test_cpu_time_is_that_of_descendants_with_the_name():
    spin = "import time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True); input()"
    command = [sys.executable, "-c", f"{spin} # worker-of-mine"]
    nested = [sys.executable, "-c", f"import subprocess; subprocess.run({command!r})"]
    with subprocess.Popen(nested, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"1\n"
        everything = cpu_seconds("worker-of-mine")
        assert everything >= 0.25
        assert cpu_seconds("worker-of-mine", ancestor=process.pid) >= 0.25
        assert cpu_seconds("worker-of-another") == 0
        process.communicate(b"\n")
    assert cpu_seconds("worker-of-mine") == 0


def test_pairs_take_turns_at_being_first():
    said = []

    def side(name, gaps):
        def measure():
            said.append(name)
            return gaps

        return measure

    local, remote = bench_fleets.paired(side("local", [1.0, 3.0]), side("ray", [2.0]), 3)
    assert said == ["local", "ray", "ray", "local", "local", "ray"]
    assert (local, remote) == ([[1.0, 3.0]] * 3, [[2.0]] * 3)


@pytest.mark.parametrize(
    ("remote", "is_inside"),
    [([1.0, 1.001, 1.002], True), ([1.0, 1.03, 0.97], False), ([1.02, 1.02, 1.021], False)],
)
def test_an_interval_is_inside_one_per_cent_or_not(remote, is_inside):
    told = bench_fleets.summary([[1e-3]] * 3, [[gap / 1e3] for gap in remote], 0)
    assert told["inside_1_percent"] == is_inside
    assert told["low"] <= told["ratio"] <= told["high"]
    assert told["local_tpot_ms"] == 1.0


def test_a_stall_moves_the_mean_and_not_the_median_gap():
    calm, stalled = [[1.0] * 20] * 3, [[1.0] * 19 + [100.0], [1.0] * 20, [1.0] * 20]
    told = bench_fleets.summary(calm, stalled, 0)
    assert told["ratio"] > 1.5
    assert (told["gap_ratio"], told["gap_low"], told["gap_high"]) == (1.0, 1.0, 1.0)
    assert told["tokens"] == 6 * 21


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ranks_under_ray_and_ranks_without_are_measured_and_no_token_is_a_ray_call(tmp_path):
    """In a process of its own: this one may have a Ray already."""
    file = tmp_path / "fleets.json"
    words = ["--pairs", "2", "--tokens", "40", "--out", str(tmp_path), "--json", str(file)]
    command = [sys.executable, "-m", "tests.bench.bench_fleets", "--device", "cpu", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(file.read_text())
    assert (told["pairs"], told["tokens"], told["ray_calls"]) == (2, 160, 0)
    assert min(told["local_tpot_ms"], told["ray_tpot_ms"]) > 0
    assert "RayFleet / LocalFleet, mean" in (tmp_path / "fleets.csv").read_text()
