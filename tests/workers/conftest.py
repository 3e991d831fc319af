"""What tests of several ranks in one process need."""

import threading

import pytest


@pytest.fixture
def one_kernel_at_a_time(monkeypatch):
    """Triton's interpreter keeps what it runs in globals; ranks are threads here."""
    from triton.runtime.interpreter import GridExecutor

    launch, lock = GridExecutor.__call__, threading.RLock()

    def launch_alone(self, *args, **kwargs):
        with lock:
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch_alone)
