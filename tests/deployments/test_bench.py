import json
from dataclasses import replace

import pytest

from deployments.bench import generate_on, offline
from deployments.bench_cases import Cases, Timed, Workload, WrongAnswer
from deployments.bench_tokens import Reading, greedy, read_again, verdicts
from deployments.cli import main
from deployments.llm import LLM, Answer
from deployments.presets import PRESETS, write_preset
from workers.architectures import plan_of
from workers.config import EngineConfig
from workers.models import read_model_config

SMALL = Workload(
    alone_prompt=4,
    alone_output=3,
    batches=(2,),
    batch_prompt=5,
    batch_output=3,
    num_mixed=3,
    mixed_lengths=(2, 6),
    max_id=50,
)


def test_every_case_is_one_json_line():
    lines = []
    everyday = replace(SMALL, max_id=10_000)  # the bundled model has fewer ids, and fewer positions
    code = offline({"device": "cpu"}, workload=everyday, show=lines.append)
    cases = [json.loads(line) for line in lines]
    assert code == 0
    assert [case["case"] for case in cases] == [
        "startup_s",
        "bs1_tpot_ms",
        "bs2_5_tpot_ms",
        "offline3_out_tok_s",
        *["tokens_ok"] * 3,
    ]
    assert all(case["engine"] == "lockstep" for case in cases)
    # The two in between are differences of short times here: on a busy machine they may be 0.
    assert cases[0]["value"] > 0
    assert cases[3]["value"] > 0
    for case, check in zip(cases[1:4], cases[4:], strict=True):
        assert (check["of"], check["value"], check["wrong"]) == (case["case"], True, 0)
        assert 0 < check["noise"] < 1e-3  # float32, read in other shapes
        assert check["largest_gap"] <= 2 * check["noise"]
    assert [check["tokens"] for check in cases[4:6]] == [4, 8]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_models_we_know(name, tmp_path):
    folder = write_preset(name, tmp_path)
    found = read_model_config(folder)
    sizes = {"v2-lite": 102400, "v32-mini": 129280}
    assert found.vocab_size == sizes.get(name, 151936)
    assert plan_of(EngineConfig(model=str(folder))).row_multiple == 1


def test_an_answer_of_the_wrong_length_is_no_result():
    def one_token_too_few(prompts, lengths):
        return [Answer([], ids=[0] * (length - 1)) for length in lengths]

    with pytest.raises(WrongAnswer, match="were asked"):
        next(Cases(one_token_too_few, SMALL).run())


class OneTokenWrong:
    """The engine beneath, but one token of the first long answer is another than it was."""

    def __init__(self, llm):
        self._llm, self.max_model_len, self.num_planted = llm, llm.max_model_len, 0

    def generate(self, prompts, params, *, detokenize):
        answers = self._llm.generate(prompts, params, detokenize=detokenize)
        long = [answer for answer in answers if len(answer.ids) == SMALL.batch_output + 1]
        if len(answers) > 1 and long and not self.num_planted:
            long[-1].ids[1] = (long[-1].ids[1] + 1) % 50
            self.num_planted += 1
        return answers


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", max_num_seqs=8, enable_prefix_caching=False, max_model_len=80) as llm:
        yield llm


def test_one_wrong_token_in_a_timed_run_is_found(llm):
    wrong = OneTokenWrong(llm)
    bench = Cases(generate_on(wrong), SMALL)
    names = [case["case"] for case in bench.run()]
    checks = verdicts([read_again(wrong, timed) for timed in bench.timed])
    assert wrong.num_planted == 1
    assert [check["of"] for check in checks] == names
    assert [check["value"] for check in checks] == [True, False, True]
    assert checks[1]["wrong"] >= 1
    assert checks[1]["largest_gap"] > 2 * checks[1]["noise"]


def test_an_answer_that_fills_the_model_is_read_without_its_last_token(llm):
    prompt, length = [7] * 60, 20
    answers = llm.generate([prompt], greedy(length), detokenize=False)
    [check] = verdicts([read_again(llm, Timed("all", [prompt], answers))])
    assert (check["value"], check["tokens"]) == (True, length - 1)


def reading(gaps, apart):
    return Reading("a", gaps, apart)


@pytest.mark.parametrize(
    ("gaps", "apart", "is_ok"),
    [
        ([0.0, 0.019], [0.01, 0.001], True),
        ([0.0, 0.021], [0.01, 0.001], False),  # wider than twice the noise
        ([0.0, 0.0], [0.11, 0.11], False),  # the same tokens, but far too noisy
        ([0.0, 0.7], [0.6] + [0.001] * 50, False),  # a broken place does not excuse itself
        ([], [], False),  # nothing was checked
    ],
)
def test_tokens_may_change_places_within_twice_the_noise_only(gaps, apart, is_ok):
    assert [check["value"] for check in verdicts([reading(gaps, apart)])] == [is_ok]


def test_the_noise_is_that_of_all_cases():
    checks = verdicts([reading([0.0], [0.01]), reading([0.015], [])])
    assert [check["value"] for check in checks] == [True, True]


def test_cases_can_be_chosen_and_their_check_left_out():
    lines = []
    cases, quick = ["bs2_5_tpot_ms"], {"device": "cpu", "max_num_seqs": 4}
    assert offline(quick, workload=SMALL, cases=cases, check_tokens=False, show=lines.append) == 0
    assert [json.loads(line)["case"] for line in lines] == ["startup_s", *cases]


def test_a_case_that_does_not_exist_is_told_before_anything_starts(capsys):
    assert main(["bench", "offline", "--cases", "bs33_1k_tpot_ms"]) == 2
    assert "bs32_1k_tpot_ms, bs128_1k_tpot_ms" in capsys.readouterr().err


def test_a_misspelt_setting_is_told_before_anything_starts(capsys):
    assert main(["bench", "offline", "--tp-sise", "2"]) == 2
    assert "--tp-size" in capsys.readouterr().err
