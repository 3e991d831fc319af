"""A Ray cluster of the tests' own and services on it, reached over HTTP like a user does."""

import contextlib
import os
import tempfile
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e import ray_calls
from tests.e2e.ports import own_ports

APP = "lockstep"
LIMIT_S = 600
"""Of every test here, and of what it waits for: far more than any takes on a machine with nothing
else to do, so that only what hangs is ended by it. Starting Ray, Serve and ranks alone takes two
minutes on two cores that four others want."""

PATIENT = {"beat_ms": 1000, "resume_wait_s": LIMIT_S}
"""For services on a busy machine: at a load of thirty a rank may not run for two seconds, which are
eight beats by default, and its successors may take more than a minute to start."""


def pytest_collection_modifyitems(items):
    for item in items:
        is_here = Path(__file__).parent in item.path.parents
        if is_here and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMIT_S))


@pytest.fixture(scope="session")
def cluster():
    """The URL of Serve on a cluster that all tests share."""
    with ray_and_serve() as url:
        yield url


@contextlib.contextmanager
def ray_and_serve():
    """A single-node Ray with Serve behind HAProxy on its own ports; nothing of it is left."""
    with contextlib.ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="lsray", dir="/tmp", ignore_cleanup_errors=True)
        stack.enter_context(folder)
        ports = stack.enter_context(own_ports())
        os.environ.update(ports.serve_environment(folder.name))
        import ray
        from ray import serve

        calls = Path(folder.name, "calls")
        calls.mkdir()
        os.environ[ray_calls.FOLDER_VARIABLE] = str(calls)
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            _temp_dir=folder.name,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"worker_process_setup_hook": "tests.e2e.ray_calls.install"},
        )
        stack.callback(ray.shutdown)
        serve.start(http_options={"host": "127.0.0.1", "port": ports.http})
        stack.callback(serve.shutdown)
        yield f"http://127.0.0.1:{ports.http}"


@contextlib.contextmanager
def deployed(url, **settings):
    """A service with these settings on the cluster, ready; deleted afterwards."""
    from ray import serve

    from deployments.app import build_app

    settings = {"device": "cpu", "metrics_port": 0, "kv_cache_gb": 0.1} | PATIENT | settings
    serve.run(build_app(settings), name=APP, route_prefix="/")
    try:
        wait_ready(url)
        yield url
    finally:
        serve.delete(APP, _blocking=False)  # else it has a minute
        await_so(lambda: APP not in serve.status().applications)


def driver_handle():
    from ray import serve

    return serve.get_deployment_handle("Driver", app_name=APP)


def wait_ready(url, timeout_s=LIMIT_S):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise TimeoutError(f"{url} was not ready within {timeout_s} s")


def await_so(condition, timeout_s=LIMIT_S):
    """Return when it is so; for what comes about by itself, however long a busy machine takes."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {timeout_s} s"
        time.sleep(0.1)


def metric(handle, name):
    """The value of one metric, with its labels if it has any, scraped from the driver."""
    address = handle.metrics_address.remote().result()
    text = httpx.get(f"http://{address}/metrics", timeout=10).text
    for line in text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[-1])
    raise KeyError(name)
