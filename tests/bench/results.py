"""One CSV a benchmark under tests/bench/results, one row a case, newest last."""

import csv
import datetime
import math
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "results"
COLUMNS = ("date", "commit", "device", "versions", "case", "unit", "p20", "p50", "p80", "command")

STUDENT_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""Student's t for a two-sided 95 % interval, from 1 degree of freedom on."""


def percentiles(values):
    return [float(np.percentile(values, p)) for p in (20, 50, 80)]


def ratio_interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """(low, mean, high): geometric mean of paired ratios and its 95 % interval.

    >>> low, mean, high = ratio_interval([0.99, 1.01, 1.0])
    >>> round(low, 3), round(mean, 3), round(high, 3)
    (0.975, 1.0, 1.025)
    """
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    degrees = len(logs) - 1
    student = STUDENT_975[degrees - 1] if degrees <= len(STUDENT_975) else 2.0
    wide = student * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean - wide), math.exp(mean), math.exp(mean + wide)


def record(
    name: str,
    case: str,
    unit: str,
    values: Sequence[float],
    command: str,
    device: str = "CPU",
    folder: Path = FOLDER,
):
    """Append the 20th, 50th and 80th percentile of `values` to <folder>/<name>.csv and print it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    is_new = not path.exists()
    row = [
        datetime.date.today().isoformat(),
        commit(),
        device,
        versions("torch", "ray", "pyzmq"),
        case,
        unit,
        *(f"{value:.4g}" for value in percentiles(values)),
        command,
    ]
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow(row)
    print(f"{case:52s} {row[6]:>10s} {row[7]:>10s} {row[8]:>10s} {unit}", flush=True)


def versions(*packages: str) -> str:
    """
    >>> versions("torch").split("=")[0]
    'python'
    """
    found = " ".join(f"{package}={_version(package)}" for package in packages)
    return f"python={platform.python_version()} {found}"


def device_name(device: str = "cuda") -> str:
    """The GPU's name, or CPU where there is none or none is meant."""
    if device == "cpu":
        return "CPU"
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return "CPU"
    names = done.stdout.strip().splitlines()
    return names[0] if names else "GPU"


def commit() -> str:
    """Empty where the files are no repository, or there is no git."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, check=False, timeout=10,
        )  # fmt: skip
    except OSError:
        return ""
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
