"""A Ray of a benchmark's own with a service on it; nothing of either is left behind."""

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deployments.messages import EngineInfo
from tests.e2e import ray_calls
from workers.config import set_ray_environment

APP = "lockstep"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def own_ray(*, counts: bool = False) -> Iterator[None]:
    """A Ray of its own; with `counts`, `tests.e2e.ray_calls` counts the calls of its processes."""
    set_ray_environment()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path]))
    import ray

    folder = tempfile.TemporaryDirectory(prefix="lsray", dir="/tmp", ignore_cleanup_errors=True)
    with folder, contextlib.ExitStack() as stack:
        more: dict[str, Any] = {}
        if counts:
            calls = Path(folder.name, "calls")
            calls.mkdir()
            os.environ[ray_calls.FOLDER_VARIABLE] = str(calls)
            more["runtime_env"] = {"worker_process_setup_hook": "tests.e2e.ray_calls.install"}
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            _temp_dir=folder.name,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            logging_level="error",
            **more,
        )
        stack.callback(ray.shutdown)
        yield


@contextlib.contextmanager
def ray_and_serve() -> Iterator[str]:
    """A Ray of its own with Serve on a free port: its URL."""
    os.environ["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(free_port())
    os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] = str(free_port())
    with own_ray(), contextlib.ExitStack() as stack:
        from ray import serve
        from ray.serve.schema import LoggingConfig

        port = free_port()
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet)
        stack.callback(serve.shutdown)
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def service(settings: dict[str, Any]) -> Iterator[None]:
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from deployments.app import build_app

    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    app = build_app(settings | {"metrics_port": 0})
    serve.run(app, name=APP, route_prefix="/", logging_config=quiet)
    try:
        yield
    finally:
        serve.delete(APP)


def driver_info() -> EngineInfo:
    """Where the service's driver listens."""
    from ray import serve

    handle = serve.get_deployment_handle("Driver", app_name=APP)
    return handle.endpoint.remote().result(timeout_s=30)
