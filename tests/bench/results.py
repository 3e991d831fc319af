"""One CSV a benchmark under tests/bench/results, one row a case, newest last."""

import csv
import datetime
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "results"
COLUMNS = ("date", "commit", "device", "versions", "case", "unit", "p20", "p50", "p80", "command")


def percentiles(values):
    return [float(np.percentile(values, p)) for p in (20, 50, 80)]


def record(name: str, case: str, unit: str, values: list[float], command: str, device: str = "CPU"):
    """Append the 20th, 50th and 80th percentile of `values` to results/<name>.csv and print it."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.csv"
    is_new = not path.exists()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = " ".join(f"{p}={version(p)}" for p in ("torch", "ray", "pyzmq"))
    row = [
        datetime.date.today().isoformat(),
        commit,
        device,
        f"python={platform.python_version()} {versions}",
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
    print(f"{case:40s} {row[6]:>10s} {row[7]:>10s} {row[8]:>10s} {unit}")
