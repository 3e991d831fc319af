"""Fixtures shared by every test: where to run, and what a test may use."""

import importlib.util
import os

# Ray's processes read these when they start, and some modules when they are imported.
os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A property has the same examples in every run, however slow the machine is: one that fails fails
# again. `--hypothesis-profile search` looks for new ones.
UNHURRIED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, database=None, print_blob=True, **UNHURRIED)
settings.register_profile("search", **UNHURRIED)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--row", help="only tests that are marked with this row of the mission")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    row = config.getoption("--row")
    if row is not None:
        items[:] = [
            item for item in items if any(row in mark.args for mark in item.iter_markers("row"))
        ]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`@pytest.mark.gpus(n)` names the hardware a test needs; without it the test is skipped."""
    for mark in item.iter_markers("gpus"):
        if torch.cuda.device_count() < mark.args[0]:
            pytest.skip(f"needs {mark.args[0]} GPUs, found {torch.cuda.device_count()}")


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from tests.interpreter import quicken

        quicken()


@pytest.fixture
def device() -> str:
    """Kernels run on the GPU where there is one, and in Triton's interpreter where there is not."""
    return "cuda" if torch.cuda.is_available() else "cpu"
