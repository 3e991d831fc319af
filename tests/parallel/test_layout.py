"""Every layout of up to 16 ranks, and the sentences for sizes that do not fit."""

from itertools import product

import pytest

from parallel.layout import GROUP_NAMES, Layout, LayoutError

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)


def try_layout(**sizes) -> Layout | None:
    try:
        return Layout(**sizes)
    except LayoutError:
        return None


def all_layouts() -> list[Layout]:
    """Those of up to 16 ranks that are not refused."""
    tried = (
        try_layout(
            tp_size=tp,
            dp_size=dp,
            enable_dp_attention=dp_attention,
            attn_cp_size=cp,
            ep_size=ep,
            moe_dp_size=moe_dp,
            moe_dense_tp_size=dense,
        )
        for tp in range(1, 17)
        for dp, cp, ep, moe_dp in product(SIZES, (1, 2, 4), SIZES, (1, 2))
        for dp_attention in (False, True)
        for dense in (None, 1)
        if (tp if dp_attention else tp * dp) <= 16
    )
    return [layout for layout in tried if layout is not None]


LAYOUTS = all_layouts()


def test_there_are_many():
    assert len(LAYOUTS) > 1000
    assert {layout.world_size for layout in LAYOUTS} == set(range(1, 17))


def test_the_groups_of_every_kind_partition_the_world():
    for layout in LAYOUTS:
        for name in GROUP_NAMES:
            groups = layout.groups(name)
            ranks = sorted(rank for members in groups for rank in members)
            assert ranks == list(range(layout.world_size)), (layout, name)
            assert len({len(members) for members in groups}) == 1, (layout, name)
            assert all(list(members) == sorted(members) for members in groups), (layout, name)
            assert list(groups) == sorted(groups), (layout, name)


def test_coordinates_are_places_in_groups():
    for layout in LAYOUTS:
        for name in ("tp", "attn_tp", "attn_dp", "attn_cp", "moe_tp", "moe_ep", "moe_dp"):
            for members in layout.groups(name):
                places = [getattr(layout.coordinates(rank), name) for rank in members]
                assert places == list(range(len(members))), (layout, name)


def test_members_of_a_group_differ_in_its_coordinate_only():
    attention = {"attn_tp", "attn_dp", "attn_cp"}
    experts = {"moe_tp", "moe_ep", "moe_dp"}
    for layout in LAYOUTS:
        for names in (attention, experts):
            for name in names:
                for members in layout.groups(name):
                    places = [layout.coordinates(rank)._asdict() for rank in members]
                    fixed = {"domain", *names} - {name}
                    others = {tuple(place[key] for key in sorted(fixed)) for place in places}
                    assert len(others) == 1, (layout, name)


def test_no_group_leaves_its_domain():
    for layout in LAYOUTS:
        for name in GROUP_NAMES:
            for members in layout.groups(name):
                assert len({layout.coordinates(rank).domain for rank in members}) == 1


def test_domains_and_replicas_cover_the_world():
    for layout in LAYOUTS:
        covered = [
            rank
            for domain in range(layout.num_domains)
            for replica in range(layout.num_replicas)
            for rank in layout.replica_ranks(domain, replica)
        ]
        assert covered == list(range(layout.world_size))
        for domain in range(layout.num_domains):
            for rank in layout.domain_ranks(domain):
                assert layout.coordinates(rank).domain == domain


def test_a_replicas_ranks_share_their_attention_dp_coordinate():
    for layout in LAYOUTS:
        for domain in range(layout.num_domains):
            for replica in range(layout.num_replicas):
                ranks = layout.replica_ranks(domain, replica)
                assert {layout.coordinates(rank).attn_dp for rank in ranks} == {replica}


def test_members_is_the_group_that_holds_the_rank():
    layout = Layout(tp_size=8, dp_size=2, enable_dp_attention=True, ep_size=4)
    for name in GROUP_NAMES:
        for rank in range(layout.world_size):
            assert rank in layout.members(name, rank)
            assert layout.members(name, rank) in layout.groups(name)


def test_a_group_spans_nodes_if_its_ranks_do():
    layout = Layout(tp_size=8, ranks_per_node=4)
    assert layout.spans_nodes(tuple(range(8)))
    assert not layout.spans_nodes((4, 5, 6, 7))
    assert not Layout(tp_size=8).spans_nodes(tuple(range(8)))


REFUSED = [
    (
        {"tp_size": 0},
        "tp_size=0 must be at least 1",
    ),
    (
        {"ep_size": -1},
        "ep_size=-1 must be at least 1",
    ),
    (
        {"pp_size": 2},
        "pp_size=2: pipeline parallelism is not offered; use tp_size, dp_size or ep_size to "
        "spread the model",
    ),
    (
        {"ranks_per_node": 0},
        "ranks_per_node=0 must be at least 1",
    ),
    (
        {"tp_size": 4, "attn_cp_size": 3},
        "tp_size=4 does not divide by attn_cp_size=3: attention gives every part the same number "
        "of ranks",
    ),
    (
        {"tp_size": 4, "dp_size": 8, "enable_dp_attention": True},
        "tp_size=4 does not divide by dp_size=8 x attn_cp_size=1: attention gives every part the "
        "same number of ranks",
    ),
    (
        {"tp_size": 4, "ep_size": 2, "moe_dp_size": 4},
        "tp_size=4 does not divide by ep_size=2 x moe_dp_size=4: experts give every part the same "
        "number of ranks",
    ),
    (
        {"tp_size": 8, "moe_dense_tp_size": 2},
        "moe_dense_tp_size=2 must be unset or one of [1, 8] (1, the attention-TP size or "
        "tp_size=8)",
    ),
]


@pytest.mark.parametrize(("sizes", "sentence"), REFUSED)
def test_sizes_that_do_not_fit_are_refused_with_a_sentence(sizes, sentence):
    with pytest.raises(LayoutError) as refusal:
        Layout(**sizes)
    assert str(refusal.value) == sentence


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(LayoutError, match="rank 4 is outside a world of 4"):
        Layout(tp_size=4).coordinates(4)
