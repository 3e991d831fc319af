"""The chart tests' own environment, and one call that renders many cases in it.

helm-sdkpy needs Python 3.12 or later, which the project does not: `.helm-venv` is made once, of any
Python 3.12 or 3.13 that answers, and again when requirements.txt changes.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
CHART = ROOT / "helm"
HERE = Path(__file__).resolve().parent
VENV = ROOT / ".helm-venv"
BIN = VENV / "bin"


class NoEnvironment(Exception):
    """Why the chart cannot be rendered here."""


def interpreters() -> Iterator[str]:
    """Every Python 3.12 or 3.13 that may be here; some of them may refuse to start."""
    names = ("python3.12", "python3.13")
    yield sys.executable
    for name in names:
        beside = Path(sys.executable).resolve().parent / name
        found = shutil.which(name)
        if found:
            yield found
        if beside.exists():
            yield str(beside)
    pyenv = Path(os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv")))
    for name in names:
        yield from map(str, sorted(pyenv.glob(f"versions/*/bin/{name}")))


def _works(python: str) -> bool:
    """A shim may be there and refuse; an interpreter may lack what makes environments."""
    line = "import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 12), (3, 13)))"
    try:
        done = subprocess.run([python, "-c", line], capture_output=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def prepare() -> Path:
    """The environment's Python, made if it is missing or stale; or `NoEnvironment`."""
    requirements = HERE / "requirements.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    stamp = VENV / ".requirements"
    python = BIN / "python"
    if stamp.exists() and stamp.read_text() == digest and _works(str(python)):
        return python
    found = next(filter(_works, interpreters()), None)
    if found is None:
        raise NoEnvironment("rendering the chart needs Python 3.12 or 3.13, and none was found")
    steps = (
        [found, "-m", "venv", "--clear", str(VENV)],
        [str(python), "-m", "pip", "install", "-q", "-r", str(requirements)],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, timeout=600)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise NoEnvironment(f"the environment of the chart tests cannot be made: {last}")
    stamp.write_text(digest)
    return python


def render(
    python: Path, cases: Mapping[str, Mapping[str, Any]], *, checked: Collection[str]
) -> dict[str, dict[str, Any]]:
    """What Helm makes of each case's values; see render.py. Two cores are used."""
    lines = [
        json.dumps({"name": name, "values": values, "check": name in checked})
        for name, values in cases.items()
    ]
    command = [str(python), str(HERE / "render.py"), str(CHART)]

    def ended(share: list[str]) -> subprocess.CompletedProcess[str]:
        text = "\n".join(share)
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=600)

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(ended, (lines[::2], lines[1::2])))
    said = [json.loads(line) for done in both for line in done.stdout.splitlines()]
    answers = {answer["name"]: answer for answer in said}
    missing = next((name for name in cases if name not in answers), None)
    if missing is not None:
        errors = "".join(done.stderr[-2000:] for done in both)
        raise RuntimeError(f"rendering ended at case {missing!r}: {errors}")
    return answers
