import json
from dataclasses import replace

import pytest

from deployments.bench import PRESETS, Bench, Workload, WrongAnswer, offline
from deployments.cli import main
from deployments.llm import Answer
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
        "bs2_1k_tpot_ms",
        "offline3_out_tok_s",
    ]
    assert all(case["engine"] == "lockstep" for case in cases)
    # The two in between are differences of short times here: on a busy machine they may be 0.
    assert cases[0]["value"] > 0
    assert cases[3]["value"] > 0
    assert cases[2]["check"] == "equal"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_models_we_know(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[name]))
    found = read_model_config(tmp_path)
    sizes = {"v2-lite": 102400, "v32-mini": 129280}
    assert found.vocab_size == sizes.get(name, 151936)
    assert plan_of(EngineConfig(model=str(tmp_path))).row_multiple == 1


class Liar:
    """An engine that answers one token too few."""

    def generate(self, prompts, params, *, detokenize):
        return [
            Answer(list(prompt), ids=[0] * (one.max_tokens - 1))
            for prompt, one in zip(prompts, params, strict=True)
        ]


def test_an_answer_of_the_wrong_length_is_no_result():
    with pytest.raises(WrongAnswer, match="were asked"):
        next(Bench(Liar(), SMALL).cases())


def test_a_misspelt_setting_is_told_before_anything_starts(capsys):
    assert main(["bench", "offline", "--tp-sise", "2"]) == 2
    assert "--tp-size" in capsys.readouterr().err
