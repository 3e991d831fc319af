"""Several nodes on one machine: a raylet in each network namespace, with an address of its own.

    with network(3) as hosts:
        hosts[0].start_head(); hosts[1].join(hosts[0]); ...
        hosts[1].kill()                     # the node is lost, with all that runs on it

The namespaces hang on a bridge, so this process reaches every node by its address; what is on one
node reaches another only over the bridge. Everything a node runs is in its namespace, which is how
it is found and ended, by pid. Needs root and `ip`; `refusal()` says what is missing.
"""

import contextlib
import functools
import ipaddress
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.e2e.ports import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent
GCS, DASHBOARD = 6379, 8265
ESTABLISHED = "01"


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=60)


@functools.cache
def refusal():
    """Why this machine cannot have namespaces; empty if it can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    for tool in ("ip", "nsenter"):
        if shutil.which(tool) is None:
            return f"namespaces need `{tool}`, which is not installed"
    try:
        with network(1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"namespaces cannot be made here: {error.stderr.strip()}"


@contextlib.contextmanager
def network(num):
    """A bridge and `num` namespaces on it; gone afterwards, with every process inside."""
    mark = secrets.token_hex(3)
    bridge = f"ls{mark}"
    with contextlib.ExitStack() as stack:
        folder = TemporaryDirectory(prefix="lsnet", dir="/tmp", ignore_cleanup_errors=True)
        stack.enter_context(folder)
        ip("link", "add", bridge, "type", "bridge")
        stack.callback(ip, "link", "del", bridge)
        net = free_net()
        ip("address", "add", f"{net[1]}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        hosts = []
        for number in range(num):
            name, veth = f"ls{mark}-{number}", f"ls{mark}v{number}"
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", name)
            # NOTE: connections that were cut keep their namespace for a while, and it its links.
            stack.callback(ip, "link", "del", veth)
            host = Host(name, str(net[2 + number]), veth, Path(folder.name, str(number)))
            stack.callback(host.kill)
            ip("link", "set", veth, "master", bridge, "up")
            for words in (
                ("address", "add", f"{host.ip}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
                ("route", "add", "default", "via", str(net[1])),
                *(("route", "add", "unreachable", server) for server in nameservers()),
            ):
                ip("-n", name, *words)
            hosts.append(host)
        yield hosts


def free_net():
    """A /24 that no route of this machine speaks of."""
    shown = subprocess.run(["ip", "route"], check=True, capture_output=True, text=True, timeout=60)
    first = [line.split()[0] for line in shown.stdout.splitlines()]
    taken = [ipaddress.ip_network(word) for word in first if word[0].isdigit()]
    while True:
        net = ipaddress.ip_network(
            f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}.0/24"
        )
        if not any(net.overlaps(one) for one in taken):
            return net


def nameservers():
    """Addresses of this machine's, which a namespace does not reach: a question that nobody answers
    is given up after ten seconds, one that cannot be sent at once."""
    file = Path("/etc/resolv.conf")
    lines = file.read_text().splitlines() if file.exists() else []
    words = {line.split()[1] for line in lines if line.startswith("nameserver ")}
    found = [ipaddress.ip_address(word) for word in sorted(words) if "%" not in word]
    return [str(one) for one in found if one.version == 4 and not one.is_loopback]


class Host:
    """A namespace, and the Ray node in it if one was started."""

    def __init__(self, name, ip, veth, folder):
        self.name, self.ip, self.folder = name, ip, folder
        self.settings = {}
        self._veth = veth
        self._raylet = None
        folder.mkdir()

    @property
    def address(self):
        """Of the cluster, if this is its first node."""
        return f"{self.ip}:{GCS}"

    @property
    def dashboard(self):
        return f"http://{self.ip}:{DASHBOARD}"

    def environment(self):
        """HAProxy's files are one a machine by default; a node here has its own.

        `settings` are what somebody has exported there.
        """
        haproxy = self.folder / "haproxy"
        return os.environ | {
            "PATH": f"{TOOLS}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{haproxy}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{haproxy}/admin.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{haproxy}",
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{haproxy}/state",
            **PATIENCE,
            **self.settings,
        }

    def command(self, *words):
        return ["nsenter", f"--net=/run/netns/{self.name}", *map(str, words)]

    def run(self, *words, timeout_s=600):
        """What a command says that runs on this node."""
        done = subprocess.run(
            self.command(*words),
            env=self.environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def start_head(self, *words, dashboard=False):
        """The first node; with `dashboard` it takes jobs and Serve's YAML over HTTP."""
        shown = (f"--include-dashboard={str(dashboard).lower()}", "--dashboard-host=0.0.0.0")
        self._start("--head", *shown, *words)
        self._await(lambda: is_listening(self.ip, GCS))

    def join(self, head, *words):
        """Become a node of `head`'s cluster; returns before it is one."""
        self._start(f"--address={head.address}", *words)

    def await_up(self, *, dashboard=False):
        self._await(lambda: "Ray runtime started" in self.said())
        if dashboard:
            self._await(lambda: is_listening(self.ip, DASHBOARD))

    def said(self):
        return (self.folder / "log").read_text()

    def _start(self, *words):
        # NOTE: its own folder: two nodes that start at once would choose the same socket names.
        small = ("--temp-dir", self.folder / "ray", "--object-store-memory=80000000")
        with (self.folder / "log").open("w") as log:
            self._raylet = subprocess.Popen(
                self.command(
                    "ray", "start", "--block", f"--node-ip-address={self.ip}", *small, *words
                ),
                env=self.environment(),
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def _await(self, condition, timeout_s=600):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self._raylet.poll() is None, self.said()[-2000:]
            assert time.monotonic() < deadline, f"not so after {timeout_s} s: {self.said()[-2000:]}"
            time.sleep(0.1)

    def pids(self):
        """All processes of this node."""
        shown = subprocess.run(
            ["ip", "netns", "pids", self.name],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return [int(word) for word in shown.stdout.split()]

    def kill(self):
        """The node is lost: its raylet and all that runs on it, at once."""
        deadline = time.monotonic() + 60
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, f"processes {pids} do not end"
            time.sleep(0.02)
        if self._raylet is not None:
            self._raylet.wait(60)

    def unplug(self):
        """The node is alone: nobody hears that anything has ended."""
        ip("link", "set", self._veth, "down")


def is_listening(address, port):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) == 0


def peers(pid):
    """(address, port) of all that a process has tcp connections to, but for itself."""
    owned = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            owned.add(os.readlink(fd))
    ours, theirs = set(), set()
    for table in ("tcp", "tcp6"):
        rows = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        for row in map(str.split, rows):
            if row[3] == ESTABLISHED and f"socket:[{row[9]}]" in owned:
                ours.add(end(row[1]))
                theirs.add(end(row[2]))
    return theirs - ours


def end(word):
    """One end of a connection: of its address, /proc/net has the last four bytes backwards."""
    address, _, port = word.partition(":")
    return str(ipaddress.ip_address(bytes.fromhex(address[-8:])[::-1])), int(port, 16)
