"""A Ray cluster of the tests' own and services on it, reached over HTTP like a user does."""

import contextlib
import os
import socket
import tempfile
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e import ray_calls

APP = "lockstep"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def cluster():
    """The URL of Serve on a cluster that all tests share."""
    with ray_and_serve() as url:
        yield url


@contextlib.contextmanager
def ray_and_serve():
    """A single-node Ray with Serve behind HAProxy on a free port; nothing of it is left behind."""
    os.environ["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(free_port())
    os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] = str(free_port())
    # Serve kills a proxy that is not up after 5 s, which a busy machine may take.
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "30"
    import ray
    from ray import serve

    folder = tempfile.TemporaryDirectory(prefix="lsray", dir="/tmp", ignore_cleanup_errors=True)
    with folder, contextlib.ExitStack() as stack:
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
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        stack.callback(serve.shutdown)
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def deployed(url, **settings):
    """A service with these settings on the cluster, ready; deleted afterwards."""
    from ray import serve

    from deployments.app import build_app

    settings = {"device": "cpu", "metrics_port": 0, "kv_cache_gb": 0.1} | settings
    serve.run(build_app(settings), name=APP, route_prefix="/")
    try:
        wait_ready(url)
        yield url
    finally:
        serve.delete(APP)


def driver_handle():
    from ray import serve

    return serve.get_deployment_handle("Driver", app_name=APP)


def wait_ready(url, timeout_s=100.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise TimeoutError(f"{url} was not ready within {timeout_s} s")


def metric(handle, name):
    """The value of one unlabelled metric, scraped from the driver."""
    address = handle.metrics_address.remote().result()
    text = httpx.get(f"http://{address}/metrics", timeout=10).text
    for line in text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise KeyError(name)
