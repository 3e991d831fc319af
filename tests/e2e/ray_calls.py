"""Counts the Ray calls that every process of the tests' cluster makes, from within.

`install` is the cluster's worker_process_setup_hook: it wraps the two methods behind every
`.remote(...)` and writes a running count into a file of its process. `total` adds them up.
"""

import os
import struct
from pathlib import Path

FOLDER_VARIABLE = "LOCKSTEP_TEST_RAY_CALLS"


def install() -> None:
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    from ray.actor import ActorMethod
    from ray.remote_function import RemoteFunction

    file = open(Path(folder) / str(os.getpid()), "wb", buffering=0)  # noqa: SIM115 - for good
    count = 0
    for kind in (ActorMethod, RemoteFunction):
        original = kind._remote

        def counted(self, *args, _original=original, **kwargs):
            nonlocal count
            count += 1
            os.pwrite(file.fileno(), struct.pack("<q", count), 0)
            return _original(self, *args, **kwargs)

        kind._remote = counted


def total() -> int:
    folder = Path(os.environ[FOLDER_VARIABLE])
    counts = [path.read_bytes() for path in folder.iterdir()]
    return sum(struct.unpack("<q", data)[0] for data in counts if len(data) == 8)
