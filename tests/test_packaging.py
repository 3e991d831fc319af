"""The packages that are imported are the ones in this folder."""

import importlib
import importlib.util
import os
import re
import shutil
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
        [sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_cpu_needs_no_triton():
    """CPU builds of torch come without it."""
    line = "import sys; sys.modules['triton'] = None; import workers.runner, workers.worker"
    done = subprocess.run(
        [sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=280
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_steps_of_the_image_give_an_environment_that_answers(tmp_path):
    """Those of the Dockerfile's CPU target, in a virtual environment in place of the image."""
    text = (ROOT / "Dockerfile").read_text()
    stage = text.split("FROM requirements AS requirements-cpu")[1].split("\nFROM ")[0]
    (install,) = [line for line in stage.splitlines() if line.startswith("RUN pip install")]
    # The other index has smaller wheels of the same versions.
    words = re.sub(r"--extra-index-url \S+", "", install).removeprefix("RUN ").split()
    build, app, env = tmp_path / "build", tmp_path / "app", tmp_path / "env"
    build.mkdir()
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, build)
    (build / "README.md").touch()
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True, timeout=120)
    pip = [str(env / "bin" / "python"), "-m", *(word.strip("'") for word in words)]
    subprocess.run([*pip, "-q"], cwd=build, check=True, timeout=600)
    for package in re.findall(r"^COPY (\w+) /app/\w+$", text, re.MULTILINE):
        shutil.copytree(ROOT / package, app / package)
    done = subprocess.run(
        [str(env / "bin" / "lockstep"), "generate", "--device", "cpu", "What is 128+305?"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(app)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "433" in done.stdout, done.stderr
