"""`lockstep serve`: the service on a Ray cluster, one started here or one that is there.

Ray's processes read some of their settings from the environment when they start, so those are set
before Ray is imported: HAProxy in front instead of Serve's Python proxy (ten times the streaming
throughput), token authentication, no usage statistics.
"""

import contextlib
import io
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

import msgspec

from deployments.api_keys import read_keys
from deployments.config import ServiceConfig
from deployments.fit import check_fit, check_tokenizer
from workers.config import ray_address, set_ray_environment, set_serve_ports

APP_NAME = "lockstep"

LOOK_S = 0.5
"""Between two looks at what is under way; longer than a beat is by default."""


def serve_forever(config: ServiceConfig) -> int:
    """Serve until SIGINT or SIGTERM; 2 if the settings are wrong, 1 if it cannot start.

    Requests that run then have `drain_s` to finish; a second signal ends them.
    What the settings and config.json alone show to be wrong is a ValueError, before anything runs.
    """
    settings = config.service
    check_fit(config.engine)
    check_tokenizer(config.engine)
    if not ray_address():  # the ingresses will run here, so the file must be here
        read_keys(settings.api_keys_file)
    taken = _taken(settings.host, settings.port)
    if taken:
        print(f"lockstep: {taken}", flush=True)
        return 1
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    began = time.monotonic()
    model = config.engine.model or "the bundled model"
    print(f"lockstep: starting Ray and checking {model}", flush=True)
    checking = _start_preflight(config)
    set_ray_environment()
    if not ray_address():
        set_serve_ports()
    with _only_our_lines(), _cluster(config):
        wrong = _finish(checking)
        error = wrong or _deploy(config)
        if error:
            print(f"lockstep: {error}", flush=True)
            return 2 if wrong else 1
        url = f"http://{settings.host}:{settings.port}"
        print(
            f"lockstep: ready after {time.monotonic() - began:.0f} s on {url}\n"
            f"lockstep: try   lockstep chat 'What is 128+305?' --url {url}",
            flush=True,
        )
        stop.wait()
        stop.clear()
        print("lockstep: stopping; requests that are running may finish", flush=True)
        _drain(settings.drain_s, stop)
    return 0


class _OurLines(io.TextIOBase):
    """A stdout that shows lines of ours alone, without the process names Ray puts before them.

    What the driver has said last is not said again when it is also why the service cannot start.
    Ray prints what its processes say into the terminal that started it; all of it is in Ray's log
    folder too.
    """

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._line = ""
        self._said_last = ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            _, ours, said = line.partition("lockstep: ")
            if ours and said != self._said_last:
                self._said_last = said
                self._terminal.write(f"lockstep: {said}\n")
        self._terminal.flush()
        return len(text)


@contextlib.contextmanager
def _only_our_lines() -> Iterator[None]:
    ours = _OurLines(sys.stdout)
    with contextlib.redirect_stdout(ours), contextlib.redirect_stderr(ours):
        yield


def _start_preflight(config: ServiceConfig) -> "subprocess.Popen[bytes]":
    """Check the weights' files against the model in a process of its own, while Ray starts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.preflight"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    if process.stdin is not None:
        process.stdin.write(msgspec.json.encode(config.engine))
        process.stdin.close()
        process.stdin = None
    return process


def _finish(checking: "subprocess.Popen[bytes]") -> str:
    """What the check found to be wrong; empty if nothing is."""
    told, _ = checking.communicate()
    return told.decode().strip() if checking.returncode == 2 else ""


def _taken(host: str, port: int) -> str:
    """A sentence if the port cannot be had."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return (
                f"port {port} on {host} cannot be had ({error.strerror}): stop what listens there "
                f"or choose another with --port"
            )
    return ""


@contextlib.contextmanager
def _cluster(config: ServiceConfig) -> Any:
    """Connect to the cluster named by RAY_ADDRESS, or start one here; leave nothing behind."""
    import ray
    from ray import serve

    address = ray_address()
    if address:
        ray.init(address=address, log_to_driver=True)
    else:
        ray.init(
            address="local",  # else it would join any cluster that happens to run here
            num_cpus=max(4, config.engine.layout.world_size + 2),
            include_dashboard=False,
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            serve.delete(APP_NAME)
        if not address:
            with contextlib.suppress(Exception):
                serve.shutdown()
        ray.shutdown()


def _deploy(config: ServiceConfig) -> str:
    """Deploy and wait; a sentence if it failed."""
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from deployments.app import build_app_from

    settings = config.service
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(
        http_options=HTTPOptions(host=settings.host, port=settings.port), logging_config=quiet
    )
    try:
        serve.run(build_app_from(config), name=APP_NAME, route_prefix="/", logging_config=quiet)
    except RuntimeError:
        return _why(serve.status())
    return ""


def _drain(limit_s: float, stop: threading.Event) -> None:
    """Have new requests refused, and wait until none is under way, `limit_s` are over or `stop` is
    set once more, which leaves none any time.

    Deleting the application would do the same, but without a second signal, and ingresses that are
    being deleted do not answer with 503.
    """
    from ray import serve

    deadline = time.monotonic() + limit_s
    with contextlib.suppress(Exception):  # no driver that could be asked has no requests
        driver = serve.get_deployment_handle("Driver", APP_NAME)
        driver.drain.remote(limit_s).result(timeout_s=10)
        # A look follows a pause: ingresses say with each beat what they have under way.
        while time.monotonic() < deadline and not stop.wait(LOOK_S):
            if not driver.num_in_flight.remote().result(timeout_s=10):
                return
        driver.drain.remote(0.0).result(timeout_s=10)


def _why(status: Any) -> str:
    """The driver's own sentence out of Serve's report of a failed deployment."""
    for application in status.applications.values():
        for name, deployment in application.deployments.items():
            found = re.search(r"EngineFailed: (.*)", deployment.message or "")
            if found:
                return found.group(1).strip()
            if deployment.message:
                return f"{name}: {deployment.message.strip().splitlines()[-1]}"
    return "the service could not start; Ray's logs have the reason"
