"""A batch over real engines that are killed again and again: every line once, and right."""

import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.e2e.conftest import LIMIT_S
from tests.e2e.ports import own_ports
from workers.bundled.questions import ADDITION, answer, held_out

ROOT = Path(__file__).resolve().parents[2]
CONCURRENCY = 12
ENGINE = (
    *("--device", "cpu", "--kv-cache-gb", "0.1", "--max-num-seqs", "16"),
    *("--concurrency", str(CONCURRENCY), "--log-format", "json"),
)


def write_questions(path, num):
    asked = [question for question, _ in held_out(ADDITION, num, 5)]
    lines = []
    for number, question in enumerate(asked):
        body = {"model": "bundled", "messages": [{"role": "user", "content": question}]}
        body["temperature"] = 0
        url = "/v1/chat/completions"
        lines.append(
            json.dumps({"custom_id": f"q{number}", "method": "POST", "url": url, "body": body})
        )
    path.write_text("\n".join(lines))
    return asked


def whole_lines(path):
    """What has been received for certain: lines with their ends."""
    if not path.exists():
        return []
    return [data for data in path.read_bytes().splitlines(keepends=True) if data.endswith(b"\n")]


def wait_for(condition, process, timeout_s=LIMIT_S):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the batch ended before it was killed"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def num_computed(log):
    """Lines that engines have answered, by their logs: one for each request."""
    logged = [one for one in log.read_text().splitlines() if one.startswith("{")]
    return sum(json.loads(one).get("status") == 200 for one in logged)


def check_all(path, asked, kept):
    lines = whole_lines(path)
    found = {one["custom_id"]: one for one in map(json.loads, lines)}
    assert len(lines) == len(found) == len(asked)
    assert kept <= set(lines), "a line that had been received was computed again"
    right = 0
    for number, question in enumerate(asked):
        one = found[f"q{number}"]
        assert one["error"] is None
        right += one["response"]["body"]["choices"][0]["message"]["content"] == answer(question)
    assert right >= 0.97 * len(asked)


def test_a_batch_killed_three_times_answers_every_line_once(tmp_path):
    asked = write_questions(tmp_path / "in.jsonl", 400)
    out, log, rng = tmp_path / "out.jsonl", tmp_path / "log", random.Random()
    command = [sys.executable, "-m", "deployments.batch", "-i", tmp_path / "in.jsonl", "-o", out]
    kept, num_kills = set(), 3
    with log.open("a") as stderr:
        for _ in range(num_kills):
            target = len(whole_lines(out)) + rng.randrange(1, 50)
            batch = subprocess.Popen([*command, *ENGINE], stderr=stderr, stdout=subprocess.DEVNULL)
            wait_for(lambda target=target: len(whole_lines(out)) >= target, batch)
            time.sleep(rng.random() * 0.05)
            batch.send_signal(signal.SIGKILL)
            batch.wait()
            kept |= set(whole_lines(out))
        last = subprocess.run(
            [*command, *ENGINE],
            stderr=stderr,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=LIMIT_S,
        )
    check_all(out, asked, kept)
    assert len(asked) <= num_computed(log) <= len(asked) + num_kills * CONCURRENCY
    assert f"{len(asked) - len(kept)} lines in " in last.stdout
    assert f"{len(kept)} were done before" in last.stdout


def test_a_batch_that_is_told_to_stop_says_that_it_can_go_on(tmp_path):
    write_questions(tmp_path / "in.jsonl", 400)
    out = tmp_path / "out.jsonl"
    batch = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "deployments.batch",
            "-i",
            tmp_path / "in.jsonl",
            "-o",
            out,
            *ENGINE,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    wait_for(lambda: len(whole_lines(out)) >= 3, batch)
    batch.send_signal(signal.SIGTERM)
    said, _ = batch.communicate(timeout=LIMIT_S)
    assert batch.returncode == 1
    assert said.endswith("lockstep: stopped; the same command goes on from here\n")
    assert b"".join(whole_lines(out)) == out.read_bytes()


@pytest.fixture
def ray_environment():
    """A Ray cluster of its own that takes jobs; gone afterwards. Gives what `ray job` needs."""
    tools = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    folder = TemporaryDirectory(prefix="lsray", dir="/tmp", ignore_cleanup_errors=True)
    with own_ports() as ports, folder:
        head = subprocess.Popen(
            [
                *("ray", "start", "--head", "--block", "--num-cpus=4", f"--port={ports.gcs}"),
                *("--include-dashboard=true", "--dashboard-host=127.0.0.1"),
                f"--dashboard-port={ports.dashboard}",
                f"--dashboard-agent-listen-port={ports.agent}",
                *("--node-ip-address=127.0.0.1", f"--temp-dir={folder.name}"),
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{ports.dashboard}"}
        finally:
            head.terminate()
            head.wait(LIMIT_S)


def ray_job(environment, *words):
    command = ["ray", "job", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


def pids_of(path):
    """Processes whose command line names the file: the batch, wherever Ray has put it."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if b"deployments.batch" in words and str(path).encode() in words:
            found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_ray_job_killed_five_times_answers_a_thousand_lines(tmp_path, ray_environment):
    asked = write_questions(tmp_path / "in.jsonl", 1000)
    out, rng = tmp_path / "out.jsonl", random.Random()
    log, kept, num_kills = tmp_path / "log", set(), 5
    words = ["python", "-m", "deployments.batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(out)]
    command = [*words, *ENGINE, "--tp-size", "2"]
    deadline = time.monotonic() + 60
    while ray_job(ray_environment, "list").returncode:
        assert time.monotonic() < deadline, "the job API did not come up"
        time.sleep(1)
    for number in range(num_kills + 1):
        job = f"batch-{number}"
        target = len(whole_lines(out)) + rng.randrange(20, 160)
        submitted = ray_job(
            ray_environment,
            *("submit", "--no-wait", "--submission-id", job, "--working-dir", str(ROOT)),
            *("--runtime-env-json", json.dumps({"excludes": [".git", ".venv", "shared"]})),
            *("--", "bash", "-c", f"{shlex.join(command)} 2>>{log}"),
        )
        assert submitted.returncode == 0, submitted.stderr
        if number == num_kills:
            break
        wait_until(lambda target=target: len(whole_lines(out)) >= target, ray_environment, job)
        for pid in pids_of(out):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not pids_of(out), ray_environment, job)
        kept |= set(whole_lines(out))
    wait_until(
        lambda: f"{job}' succeeded" in ray_job(ray_environment, "status", job).stdout,
        ray_environment,
        job,
    )
    check_all(out, asked, kept)
    assert len(asked) <= num_computed(log) <= len(asked) + num_kills * CONCURRENCY
    logs = ray_job(ray_environment, "logs", job).stdout
    assert f"{len(asked) - len(kept)} lines in " in logs


def wait_until(condition, environment, job, timeout_s=240):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited too long: {ray_job(environment, 'logs', job).stdout[-3000:]}")
        time.sleep(0.05)
