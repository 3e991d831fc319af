"""`lockstep bench step` on the bundled model."""

import json

import pytest

from deployments.bench_step import bench_step
from deployments.bench_step_table import (
    Case,
    DriverTimes,
    TooFewSteps,
    figures_line,
    figures_of,
    header,
    read_case,
    row,
)
from deployments.cli import main


def test_each_case_is_a_row_of_parts(tmp_path):
    lines, file = [], tmp_path / "step.json"
    settings = {"device": "cpu", "tp_size": 2}
    assert bench_step(["1:16", "3:40"], settings, json_file=str(file), show=lines.append) == 0
    ready, names, *rows, last = lines
    assert "ready after" in ready
    assert names.split()[:4] == ["rows:context", "step", "plan", "send"]
    assert "idle" not in names  # that is for GPUs
    assert [line.split()[0] for line in rows] == ["1:16", "3:40"]
    for line in rows:
        step, plan, send, launch, finish, host, _, back, accept = map(float, line.split()[1:])
        assert min(plan, send, launch, finish, back, accept) > 0
        assert launch <= host
        assert step > plan
    told = json.loads(last)
    assert told == json.loads(file.read_text())
    assert "gap_p50_us" not in told
    assert [(case["rows"], case["context"]) for case in told["cases"]] == [(1, 16), (3, 40)]
    for line, case in zip(rows, told["cases"], strict=True):
        assert line.split()[1] == str(case["step_us"])
        parts = (case["plan_us"], case["send_us"], case["accept_us"])
        assert case["driver_us"] == pytest.approx(sum(parts), abs=0.2)


def test_a_gpu_adds_its_columns():
    driver = DriverTimes(
        plan=dict.fromkeys(range(3), 1e-5),
        send=dict.fromkeys(range(3), 2e-5),
        accept=dict.fromkeys(range(3), 3e-5),
        accepted={0: 1.0, 1: 1.001, 2: 1.002},
    )
    steps = [[n, 0.9 + n / 1000, 1e-4, 2e-4, 5e-5, 0.9999 + n / 1000] for n in range(3)]
    gpu = {"busy": [900.0, 920.0], "idle": [10.0, 20.0], "gap": [8.0, 9.0]}
    gpu["kernels"] = [["gemm", 800.0, 2.0]]
    figures = figures_of({"rows": 1, "steps": steps, "gpu": gpu}, driver)
    assert figures["step"] == pytest.approx(1000)
    assert figures["host"] == pytest.approx(150)
    assert figures["back"] == pytest.approx(100)
    assert (figures["busy"], figures["idle50"], figures["idle80"]) == (910.0, 15.0, 18.0)
    assert figures["gap50"] == 8.5
    assert header(figures).split()[-6:] == ["idle", "p50", "idle", "p80", "longest", "gap"]
    assert len(header(figures)) == len(row(Case(1, 128), figures))
    slow = figures | {"gap50": 31.0}
    line = figures_line("8b", [(Case(1, 128), figures, gpu), (Case(128, 1024), slow, gpu)])
    assert line["gap_p50_us"] == {"1:128": 8.5, "128:1024": 31.0}
    assert line["gap_met"] is False
    assert line["cases"][0]["kernels"] == gpu["kernels"]


def test_steps_that_only_one_side_saw_are_nofigures_of():
    with pytest.raises(TooFewSteps, match="too few steps"):
        figures_of({"rows": 1, "steps": [[7, 0.0, 0.0, 0.0, 0.0, 0.0]]}, DriverTimes())


@pytest.mark.parametrize("word", ["12", "a:3", "0:5", "3:0", "1:2:3"])
def test_a_case_that_is_not_understood_is_named(word):
    with pytest.raises(ValueError, match=f"case `{word}` is not understood"):
        read_case(word)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["1:9000", "--device", "cpu"], "lower the context"),
        (["90:2000", "--device", "cpu", "--kv-cache-gb", "0.01"], "lower"),
        (["--model", "/nowhere"], "is neither a folder nor a preset (0.6b, 8b, "),
        (["--dp-size", "2"], "step by themselves"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, flags, sentence):
    assert main(["bench", "step", *flags]) in (1, 2)
    assert sentence in capsys.readouterr().err
