"""`lockstep check` as a command of its own: it needs torch, which nothing else here imports.

The work is `workers.check`; it takes the arguments as they are and runs without Ray.
"""

import subprocess
import sys
from collections.abc import Sequence


def check(arguments: Sequence[str]) -> int:
    """Run the check in a process of its own; its exit code."""
    return subprocess.call([sys.executable, "-m", "workers.check", *arguments])
