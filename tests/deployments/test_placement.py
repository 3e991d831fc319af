"""Where ranks go, without a cluster."""

import pytest

from deployments.errors import ClusterError, ClusterTooSmall, TooFewNodes
from deployments.placement import (
    Need,
    NodeFree,
    Seat,
    choose_device,
    gpu_indices,
    seating,
    told_in_words,
)
from workers.config import EngineConfig


def need(num_nodes, ranks_per_node, gpus=1):
    return Need(
        num_nodes=num_nodes, ranks_per_node=ranks_per_node, gpus_per_rank=gpus, cpus_per_rank=0.1
    )


def nodes(*gpus):
    return [NodeFree(f"10.0.0.{i}", gpus=free, cpus=8) for i, free in enumerate(gpus)]


def seat(ray_gpu, uuids, node="a"):
    return Seat(node, "10.0.0.1", 1, ray_gpu, tuple(uuids))


def test_a_node_gets_one_bundle_with_room_for_all_its_ranks():
    config = EngineConfig(tp_size=4, dp_size=2, num_nodes=2)
    assert Need.of(config, "cuda", 0.5).bundles() == [{"CPU": 2.0, "GPU": 4}] * 2
    assert Need.of(config, "cpu", 0.1).bundles() == [{"CPU": 0.4}] * 2


def test_one_node_is_packed_and_several_are_spread():
    assert need(1, 4).strategy == "STRICT_PACK"
    assert need(2, 4).strategy == "STRICT_SPREAD"


def test_nodes_can_be_done_without():
    assert need(2, 4).selectors([]) == [{}, {}]
    assert need(2, 4).selectors(["b", "a"]) == [{"ray.io/node-id": "!in(a,b)"}] * 2


def test_nothing_is_missing_where_it_fits():
    assert need(2, 4).shortage(nodes(4, 8)) is None


@pytest.mark.parametrize(
    ("nodes", "sentence"),
    [
        ("a", "rank 0 on 10.0.0.97"),
        ("aaaa", "ranks 0-3 on 10.0.0.97"),
        ("bbaa", "ranks 0-1 on 10.0.0.98, 2-3 on 10.0.0.97"),
        ("bac", "ranks 0 on 10.0.0.98, 1 on 10.0.0.97, 2 on 10.0.0.99"),
    ],
)
def test_where_the_ranks_are_is_one_line(nodes, sentence):
    seats = [Seat(node, f"10.0.0.{ord(node)}", 1, None, ()) for node in nodes]
    assert told_in_words(seats) == sentence


@pytest.mark.parametrize(
    ("wanted", "free", "error", "sentence"),
    [
        (
            need(1, 4), (2, 1), ClusterTooSmall,
            "needs 4 GPUs on one node; the largest node has 2 free",
        ),
        (need(1, 1), (), ClusterTooSmall, "needs 1 GPU on one node; the largest node has 0 free"),
        (
            need(2, 4), (4, 2), TooFewNodes,
            "needs 4 GPUs on each of 2 nodes; 1 node has them free",
        ),
        (
            need(3, 2, gpus=0), (0, 0), TooFewNodes,
            "needs 0.2 CPUs on each of 3 nodes; 2 nodes have them free",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_one_sentence(wanted, free, error, sentence):
    missing = wanted.shortage(nodes(*free))
    assert type(missing) is error
    assert str(missing) == sentence


@pytest.mark.parametrize(
    ("device", "num_gpus", "chosen"),
    [("auto", 4, "cuda"), ("auto", 3, "cpu"), ("cpu", 8, "cpu"), ("cuda", 0, "cuda")],
)
def test_auto_takes_gpus_where_there_are_enough(device, num_gpus, chosen):
    assert choose_device(EngineConfig(tp_size=4, device=device), num_gpus) == chosen


@pytest.mark.row("C4")
def test_neighbours_share_a_node_and_the_drivers_node_is_first():
    assert seating(["n2", "n0", "n1"], driver_node="n1", ranks_per_node=2) == [2, 2, 1, 1, 0, 0]


def test_the_order_of_nodes_does_not_depend_on_the_order_of_bundles():
    first = ["n2", "n0"]
    second = ["n0", "n2"]
    by_node = [
        [bundles[i] for i in seating(bundles, driver_node="elsewhere", ranks_per_node=1)]
        for bundles in (first, second)
    ]
    assert by_node == [["n0", "n2"], ["n0", "n2"]]


def test_rays_choice_of_gpu_holds():
    seats = [seat(index, "ABCD") for index in (2, 0, 3, 1)]
    assert gpu_indices(seats) == [2, 0, 3, 1]


def test_a_rank_that_sees_one_gpu_takes_it():
    assert gpu_indices([seat(0, "A"), seat(1, "B")]) == [0, 0]


def test_two_ray_nodes_on_one_machine_take_gpus_in_turn():
    seats = [seat(0, "AB", node="a"), seat(0, "AB", node="b")]
    assert gpu_indices(seats) == [0, 1]


def test_equal_indices_on_two_machines_are_no_clash():
    assert gpu_indices([seat(0, "AB", node="a"), seat(0, "CD", node="b")]) == [0, 0]


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(ClusterError, match=r"2 ranks were placed on one machine .* sees 1 GPU"):
        gpu_indices([seat(0, "A"), seat(0, "A")])


def test_a_clash_that_turns_cannot_settle_is_refused():
    with pytest.raises(ClusterError, match="two ranks would share a GPU"):
        gpu_indices([seat(0, "AB"), seat(0, "AC")])
