"""Ranks that really run: as forks, as a thread, as Ray actors. The runner in them is a fake."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import ray
import zmq
from ray.util import placement_group_table

from deployments import ray_fleet
from deployments.errors import ClusterError, ClusterTooSmall
from deployments.fleet import LocalFleet
from deployments.ray_fleet import RayFleet
from deployments.sockets import Gate, IpcFolder
from deployments.worker_link import WorkerLink
from tests.workers.fakes import FAKE_RUNNER, TinyDriver
from workers.config import EngineConfig, Failpoint
from workers.protocol import STEP, Ack, Failed

FOUR_RANKS = EngineConfig(tp_size=2, dp_size=2, device="cpu", beat_ms=50, step_timeout_s=30.0)
TWO_RANKS = EngineConfig(tp_size=2, device="cpu", beat_ms=50, step_timeout_s=30.0)
ONE_RANK = EngineConfig(device="cpu", beat_ms=50)


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def folder():
    folder = IpcFolder()
    yield folder.path
    folder.close()


@pytest.fixture(scope="module")
def shared_fleet():
    """One zygote for the module: a gang costs a fork."""
    fleet = LocalFleet()
    yield fleet
    fleet.stop()


@pytest.fixture
def local(shared_fleet):
    yield shared_fleet
    shared_fleet.kill()


@pytest.fixture
def launch(context, folder):
    """Starts an epoch on a fleet; its driver, which has not shaken hands yet."""
    links = []

    def start(fleet, config, *, epoch=1, failpoints=(), gate=None):
        link = WorkerLink(context, epoch=epoch, config=config, ipc_folder=folder, gate=gate)
        links.append(link)
        fleet.start(link.specs(failpoints=failpoints, runner=FAKE_RUNNER))
        return TinyDriver(link, config, epoch=epoch)

    yield start
    for link in links:
        link.close()


def one_death(fleet, timeout_s=60.0):
    """The first deaths that `wake` announces, and how long that took."""
    began = time.monotonic()
    poller = zmq.Poller()
    poller.register(fleet.wake, zmq.POLLIN)
    while time.monotonic() - began < timeout_s:
        if poller.poll(100) and (deaths := fleet.deaths()):
            return deaths, time.monotonic() - began
    return [], timeout_s


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_four_ranks_shake_hands_and_do_fifty_steps(local, launch):
    driver = launch(local, FOUR_RANKS)
    hellos = driver.handshake()
    assert [bool(hellos[rank].store_port) for rank in range(4)] == [True, False, True, False]
    for _ in range(50):
        driver.run_step(0)
        driver.run_step(1)
    assert local.deaths() == []
    local.kill()
    assert not any(is_running(hello.pid) for hello in hellos.values())


def test_the_next_epoch_is_a_fork_away(local, launch):
    zygote = parent_of(launch(local, FOUR_RANKS).handshake()[0].pid)
    local.kill()
    driver = launch(local, FOUR_RANKS, epoch=2)
    assert parent_of(driver.hellos()[0].pid) == zygote
    assert local.deaths() == []


def test_domains_are_steps_apart(local, launch):
    driver = launch(local, FOUR_RANKS)
    driver.handshake()
    for _ in range(5):
        driver.run_step(1)
    driver.run_step(0)
    assert driver.step == [1, 5]


def test_two_steps_may_be_in_flight(local, launch):
    driver = launch(local, TWO_RANKS)
    driver.handshake()
    headers = [driver.send_step() for _ in range(4)]
    acks = [ack for rank, ack in driver.collect(Ack, 8) if rank == 0]
    assert [(ack.step, ack.header) for ack in acks] == list(enumerate(headers))


def test_a_killed_rank_is_named_at_once(local, launch):
    driver = launch(local, FOUR_RANKS)
    pid = driver.handshake()[1].pid
    os.kill(pid, signal.SIGKILL)
    deaths, seconds = one_death(local)
    assert [tuple(death) for death in deaths] == [
        (1, f"rank 1 (pid {pid} on 127.0.0.1) died: signal SIGKILL")
    ]
    assert seconds < 2.0  # 0.01 s on an idle machine


def test_a_stopped_rank_stops_beating_and_the_others_go_on(local, launch):
    driver = launch(local, FOUR_RANKS)
    pid = driver.handshake()[2].pid
    os.kill(pid, signal.SIGSTOP)

    def beats_while_the_others_beat(num):
        seen = dict.fromkeys(range(4), 0)
        while min(seen[rank] for rank in (0, 1, 3)) < num:  # the test's timeout bounds it
            seen = {rank: seen[rank] + more for rank, more in driver.beats_of(0.1).items()}
        return seen[2]

    beats_while_the_others_beat(2)  # what was on its way is here
    assert beats_while_the_others_beat(4) == 0
    local.kill()
    assert not is_running(pid)


def test_a_rank_that_fails_says_why(local, launch):
    plan = Failpoint(action="raise", rank=0, step=2)
    driver = launch(local, TWO_RANKS, failpoints=[plan])
    driver.handshake()
    driver.run_step()
    driver.run_step()
    driver.send_step()
    [(rank, failed)] = driver.collect(Failed, 1, fatal=False)
    assert (rank, failed.reason) == (0, "PlantedFault: the failpoint of step 2 was reached")
    [death], _ = one_death(local)
    assert death.rank == 0
    assert "died: exit code 1; its last output:" in death.sentence
    assert "PlantedFault" in death.sentence


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"previous": b"x" * 16}, "whose header follows another header than the one of step 0"),
        ({"step": 3}, "got step 3 after step 0: one was lost, or came twice"),
        ({"step": 0}, "got step 0 after step 0"),
        ({"epoch": 7}, "of epoch 1 got a step of epoch 7"),
        ({"bodies": (b"x" * 16,)}, "got a body in step 1 that is not the one its header names"),
        ({"bodies": ()}, "none for replica 0 of rank 0"),
    ],
    ids=["other past", "skipped", "twice", "other epoch", "other body", "no body"],
)
def test_a_step_that_does_not_follow_is_refused(local, launch, changed, reason):
    driver = launch(local, TWO_RANKS)
    driver.handshake()
    driver.run_step()
    driver.link.send(0, STEP, *driver.plan(**changed))
    [(rank, failed)] = driver.collect(Failed, 1, fatal=False)
    assert rank == 0
    assert reason in failed.reason
    assert not [message for _, message in driver.inbox if isinstance(message, Ack)]


def test_a_corrupt_token_shows_in_the_acks(local, launch):
    driver = launch(local, TWO_RANKS, failpoints=[Failpoint(action="corrupt_ids", rank=1, step=1)])
    driver.handshake()
    driver.run_step()
    driver.send_step()
    first, second = (ack.ids for _, ack in sorted(driver.collect(Ack, 2)))
    assert first != second


def test_a_skipped_step_is_not_acked_and_the_next_one_is(local, launch):
    # Neither rank may wait for the other in a collective, so both skip.
    plans = [Failpoint(action="skip_step", rank=rank, step=1) for rank in (0, 1)]
    driver = launch(local, TWO_RANKS, failpoints=plans)
    driver.handshake()
    driver.run_step()
    driver.send_step()
    driver.send_step()
    assert [ack.step for _, ack in driver.collect(Ack, 2)] == [2, 2]


def test_a_skipped_collective_leaves_the_peer_to_its_timeout(local, launch):
    config = EngineConfig(
        tp_size=2, device="cpu", beat_ms=50, step_timeout_s=1.0, all_reduce="nccl"
    )
    driver = launch(local, config, failpoints=[Failpoint("skip_collective", rank=1, step=0)])
    driver.handshake()
    driver.send_step()
    [(rank, _)] = driver.collect(Failed, 1, fatal=False)
    assert rank == 0


def environment_of(pid):
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)


@pytest.mark.parametrize(("chosen", "there"), [(None, "1"), ("0", "0")])
def test_torchs_multicast_is_off_in_ranks_unless_the_operator_has_it_on(
    launch, monkeypatch, chosen, there
):
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(name, chosen)
    fleet = LocalFleet()
    hellos = launch(fleet, TWO_RANKS).handshake()
    found = [environment_of(hello.pid).get(name) for hello in hellos.values()]
    fleet.stop()
    assert found == [there] * 2


def test_a_runner_that_cannot_be_imported_is_one_sentence(context, folder):
    link = WorkerLink(context, epoch=1, config=ONE_RANK, ipc_folder=folder)
    fleet = LocalFleet()
    with pytest.raises(ClusterError, match=r"No module named 'tests\.workers\.nothing'"):
        fleet.start(link.specs(runner="tests.workers.nothing:Runner"))
    assert fleet.deaths() == []
    fleet.stop()
    link.close()


def test_more_gpus_than_there_are_is_refused(context, folder, monkeypatch):
    config = EngineConfig(tp_size=4, device="cuda")
    link = WorkerLink(context, epoch=1, config=config, ipc_folder=folder)
    fleet = LocalFleet()
    monkeypatch.setattr("deployments.fleet.count_local_gpus", lambda: 2)
    with pytest.raises(ClusterTooSmall, match="needs 4 GPUs on one node; the largest node has 2"):
        fleet.start(link.specs())
    fleet.stop()
    link.close()


def test_one_rank_may_be_a_thread(launch):
    fleet = LocalFleet(in_process=True)
    num_threads = threading.active_count()
    driver = launch(fleet, ONE_RANK)
    assert driver.handshake()[0].pid == os.getpid()
    for _ in range(10):
        driver.run_step()
    fleet.kill()
    assert threading.active_count() == num_threads
    driver = launch(fleet, ONE_RANK, epoch=2, failpoints=[Failpoint("raise", 0, 1, epoch=2)])
    driver.handshake()
    driver.run_step()
    driver.send_step()
    deaths, _ = one_death(fleet)
    sentence = f"rank 0 (pid {os.getpid()} on 127.0.0.1) died: PlantedFault: the failpoint of step"
    assert deaths[0].sentence.startswith(sentence)
    fleet.stop()


ORPHANING_DRIVER = """
import sys, time
from pathlib import Path
import zmq
from deployments.fleet import LocalFleet
from deployments.worker_link import WorkerLink
from tests.workers.fakes import FAKE_RUNNER, TinyDriver
from workers.config import EngineConfig
config = EngineConfig(tp_size=2, device="cpu")
link = WorkerLink(zmq.Context(), epoch=1, config=config, ipc_folder=Path(sys.argv[1]))
fleet = LocalFleet()
fleet.start(link.specs(runner=FAKE_RUNNER))
print(*(hello.pid for hello in TinyDriver(link, config, epoch=1).handshake().values()), flush=True)
time.sleep(60)
"""


def test_no_rank_outlives_its_driver(folder):
    driver = subprocess.Popen(
        [sys.executable, "-c", ORPHANING_DRIVER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    with driver:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
        driver.kill()
    wait_for(lambda: not any(is_running(pid) for pid in pids))


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            _temp_dir=folder,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
        )
        yield
        ray.shutdown()


@pytest.fixture
def gate(context):
    gate = Gate(context)
    yield gate
    gate.close()


@pytest.fixture
def on_ray(cluster):
    fleet = RayFleet(cluster_wait_s=60)
    yield fleet
    fleet.stop()
    living = [table for table in placement_group_table().values() if table["state"] != "REMOVED"]
    assert living == []


def test_ranks_under_ray_step_and_are_back_after_a_fork(on_ray, launch, gate):
    driver = launch(on_ray, TWO_RANKS, gate=gate)
    hellos = driver.handshake()
    for _ in range(20):
        driver.run_step()
    os.kill(hellos[1].pid, signal.SIGKILL)
    [death], seconds = one_death(on_ray)
    node = hellos[1].node_ip
    assert death == (1, f"rank 1 (pid {hellos[1].pid} on {node}) died: signal SIGKILL")
    assert seconds < 2.0  # 0.03 s on an idle machine
    zygote = parent_of(hellos[0].pid)
    on_ray.kill()
    on_ray.kill()
    assert not is_running(hellos[0].pid)

    driver = launch(on_ray, TWO_RANKS, epoch=2, gate=gate)
    hellos = driver.handshake()
    assert parent_of(hellos[0].pid) == zygote  # 0.1 s on an idle machine; an actor takes seconds
    driver.run_step()
    os.kill(hellos[0].pid, signal.SIGSTOP)
    on_ray.kill()
    assert not any(is_running(hello.pid) for hello in hellos.values())
    assert on_ray.deaths() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_actor_takes_its_rank_along_and_is_replaced(on_ray, launch, gate, number):
    driver = launch(on_ray, ONE_RANK, gate=gate)
    pid = driver.handshake()[0].pid
    zygote = parent_of(pid)
    actor = parent_of(zygote)
    os.kill(actor, number)
    if number == signal.SIGKILL:
        [death], _ = one_death(on_ray)
        assert f"rank 0 (pid {pid} on " in death.sentence
        assert "died: its Ray actor is lost (" in death.sentence
    on_ray.kill()
    assert not is_running(pid)
    wait_for(lambda: not any(is_running(each) for each in (zygote, actor)))
    launch(on_ray, ONE_RANK, epoch=2, gate=gate).handshake()


def test_ranks_are_gone_before_a_stop_ends_the_actors_that_can_say_so(
    cluster, launch, gate, monkeypatch
):
    """An actor's end is told before what it has forked is gone."""
    fleet = RayFleet(cluster_wait_s=60)
    pid = launch(fleet, ONE_RANK, gate=gate).handshake()[0].pid
    left, end_actor = [], ray.kill

    def note_ranks(host, **options):
        left.append(is_running(pid))
        end_actor(host, **options)

    monkeypatch.setattr(ray_fleet.ray, "kill", note_ranks)
    fleet.stop()
    assert left == [False]


def test_what_does_not_end_in_time_is_named(monkeypatch, caplog):
    monkeypatch.setattr(ray_fleet.signal, "pidfd_send_signal", lambda pidfd, number: None)
    with subprocess.Popen(["sleep", "60"]) as process:
        there = ray_fleet.opened([("rank 3", process.pid), ("rank 4", 2**30)])
        ray_fleet.await_ends(there, time.monotonic() + 0.1)
        process.kill()
    [line] = caplog.messages
    assert line.startswith(f"rank 3 (pid {process.pid}) did not end in time")


def test_a_start_that_fails_half_way_leaves_nothing(on_ray, context, folder):
    link = WorkerLink(context, epoch=1, config=ONE_RANK, ipc_folder=folder)
    with pytest.raises(ClusterError, match=r"^a rank could not be started: .*'tests\.workers\.no"):
        on_ray.start(link.specs(runner="tests.workers.nothing:Runner"))
    assert all(table["state"] == "REMOVED" for table in placement_group_table().values())
    link.close()


def test_a_cluster_that_stays_too_small_is_named_and_nothing_is_left(cluster, launch):
    told = []
    fleet = RayFleet(cluster_wait_s=2.2, cpus_per_rank=3, progress=told.append)
    sentence = "needs 6 CPUs on one node; the largest node has 2 free"
    wait_for(lambda: ray.available_resources().get("CPU") == 2)  # the last test's are free again
    began = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        launch(fleet, TWO_RANKS)
    assert str(caught.value) == (
        f"{sentence}; gave up after 2.2 s (cluster_wait_s): "
        "add a larger node, or lower tp_size or dp_size"
    )
    assert told == [sentence], "not once a second"
    assert 2.2 <= time.monotonic() - began < 20
    fleet.stop()
    assert all(table["state"] == "REMOVED" for table in placement_group_table().values())
