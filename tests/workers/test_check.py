"""`lockstep check`: every collective over real ranks, and its verdict from a profiler's trace."""

import json
from pathlib import Path

import pytest

from deployments.cli import main
from workers.check import Case, add_kernels, kernels_of, verdicts_of

STORED = sorted((Path(__file__).parent.parent / "bench" / "results").glob("check_*.json"))
SYMMETRIC = "ncclSymkDevKernel_AllReduce_RSxLD_AGxST_sum_bf16(ncclSymkDevWorkArgs)"
RING = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage)"


@pytest.mark.row("S1", "S5")
def test_every_collective_of_two_ranks_is_symmetric_and_the_twin_is_reported(tmp_path, capfd):
    path = tmp_path / "result.json"
    assert main(["check", "--world", "2", "--device", "cpu", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    cases = [Case(**case) for case in result["cases"]]
    assert {(case.group, case.op) for case in cases if case.mode == "eager"} == {
        (group, op)
        for group in ("tp", "attn_tp", "moe_tp", "dense_tp")
        for op in ("all_reduce", "all_gather", "gather_aside", "reduce_scatter")
    }
    assert all(case.path == "symmetric" for case in cases if case.mode == "eager")
    assert [(case.path, case.reason) for case in cases if case.mode == "twin"] == [
        ("fallback", "unregistered")
    ]
    shown = capfd.readouterr().out
    assert "16 collectives, 0 fallbacks" in shown
    assert "1 of 1 collectives over an unregistered twin reported" in shown


def test_a_layout_that_does_not_fit_is_refused(capfd):
    assert main(["check", "--world", "4", "--dp-size", "3", "--device", "cpu"]) == 2
    assert "tp_size=4 does not divide by dp_size=3" in capfd.readouterr().err


def trace(case, kernel):
    """A case that launched one kernel, and a kernel of nobody's."""
    return [
        {"cat": "user_annotation", "name": f"lockstep {case}", "ts": 10.0, "dur": 5.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 11, "dur": 1, "correlation": 7},
        {"cat": "kernel", "name": kernel, "ts": 13.0, "dur": 2.0, "correlation": 7},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 30, "dur": 1, "correlation": 8},
        {"cat": "kernel", "name": "ncclOther", "ts": 31.0, "dur": 2.0, "correlation": 8},
    ]


@pytest.mark.parametrize(
    ("mode", "path", "kernel", "is_good"),
    [
        ("eager", "symmetric", SYMMETRIC, True),
        ("graph", "symmetric", SYMMETRIC, True),
        ("eager", "symmetric", RING, False),
        ("eager", "fallback", SYMMETRIC, False),
        ("twin", "fallback", RING, True),
        ("twin", "symmetric", RING, False),
        ("twin", "fallback", SYMMETRIC, False),
    ],
)
def test_ledger_and_kernel_must_say_the_same(mode, path, kernel, is_good):
    case = Case("all_reduce", "tp", (0, 1), mode, path, "", is_correct=True)
    events = trace(case.name, kernel)
    assert kernels_of(events) == {case.name: [kernel]}
    add_kernels([case], events)
    assert case.kernel == kernel.partition("(")[0]
    assert case.is_good == is_good


def test_a_case_without_a_kernel_is_not_good():
    case = Case("all_reduce", "tp", (0, 1), "eager", "symmetric", "", is_correct=True)
    add_kernels([case], trace("another case", SYMMETRIC))
    assert (case.kernel, case.is_good) == ("none seen", False)


@pytest.mark.row("S5", "S12")
@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_traces_give_their_verdicts_again(path):
    result = json.loads(path.read_text())
    assert result["bad"] == []
    verdicts = verdicts_of(result)
    assert verdicts
    assert all(verdicts.values())
    kernels = kernels_of(result["trace"])
    assert set(kernels) == set(verdicts)
    for name, found in kernels.items():
        symmetric = all(kernel.startswith("ncclSymkDevKernel_") for kernel in found)
        assert found
        assert symmetric != name.endswith("twin")
