"""The packages that are imported are the ones in this folder."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from workers.config import passed_on_environment
from workers.worker import refuse_foreign_kernels

ROOT = Path(__file__).resolve().parent.parent
OURS = ("deployments", "workers", "parallel", "kernels")


@pytest.mark.parametrize("name", OURS)
def test_the_imported_package_is_ours(name):
    """Hugging Face's package is called `kernels` too: a wrong path would import theirs."""
    assert Path(importlib.import_module(name).__file__).parent == ROOT / name


def test_the_driver_does_not_import_torch():
    """Its process starts in a second, holds no gigabyte, and can be on a node without GPUs."""
    line = (
        "import sys, deployments.ray_fleet, deployments.worker_link; "
        "print([name for name in ('torch', 'triton', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_cpu_needs_no_triton():
    """CPU builds of torch come without it."""
    line = "import sys; sys.modules['triton'] = None; import workers.runner, workers.worker"
    done = subprocess.run(
        [sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_worker_proves_that_kernels_is_ours():
    refuse_foreign_kernels()


def test_ranks_on_other_nodes_find_ours_first(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"/elsewhere:{ROOT}")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("HOME_GROWN", "x")
    passed_on = passed_on_environment()
    assert passed_on["PYTHONPATH"] == f"{ROOT}:/elsewhere"
    assert passed_on["NCCL_DEBUG"] == "WARN"
    assert not {"CUDA_VISIBLE_DEVICES", "HOME_GROWN"} & passed_on.keys()
