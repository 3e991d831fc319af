"""One epoch's conversation, with a list for a socket and a number for a clock."""

import pytest

from deployments.gang import Gang, GangFailed
from deployments.grammar import State
from deployments.requests import Request
from parallel.padding_cost import PaddingCurves
from workers.architectures import plan_of
from workers.config import EngineConfig
from workers.protocol import (
    MASK,
    PROTOCOL_VERSION,
    STEP,
    Ack,
    Beat,
    Failed,
    Hello,
    Mask,
    Padding,
    Ready,
    Serve,
    Start,
    Started,
    decode_header,
    decode_mask,
    decode_to_worker,
    digest,
    pack,
)

CONFIG = EngineConfig(tp_size=2, dp_size=2, page_size=4, max_num_seqs=4, step_timeout_s=5.0)


class Wire:
    """What the gang has sent, by rank."""

    def __init__(self):
        self.sent = {}

    def send(self, rank, *frames):
        self.sent.setdefault(rank, []).append(frames)

    def last(self, rank):
        frames = self.sent[rank][-1]
        return decode_to_worker(frames[1]) if frames[0] != STEP else frames


def gang(config=CONFIG, epoch=1, lines=None):
    wire = Wire()
    said = [] if lines is None else lines
    return Gang(config, epoch=epoch, now=0.0, send=wire.send, on_progress=said.append), wire


def hello(rank, device="cpu", version=PROTOCOL_VERSION):
    return Hello(version, 1, rank, f"10.0.0.{rank}", 100 + rank, device, 7000 + rank)


def bring_up(
    config=CONFIG,
    pages=40,
    now=1.0,
    buckets=(),
    captured=(b"",) * 4,
    curves=(None,) * 4,
    lines=None,
    odd_plan=None,
):
    plan = plan_of(config).digest
    one, wire = gang(config, lines=lines)
    for rank in range(config.layout.world_size):
        one.on_message(rank, hello(rank), now)
    for rank in range(config.layout.world_size):
        told = (2, *buckets[: rank + 1]) if buckets else ()
        its_plan = b"other" if rank == odd_plan else plan
        num_pages, padding = pages + rank, curves[rank]
        ready = Ready(1, rank, num_pages, 100, 300, (2,), told, padding, its_plan)
        one.on_message(rank, ready, now)
    for rank in range(config.layout.world_size):
        one.on_message(rank, Started(1, rank, captured[rank]), now)
    return one, wire


def add(one, replica=0, max_tokens=5):
    request = Request(key=(b"a", replica), tokens=[5, 6], num_prompt=2, max_tokens=max_tokens)
    one.schedulers[replica].add(request)
    return request


def ack(wire, rank, tokens=(9,)):
    header = wire.last(rank)[1]
    return Ack(
        1,
        rank,
        decode_header(header).step,
        digest(header),
        digest(pack(tokens)),
        b"",
        0.01,
        pack(tokens),
    )


def test_each_domain_meets_at_its_first_rank():
    one, wire = gang()
    for rank in (3, 1, 0):
        one.on_message(rank, hello(rank), 0.0)
    assert wire.sent == {}
    one.on_message(2, hello(2), 0.0)
    assert wire.last(1) == Start(1, "10.0.0.0", 7000)
    assert wire.last(3) == Start(1, "10.0.0.2", 7002)


def test_all_replicas_get_as_many_pages_as_the_poorest_rank_has():
    one, wire = bring_up(pages=40)
    assert one.serving
    assert all(wire.last(rank) == Serve(1, 40) for rank in range(4))
    assert [s.pool.num_pages for s in one.schedulers] == [40, 40]


@pytest.mark.row("S14")
@pytest.mark.parametrize("rank", [0, 2, 3])
def test_a_rank_with_another_collective_plan_is_named_before_anything_is_run(rank):
    with pytest.raises(GangFailed, match=f"rank {rank} compiled another collective plan") as caught:
        bring_up(odd_plan=rank)
    assert caught.value.rank == rank


def test_a_cache_too_small_for_one_request_says_what_to_change():
    with pytest.raises(GangFailed, match="less than one request of max_model_len=100: lower"):
        bring_up(pages=20)


def test_only_the_domain_with_work_steps():
    one, wire = bring_up()
    add(one, replica=1)
    one.pump(2.0)
    assert [wire.sent[rank][-1][0] == STEP for rank in range(4)] == [False, False, True, True]


def test_tokens_come_out_when_all_ranks_of_the_domain_have_acknowledged():
    one, wire = bring_up()
    request = add(one, max_tokens=1)
    one.pump(2.0)
    assert one.on_message(0, ack(wire, 0), 2.1) == []
    done = one.on_message(1, ack(wire, 1), 2.1)
    assert done[0].accepted == [[(request, 0, 9)]]


def test_another_version_is_refused():
    one, _ = gang()
    with pytest.raises(GangFailed, match="rank 1 speaks protocol 99 and the driver"):
        one.on_message(1, hello(1, version=99), 0.0)


def test_a_gpu_given_twice_is_refused():
    one, _ = gang()
    for rank in range(3):
        one.on_message(rank, hello(rank, device=f"GPU-{rank}"), 0.0)
    with pytest.raises(GangFailed, match="ranks 1 and 3 were both given GPU GPU-1"):
        one.on_message(3, hello(3, device="GPU-1"), 0.0)


def test_a_failure_is_told_with_its_rank():
    one, _ = bring_up()
    with pytest.raises(GangFailed, match="rank 2 failed: out of memory") as caught:
        one.on_message(2, Failed(1, 2, "out of memory"), 2.0)
    assert caught.value.rank == 2


def test_a_silent_rank_is_named_after_eight_beats():
    one, _ = bring_up(now=1.0)
    for rank in (0, 1, 3):
        one.on_message(rank, Beat(1, rank, 0), 3.0)
    one.check(2.9)
    with pytest.raises(GangFailed) as caught:
        one.check(3.1)
    assert str(caught.value) == (
        "ranks [2], with all of node 10.0.0.2, have not been heard for 2.0 s "
        "(heartbeats are 250 ms apart)"
    )


def test_a_silent_rank_of_a_node_that_speaks_is_named_alone():
    one, _ = gang()
    for rank in range(4):
        said = Hello(PROTOCOL_VERSION, 1, rank, f"10.0.0.{rank // 2}", rank, "cpu", 0)
        one.on_message(rank, said, 1.0)
    assert one.nodes() == {"10.0.0.0": [0, 1], "10.0.0.1": [2, 3]}
    for rank in (0, 1, 3):
        one.on_message(rank, Beat(1, rank, 0), 20.0)
    with pytest.raises(GangFailed, match=r"ranks \[2\] have not been heard for 30.0 s"):
        one.check(32.0)


def beat_all(one, now, behind=()):
    for rank in range(4):
        one.on_message(rank, Beat(1, rank, -1 + (rank not in behind)), now)


def test_the_rank_that_has_not_begun_a_late_step_is_named():
    one, _ = bring_up(now=1.0)
    add(one)
    one.pump(2.0)
    beat_all(one, 6.9, behind=[1])
    one.check(6.9)
    beat_all(one, 7.1, behind=[1])
    with pytest.raises(GangFailed, match=r"ranks \[1\] have not begun step 0 within 5 s") as caught:
        one.check(7.1)
    assert caught.value.rank == 1
    assert (one.step_of(1), one.step_of(None)) == (0, 0)
    assert one.step_of(3) is None, "its domain has no step under way"


def test_a_late_step_that_all_have_begun_names_those_not_done():
    one, wire = bring_up(now=1.0)
    add(one, max_tokens=1)
    one.pump(2.0)
    one.on_message(1, ack(wire, 1), 2.5)
    beat_all(one, 7.1)
    with pytest.raises(GangFailed, match=r"ranks \[0\] have not finished step 0 within 5 s"):
        one.check(7.1)


def test_ranks_that_never_come_are_named():
    one, _ = gang(EngineConfig(tp_size=2, start_timeout_s=10.0))
    one.on_message(0, hello(0), 9.9)
    with pytest.raises(GangFailed, match=r"ranks \[1\] have not said Hello within 10 s"):
        one.check(10.1)


class AnyText:
    """A matcher that takes everything."""

    def accept(self, token):
        return State.OPEN


def test_a_mask_goes_to_the_ranks_of_its_replica_once_its_tokens_are_known():
    one, wire = bring_up()
    request = Request(key=(b"a", 0), tokens=[5, 6], num_prompt=2, max_tokens=5, matcher=AnyText())
    one.schedulers[1].add(request)
    one.pump(2.0)
    [due] = one.masks_due()
    assert (due.epoch, due.step, due.plan.masked_rows) == (1, 0, [0])
    assert one.masks_due() == []
    before = {rank: len(wire.sent[rank]) for rank in range(4)}
    one.send_mask(due, b"bits")
    assert {rank: len(wire.sent[rank]) - before[rank] for rank in range(4)} == {
        0: 0,
        1: 0,
        2: 1,
        3: 1,
    }
    kind, data = wire.sent[3][-1]
    assert kind == MASK
    assert decode_mask(data) == Mask(1, 0, pack([0]), b"bits")
    one.send_mask(due._replace(epoch=0), b"bits")
    assert len(wire.sent[3]) == before[3] + 1


def test_a_mask_that_never_comes_is_a_late_step():
    one, _ = bring_up(now=1.0)
    request = Request(key=(b"a", 0), tokens=[5, 6], num_prompt=2, max_tokens=5, matcher=AnyText())
    one.schedulers[0].add(request)
    one.pump(2.0)
    beat_all(one, 7.1)
    with pytest.raises(GangFailed, match=r"ranks \[0, 1\] have not finished step 0 within 5 s"):
        one.check(7.1)


def test_only_graphs_that_every_rank_captures_are_used():
    one, _ = bring_up(buckets=(4, 8, 16, 32))
    assert one.model.buckets == (2, 4)
    assert bring_up()[0].model.buckets == ()


@pytest.mark.row("S12")
def test_a_rank_that_captured_other_collectives_is_named_before_anything_is_replayed():
    config = EngineConfig(tp_size=4, dp_size=2, enable_dp_attention=True, page_size=4)
    shared, own = b"s" * 16, b"o" * 16
    fine = [shared + own, shared + own, shared + b"p" * 16, shared + b"p" * 16]
    assert bring_up(config, captured=fine)[0].serving
    other = [*fine[:3], b"t" * 16 + b"p" * 16]
    with pytest.raises(GangFailed, match=r"ranks \[3\] captured other collectives .* \[0, 1, 2\]"):
        bring_up(config, captured=other)
    other = [*fine[:3], shared + b"q" * 16]
    with pytest.raises(GangFailed, match=r"ranks \[3\] captured other collectives .* \[2\]: n"):
        bring_up(config, captured=other)


@pytest.mark.parametrize("stopped", [None, 0, 1])
def test_who_waits_for_a_silent_rank_is_not_accused_of_a_deadlock(stopped):
    """Two ranks say that they wait in different collectives; one is stopped then."""
    one, _ = bring_up()
    add(one)
    one.pump(1.0)
    waits = [(2, "all_gather", "tp"), (1, "all_reduce", "tp"), (0, "", ""), (0, "", "")]

    def beat_until(end):
        for tick in range(4, round(end * 4) + 1):
            for rank, wait in enumerate(waits):
                if rank != stopped or tick == 4:
                    one.on_message(rank, Beat(1, rank, 0, *wait), tick / 4)
            one.check(tick / 4)

    with pytest.raises(GangFailed) as failed:
        beat_until(6.0)
    if stopped is None:
        assert "left out a collective" in str(failed.value)
    else:
        assert failed.value.rank == stopped
        assert "have not been heard" in str(failed.value)


CURVES = PaddingCurves((4, 40), (9.0, 90.0), (1.0, 10.0), (6.0, 60.0), (0.0, 0.0))
SHARED = {
    "tp_size": 4,
    "dp_size": 2,
    "enable_dp_attention": True,
    "padding": "auto",
    "overlap": False,
}


@pytest.mark.row("S10")
@pytest.mark.parametrize(
    ("slow", "padding"),
    [
        (CURVES, Padding.SUM_SLOTS),
        (CURVES._replace(slots=(8.0, 80.0)), Padding.SUM_BUFFER),
        (CURVES._replace(slots=(99.0, 999.0), buffer=(99.0, 999.0)), Padding.MAX_LEN),
        (None, Padding.SUM_LEN),
    ],
)
def test_steps_are_padded_by_the_slowest_ranks_curves_and_one_line_tells_them(slow, padding):
    lines = []
    config = EngineConfig(**SHARED)
    one, wire = bring_up(config, curves=(CURVES, CURVES, slow, CURVES), lines=lines)
    request = Request(key=(b"a", 0), tokens=[5] * 6, num_prompt=6, max_tokens=2)
    one.schedulers[0].add(request)
    one.pump(2.0)
    header = decode_header(wire.last(0)[1])
    assert (header.num_rows, header.padding) == ((6, 0), padding)
    told = [line for line in lines if line.startswith("padding, ranks 0 to 3: ")]
    assert len(told) == (0 if slow is None else 1)
    if slow is not None:
        assert f"4 rows 9, {slow.slots[0]:.0f}, {slow.buffer[0]:.0f} + 0" in told[0]


@pytest.mark.row("S10")
def test_padding_that_is_set_is_what_headers_say():
    one, wire = bring_up(EngineConfig(**{**SHARED, "padding": "max_len"}))
    one.schedulers[0].add(Request(key=(b"a", 0), tokens=[5] * 6, num_prompt=6, max_tokens=2))
    one.pump(2.0)
    header = decode_header(wire.last(0)[1])
    assert (header.padding, header.padded_rows) == (Padding.MAX_LEN, (6, 6))


@pytest.mark.row("C5")
@pytest.mark.parametrize(
    ("interval", "rows"), [(0, [(5, 0), (5, 0), (2, 0)]), (2, [(5, 0), (1, 0), (1, 0)])]
)
def test_decodes_have_as_many_steps_between_prompts_as_were_set(interval, rows):
    settings = SHARED | {"max_num_seqs": 2, "max_num_batched_tokens": 5}
    config = EngineConfig(**settings | {"prefill_decode_interval": interval})
    [domain] = bring_up(config)[0].domains
    first, second = (
        Request(key=(b"a", number), tokens=[5] * length, num_prompt=length, max_tokens=9)
        for number, length in enumerate((1, 9))
    )
    domain.schedulers[0].add(first)
    assert rows_of_steps(domain, 1) == [(1, 0)]
    domain.schedulers[0].add(second)
    assert rows_of_steps(domain, 3) == rows


def rows_of_steps(domain, num):
    """Rows of each replica in so many steps, whose tokens are made up."""
    seen = []
    for _ in range(num):
        step = domain.next_step()
        domain.under_way.clear()
        for scheduler, plan in zip(domain.schedulers, step.plans, strict=True):
            scheduler.apply(step.number, [9] * len(plan.sampled))
        seen.append(step.told.num_rows)
    return seen


@pytest.mark.row("S10")
@pytest.mark.parametrize(
    ("most", "rows"),
    [(0, [(2, 2), (2, 2), (2, 2), (2, 2)]), (2, [(2, 2), (1, 2), (1, 2), (2, 2)])],
)
def test_a_prompt_waits_for_one_that_queues_as_long_as_was_set(most, rows):
    """Both replicas' slots are taken; the first gets one back, and on the second one queues."""
    settings = SHARED | {"max_num_seqs": 2, "prefill_delayer_max_delay_passes": most}
    [domain] = bring_up(EngineConfig(**settings))[0].domains
    for replica, lengths in ((0, (1, 9, 9)), (1, (9, 9, 9))):
        for number, length in enumerate(lengths):
            domain.schedulers[replica].add(
                Request(
                    key=(b"a", 10 * replica + number),
                    tokens=[5],
                    num_prompt=1,
                    max_tokens=length,
                    arrival=number,
                )
            )
    assert rows_of_steps(domain, 4) == rows
