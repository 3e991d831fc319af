"""How ranks of a domain find each other, in one process where that is enough."""

import multiprocessing
import socket

import msgspec
import pytest
import torch

from parallel.collectives import all_reduce
from workers.config import EngineConfig
from workers.protocol import Start
from workers.rendezvous import Rendezvous, RendezvousError, interface_of, listen
from workers.spec import WorkerSpec

CONFIG = EngineConfig(tp_size=2, dp_size=2, device="cpu", step_timeout_s=20.0)


def spec(rank, *, epoch=3, config=CONFIG):
    return WorkerSpec(
        epoch=epoch, rank=rank, config=config, token="ab" * 16, ipc_address="", runner="none:none"
    )


def listening_addresses(port):
    """Local addresses, in hexadecimal, of sockets that listen on `port`."""
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return [
        row[1].split(":")[0]
        for row in rows
        if row[3] == "0A" and int(row[1].split(":")[1], 16) == port
    ]


def test_the_first_rank_of_each_domain_listens_on_its_nodes_address_alone():
    ports = []
    for rank in range(4):
        rendezvous = Rendezvous(spec(rank))
        ports.append(rendezvous.port)
        if rendezvous.port:
            assert listening_addresses(rendezvous.port) == ["0100007F"]  # 127.0.0.1
        rendezvous.close()
    assert [bool(port) for port in ports] == [True, False, True, False]


def test_two_listeners_never_have_one_port():
    listeners = [listen("127.0.0.1") for _ in range(50)]
    assert len({each.getsockname()[1] for each in listeners}) == 50
    for each in listeners:
        each.close()


def test_a_rank_alone_needs_no_port():
    config = EngineConfig(device="cpu")
    rendezvous = Rendezvous(spec(0, config=config))
    assert rendezvous.port == 0
    assert rendezvous.join(Start(3, "", 0)).tp.size == 1
    rendezvous.close()


def test_a_start_of_another_epoch_is_refused():
    rendezvous = Rendezvous(spec(1))
    with pytest.raises(RendezvousError, match="rank 1 of epoch 3 was asked into epoch 4"):
        rendezvous.join(Start(4, "127.0.0.1", 1))


def join_and_sum(rank, pipe, joining):
    """In a process: joins, sums its rank plus one over the domain, says what came out."""
    rendezvous = Rendezvous(joining)
    pipe.send(rendezvous.port)
    start = pipe.recv()
    try:
        groups = rendezvous.join(start)
    except RendezvousError as error:
        pipe.send(str(error))
        return
    x = torch.tensor([float(rank + 1)])
    pipe.send((all_reduce(x, groups.tp).item(), listening_addresses(start.store_port)))
    pipe.recv()
    rendezvous.close()


@pytest.fixture
def spawn():
    processes = []
    forking = multiprocessing.get_context("spawn")

    def start(rank, joining):
        ours, theirs = forking.Pipe()
        process = forking.Process(target=join_and_sum, args=(rank, theirs, joining), daemon=True)
        process.start()
        processes.append(process)
        return ours

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_ranks_join_and_one_of_an_old_epoch_is_refused(spawn):
    pipes = [spawn(rank, spec(rank)) for rank in (0, 1)]
    stale = spawn(1, msgspec.structs.replace(spec(1), epoch=2))
    port = pipes[0].recv()
    assert (port > 0, pipes[1].recv(), stale.recv()) == (True, 0, 0)
    for pipe in pipes:
        pipe.send(Start(3, "127.0.0.1", port))
    assert pipes[0].recv() == (3.0, ["0100007F"])
    assert pipes[1].recv()[0] == 3.0
    stale.send(Start(2, "127.0.0.1", port))
    assert stale.recv() == (
        f"the store at 127.0.0.1:{port} is of epoch 3; rank 1 is of epoch 2 and has been left "
        "behind"
    )
    for pipe in pipes:
        pipe.send("go")


def test_the_interface_of_an_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") == "lo"
    assert interface_of("127.0.0.1") in [name for _, name in socket.if_nameindex()]
