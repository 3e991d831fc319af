"""CPU time of processes that this one has started, by what they are called. Linux only."""

import os
from pathlib import Path
from typing import NamedTuple

TICKS = os.sysconf("SC_CLK_TCK")


class Running(NamedTuple):
    pid: int
    parent: int
    title: str
    seconds: float
    """Of CPU, in user code and in the kernel."""


def cpu_seconds(title: str, ancestor: int | None = None) -> float:
    """Of all processes below `ancestor` (this one) whose command line has `title` in it."""
    every = {process.pid: process for process in _running()}
    top = os.getpid() if ancestor is None else ancestor
    return sum(
        process.seconds
        for process in every.values()
        if title in process.title and _is_below(process, top, every)
    )


def _running() -> list[Running]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                # What follows the name, which may have anything in it: state, parent, ...
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError, UnicodeDecodeError):
                continue  # it has just ended
            seconds = (int(fields[11]) + int(fields[12])) / TICKS
            found.append(Running(int(folder.name), int(fields[1]), title, seconds))
    return found


def _is_below(process: Running, top: int, every: dict[int, Running]) -> bool:
    seen = set()
    while process.pid not in seen and process.parent in every:
        seen.add(process.pid)
        if process.parent == top:
            return True
        process = every[process.parent]
    return False
