"""The files in examples/: deployed with Serve's own commands, as their comments say."""

import re
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from deployments.config import ServiceConfig
from tests.e2e.conftest import LIMIT_S
from tests.e2e.nodes import ROOT, network, refusal

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
EXPORT_AND_TOKEN = (
    "export RAY_SERVE_ENABLE_HA_PROXY=1 RAY_AUTH_MODE=token",
    "ray get-auth-token --generate > /dev/null",
)
TOKEN = "0123456789abcdef" * 4


def commands(example):
    """What its comment says to type."""
    return re.findall(r"^#   (\S.*)$", example.read_text(), re.M)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_settings_of_an_example_are_ones_that_there_are(example):
    (application,) = yaml.safe_load(example.read_text())["applications"]
    assert application["import_path"] == "deployments.app:build_app"
    config = ServiceConfig.from_args(application["args"])
    assert config.engine.ranks_per_node * config.engine.num_nodes == config.engine.layout.world_size


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_the_settings_before_ray_starts(example):
    export, token, *rest = commands(example)
    assert (export, token) == EXPORT_AND_TOKEN
    assert any(line.startswith("ray start --head") for line in rest)
    assert f"serve deploy examples/{example.name}" in rest


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A namespace as a newcomer's machine: nothing is exported, an earlier Ray left a token."""
    if refusal():
        pytest.skip(refusal())
    for name in ("RAY_AUTH_MODE", "RAY_SERVE_ENABLE_HA_PROXY"):
        monkeypatch.delenv(name)
    with network(1) as (host,):
        host.settings["HOME"] = str(tmp_path)
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text(TOKEN)
        yield host


def test_an_example_is_deployed_answers_and_leaves_nothing_behind(node):
    export, token, start, deploy, _ = commands(ROOT / "examples/cpu.yaml")
    node.settings |= dict(word.split("=") for word in export.split()[1:])
    node.run("bash", "-c", token)
    node.start_head(*start.removeprefix("ray start --head").split(), dashboard=True)
    node.await_up(dashboard=True)
    node.run(*deploy.split())
    wait_for(lambda: application(node).get("status") not in (None, "NOT_STARTED", "DEPLOYING"))
    told = yaml.safe_load(node.run("serve", "status"))["applications"]["lockstep"]
    assert told["status"] == "RUNNING", told
    assert {one["status"] for one in told["deployments"].values()} == {"HEALTHY"}
    chat = (sys.executable, "-m", "deployments.cli", "chat", "What is 128+305?")
    assert node.run(*chat, "--url", "http://127.0.0.1:8000").strip() == "433"
    assert len(ranks(node)) == 4, "two ranks, and a zygote of each"
    files, folders = shared_files(node), socket_folders(node)
    assert folders, "the driver has no sockets"

    node.run("serve", "shutdown", "-y")
    wait_for(lambda: application(node) == {})
    wait_for(lambda: ranks(node) == [])
    wait_for(lambda: {group["state"] for group in groups(node)} <= {"REMOVED"})
    wait_for(lambda: listening(node).isdisjoint({8000, 9464}))
    assert not [path for path in files | folders if Path(path).exists()]


def application(node):
    """What Serve says of ours; empty if there is none."""
    return asked(node, "/api/serve/applications/")["applications"].get("lockstep", {})


def groups(node):
    return asked(node, "/api/v0/placement_groups?detail=1")["data"]["result"]["result"]


def asked(node, path):
    """What Ray's dashboard answers to those who have the token."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    found = httpx.get(f"{node.dashboard}{path}", headers=headers, timeout=LIMIT_S)
    return found.raise_for_status().json()


def ranks(node):
    """Processes that hold a rank, or fork them."""
    return [pid for pid in node.pids() if "workers.zygote" in read(pid, "cmdline")]


def shared_files(node):
    """Files in /dev/shm that a rank or its zygote has mapped."""
    maps = "".join(read(pid, "maps") for pid in ranks(node))
    return set(re.findall(r"/dev/shm/\S+", maps))


def socket_folders(node):
    """Where the driver keeps its Unix sockets."""
    return set(re.findall(r"(/\S*/lockstep-\w+)/", read(node.pids()[0], "net/unix")))


def listening(node):
    """Ports of the node that somebody listens on."""
    tables = read(node.pids()[0], "net/tcp") + read(node.pids()[0], "net/tcp6")
    return {int(port, 16) for port in re.findall(r"^ *\d+: \w+:(\w+) \w+:\w+ 0A", tables, re.M)}


def read(pid, name):
    """A file of a process in /proc; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def wait_for(condition, timeout_s=LIMIT_S):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {timeout_s} s"
        time.sleep(0.2)
