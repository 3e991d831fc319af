"""`lockstep plan`: a table to read, and the engine's sentence where there is no plan."""

import pytest

from deployments.cli import main
from deployments.presets import PRESETS

pytestmark = pytest.mark.row("S14")

TWO_REPLICAS = """\
Qwen3MoeForCausalLM, 1 dense and 3 sparse layers, on 2 ranks: attention 2 x 1, experts 1 x 2 x 1

layers  where           rows                 owed over  collectives (ranks of each group)
------  --------------  -------------------  ---------  -----------------------------------------
        embedding       TP_ATTN_FULL                    -
0       into attention  TP_ATTN_FULL                    -
0       attention       TP_ATTN_FULL                    -
0       into dense MLP  TP_ATTN_FULL > FULL             all_gather tp (2)
0       dense MLP       FULL                            -
1-3     into attention  FULL > TP_ATTN_FULL  tp         reduce_scatter tp (2)
1-3     attention       TP_ATTN_FULL                    -
1-3     into experts    TP_ATTN_FULL > FULL             all_gather tp (2)
1-3     experts         FULL                            -
        into head       FULL > TP_ATTN_FULL  tp         reduce_scatter tp (2)
        logits          FULL                            all_gather attn_dp (2), all_to_all tp (2)

rows       of a replica are never rounded up
padding    MAX_LEN or SUM_LEN, in the step's header: no collective agrees on it
symmetric  both sides of every collective but all_to_all, on its own group
require_mlp_tp_gather   yes
require_attn_tp_gather  no
require_gathered_buffer yes
require_mlp_sync        yes
"""


def test_the_plan_is_a_table(capsys):
    flags = ["--tp-size", "2", "--dp-size", "2", "--enable-dp-attention", "--ep-size", "2"]
    assert main(["plan", *flags]) == 0
    assert capsys.readouterr().out == TWO_REPLICAS


@pytest.mark.row("S7")
def test_a_replica_in_parts_says_so(capsys):
    assert main(["plan", "--tp-size", "4", "--attn-cp-size", "2"]) == 0
    told = capsys.readouterr().out
    assert "on 4 ranks: attention 1 x 2 x 2, experts" in told
    assert "rows       of a replica are padded to a multiple of 4, its ranks" in told
    assert "context    prompts are cut zigzag over 2 parts, decodes are dealt out;" in told
    lines = [line.split() for line in told.splitlines()]
    attention = [line for line in lines if line[1:3] == ["attention", "TP_ATTN_FULL"]]
    assert [line[3:] for line in attention] == [["all_gather", "attn_cp", "(2)"]] * 2
    assert main(["plan", "--tp-size", "2", "--attn-cp-size", "2"]) == 0
    assert "padded to a multiple of 2, its parts" in capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_stands_for_a_model(preset, capsys):
    flags = ["--tp-size", "4", "--dp-size", "2", "--enable-dp-attention"]
    assert main(["plan", "--preset", preset, *flags]) == 0
    told = capsys.readouterr().out
    assert told.startswith(PRESETS[preset]["architectures"][0])
    layers = [line.split()[0] for line in told.splitlines() if "into attention" in line]
    assert layers[0].split("-")[0] == "0"
    assert layers[-1].split("-")[-1] == str(PRESETS[preset]["num_hidden_layers"] - 1)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--preset", "70b"],
            "preset='70b' is not known: there are 0.6b, 8b, 30b-a3b, v2-lite, v32-mini",
        ),
        (["--preset", "8b", "--model", "/x"], "--preset 8b stands for a model: leave out --model"),
        (["--preset", "8b", "--tp-size", "3"], "32 attention heads do not divide over 3 ranks"),
        (["--preset", "8b", "--max-model-len", "50000"], "more than the 40960 positions of the"),
        (["--tp-size", "3"], "4 attention heads do not divide over 3 ranks"),
        (["--tp-size", "4", "--attn-cp-size", "3"], "tp_size=4 does not divide by attn_cp_size=3"),
        (["--tp-size", "2", "--moe-dense-tp-size", "3"], "moe_dense_tp_size=3 must be unset or"),
        (["--tp-size", "2", "--moe-a2a-backend", "torch"], "set ep_size to 2"),
    ],
)
def test_what_has_no_plan_says_why(flags, sentence, capsys):
    assert main(["plan", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_the_engine_refuses_with_the_same_sentence_before_anything_is_started():
    from deployments.llm import LLM

    with pytest.raises(ValueError, match="moe_dp_size=2: replicated experts take rows that are"):
        LLM(tp_size=2, moe_dp_size=2)
