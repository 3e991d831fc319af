"""The command line as a user meets it: a service that starts and stops, and clear refusals."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from tests.e2e.conftest import PATIENT
from tests.e2e.ports import own_ports
from workers import bundled


def lockstep(*args, env=None, timeout=300):
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
    return {name: value for name, value in os.environ.items() if name not in ray}


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
        timeout=300,
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
    "max_tokens": 800,
    "ignore_eos": True,
    "stream": True,
}
"""An answer that takes ten seconds: what is done meanwhile takes one."""


@contextlib.contextmanager
def serving(*flags):
    """`lockstep serve` in a session and on ports of its own, ready: the process and its URL."""
    command = [sys.executable, "-m", "deployments.cli", "serve", "--device", "cpu", *flags]
    command += ["--beat-ms", str(PATIENT["beat_ms"])]
    command += ["--resume-wait-s", str(PATIENT["resume_wait_s"])]
    with own_ports() as ports, TemporaryDirectory(prefix="lsray", dir="/tmp") as sockets:
        settings = environment() | ports.serve_environment(sockets)
        settings["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"] = "5"
        with subprocess.Popen(
            [*command, "--port", str(ports.http)],
            stdout=subprocess.PIPE,
            text=True,
            env=settings,
            start_new_session=True,
        ) as service:
            try:
                url = f"http://127.0.0.1:{ports.http}"
                wait_until_ready(url, service)
                yield service, url
            finally:
                service.kill()


def test_serve_answers_and_leaves_nothing_behind(folder):
    """What runs when it is told to stop is answered to the end, and what comes then is refused."""
    flags = ["--model", str(folder), "--tp-size", "2", "--metrics-port", "-1", "--drain-s", "300"]
    with serving(*flags) as (service, url):
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port), timeout=60) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")  # and no more
            result = lockstep("chat", "What", "is", "128+305?", "--url", url)
            assert result.stdout.strip() == "433"
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        members = processes_of_session(service.pid)
        assert len(members) > 5
        shared = shared_files(members)
        assert shared, "its ranks share no memory"
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=300) as answer:
            events = (line for line in answer.iter_lines() if line)
            assert next(events).startswith("data: {")
            service.send_signal(signal.SIGINT)
            refused = ask_until_refused(url)
            assert httpx.get(f"{url}/readyz", timeout=60).status_code == 503
            *_, last = events
        assert last == "data: [DONE]"
        assert int(refused.headers["retry-after"]) > 0
        assert "is being stopped" in refused.json()["error"]["message"]
        told = service.communicate(timeout=300)[0]
    assert service.returncode == 0
    assert "lockstep: ready after" in told
    assert "stopping" in told
    wait_for(lambda: not processes_of_session(service.pid))
    wait_for(lambda: not any(map(os.path.exists, shared)))
    with socket.socket() as probe:
        assert probe.connect_ex((address.host, address.port)) != 0


def ask_until_refused(url):
    """The first 503; until the ingress has heard, it answers."""
    short = LONG | {"max_tokens": 1, "stream": False}
    while True:
        answer = httpx.post(f"{url}/v1/completions", json=short, timeout=120)
        if answer.status_code != 200:
            assert answer.status_code == 503, answer.text
            return answer


def wait_until_ready(url, service):
    while True:  # the test's own limit is long enough for any machine
        if service.poll() is not None:
            pytest.fail(f"the service ended before it was ready: {service.stdout.read()}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.1)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.2)


def shared_files(pids):
    """Files in /dev/shm that these processes have mapped."""
    maps = []
    for pid in pids:
        with contextlib.suppress(OSError):
            maps.append(Path(f"/proc/{pid}/maps").read_text())
    return set(re.findall(r"/dev/shm/\S+", "".join(maps)))


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
