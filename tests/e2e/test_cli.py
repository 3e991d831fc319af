"""The command line as a user meets it: a service that starts and stops, and clear refusals."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import free_port
from workers import bundled

pytestmark = pytest.mark.timeout(120)


def lockstep(*args, env=None, timeout=90):
    return subprocess.run(
        [sys.executable, "-m", "deployments.cli", *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment() | (env or {}),
        check=False,
    )


def environment():
    """Ray's own settings are chosen by `lockstep serve` here, not by the tests."""
    ray = ("RAY_AUTH_MODE", "RAY_SERVE_ENABLE_HA_PROXY")
    kept = {name: value for name, value in os.environ.items() if name not in ray}
    return kept | {
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "5",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
    }


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled model, to be spoilt."""
    return Path(shutil.copytree(bundled.path(), tmp_path / "model"))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def forget_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "args", "sentence"),
    [
        (truncate, (), "model.safetensors"),
        (forget_weights, (), "safetensors"),
        (None, ("--max-model-len", "999999"), "max_model_len=999999 is more than the 4096"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(folder, spoil, args, sentence):
    if spoil is not None:
        spoil(folder)
    result = preflight(folder, *args)
    assert result.returncode == 2
    assert sentence in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def preflight(folder, *args):
    """What `lockstep serve` runs while Ray starts."""
    import msgspec

    from deployments.config import ServiceConfig

    settings = {"model": str(folder)}
    settings |= {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(args[::2], args[1::2], strict=True)
    }
    return subprocess.run(
        [sys.executable, "-m", "workers.preflight"],
        input=msgspec.json.encode(ServiceConfig.from_args(settings).engine).decode(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("serve", "--tp-sise", "2"), "unknown argument `--tp-sise`: did you mean `--tp-size`?"),
        (("serve", "--tp-size", "two"), "tp_size='two' is not valid: Expected `int`, got `str`"),
        (("serve", "--page-size", "24"), "page_size=24 must be a power of two from 1 to 256"),
    ],
)
def test_a_wrong_command_says_what_to_change(args, sentence):
    result = lockstep(*args)
    assert result.returncode == 2
    assert sentence in result.stderr


def test_a_port_that_is_taken_is_named():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        result = lockstep("serve", "--port", str(port))
    assert result.returncode == 1
    assert f"port {port} on 127.0.0.1 cannot be had" in result.stdout


LONG = {
    "model": "model",
    "prompt": "a",
    "max_tokens": 1200,
    "ignore_eos": True,
    "stream": True,
}
"""An answer that takes seconds."""


@pytest.mark.timeout(180)
def test_serve_answers_and_leaves_nothing_behind(folder):
    """What runs when it is told to stop is answered to the end."""
    port = free_port()
    command = [sys.executable, "-m", "deployments.cli", "serve", "--model", str(folder)]
    command += ["--port", str(port), "--tp-size", "2", "--device", "cpu", "--metrics-port", "-1"]
    shared_before = set(os.listdir("/dev/shm"))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    ) as service:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, service)
            with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
                slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")  # and no more
                result = lockstep("chat", "What", "is", "128+305?", "--url", url)
                assert result.stdout.strip() == "433"
                assert slow.recv(1000).startswith(b"HTTP/1.1 408")
            members = processes_of_session(service.pid)
            assert len(members) > 5
            body = json.dumps(LONG)
            headers = {"content-type": "application/json"}
            with httpx.stream(
                "POST", f"{url}/v1/completions", content=body, headers=headers, timeout=60
            ) as answer:
                events = (line for line in answer.iter_lines() if line)
                assert next(events).startswith("data: {")
                service.send_signal(signal.SIGINT)
                *_, last = events
            assert last == "data: [DONE]"
            told = service.communicate(timeout=60)[0]
        finally:
            service.kill()
    assert service.returncode == 0
    assert "lockstep: ready after" in told
    assert "stopping" in told
    wait_for(lambda: not processes_of_session(service.pid), 15)
    wait_for(lambda: not set(os.listdir("/dev/shm")) - shared_before, 15)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def wait_until_ready(url, service):
    for _ in range(600):
        if service.poll() is not None:
            pytest.fail(f"the service ended before it was ready: {service.stdout.read()}")
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise TimeoutError("not ready within 60 s")


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.2)


def processes_of_session(session):
    """Live processes of a session, whatever their group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_an_engine_that_cannot_start_is_a_sentence():
    flags = ["--device", "cpu", "--kv-cache-gb", "0.0001", "--max-model-len", "4096"]
    done = lockstep("generate", *flags, "hi")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("lockstep: ")
    assert "raise kv_cache_gb or lower max_model_len" in last
