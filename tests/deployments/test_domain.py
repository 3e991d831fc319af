"""Steps and their acks: a token is released only when all ranks say the same."""

import pytest

from deployments.domain import Desync, Domain
from deployments.grammar import State
from deployments.requests import Request
from deployments.scheduler import Scheduler
from parallel.layout import Layout
from workers.protocol import Ack, Mode, decode_body, decode_header, digest, pack

LEDGER = b"ledger"


def domain(tp=2, dp=1, depth=2, index=0):
    schedulers = [
        Scheduler(num_pages=32, page_size=4, max_num_seqs=4, max_num_batched_tokens=16)
        for _ in range(1)
    ]
    return Domain(Layout(tp_size=tp, dp_size=dp), index, schedulers, epoch=3, depth=depth)


def add(one, number=0, prompt=(5, 6, 7), max_tokens=8):
    request = Request(
        key=(b"a", number),
        tokens=list(prompt),
        num_prompt=len(prompt),
        max_tokens=max_tokens,
        arrival=number,
    )
    one.schedulers[0].add(request)
    return request


def ack(under_way, rank, tokens=(9,), **changes):
    fields = {
        "epoch": 3,
        "rank": rank,
        "step": under_way.number,
        "header": under_way.header_digest,
        "ids": digest(pack(tokens)),
        "ledger": LEDGER,
        "seconds": 0.001,
        "tokens": pack(tokens) if rank % 2 == 0 else b"",
    }
    return Ack(**(fields | changes))


def test_headers_are_chained_and_name_their_bodies():
    one = domain()
    add(one)
    first, second = one.next_step(), one.next_step()
    headers = [decode_header(step.header) for step in (first, second)]
    assert [(h.epoch, h.step, h.previous) for h in headers] == [
        (3, 0, b""),
        (3, 1, digest(first.header)),
    ]
    assert headers[0].bodies == (digest(first.bodies[0]),)
    assert [(h.mode, h.num_rows, h.num_logit_rows) for h in headers] == [
        (Mode.EXTEND, (3,), (1,)),
        (Mode.DECODE, (1,), (1,)),
    ]
    assert len(decode_body(first.bodies[0]).admits) == 1
    assert decode_body(second.bodies[0]).admits == ()


def test_no_more_steps_are_under_way_than_the_depth():
    one = domain(depth=2)
    add(one)
    one.next_step()
    assert one.can_step
    one.next_step()
    assert not one.can_step


def test_tokens_are_released_when_the_last_rank_has_acknowledged():
    one = domain()
    request = add(one)
    step = one.next_step()
    assert one.on_ack(ack(step, 1)) == []
    assert request.tokens == [5, 6, 7]
    done = one.on_ack(ack(step, 0))
    assert [d.number for d in done] == [0]
    assert request.tokens == [5, 6, 7, 9]


def test_an_ack_of_a_later_step_waits_for_the_earlier():
    one = domain()
    add(one)
    first, second = one.next_step(), one.next_step()
    one.on_ack(ack(first, 0))
    one.on_ack(ack(second, 0))
    assert one.late_ranks() == [1]
    assert one.on_ack(ack(second, 1)) == []
    assert [d.number for d in one.on_ack(ack(first, 1))] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ids": b"x"}, r"ranks \[1\] sampled other tokens than ranks \[0\] in step 0"),
        ({"ledger": b"x"}, r"ranks \[1\] took part in other collectives than ranks \[0\]"),
        ({"header": b"x"}, "rank 1 obeyed another plan of step 0 than was sent"),
        ({"step": 5}, "rank 1 acknowledged step 5 instead of 0"),
    ],
)
def test_a_rank_that_differs_is_named_and_no_token_is_released(changes, sentence):
    one = domain()
    request = add(one)
    step = one.next_step()
    one.on_ack(ack(step, 0))
    with pytest.raises(Desync, match=sentence) as caught:
        one.on_ack(ack(step, 1, **changes))
    assert caught.value.rank == 1
    assert request.tokens == [5, 6, 7]


def test_the_odd_one_of_four_is_named():
    one = domain(tp=4)
    add(one)
    step = one.next_step()
    for rank in (1, 2, 3):
        one.on_ack(ack(step, rank))
    with pytest.raises(Desync) as caught:
        one.on_ack(ack(step, 0, ids=b"x"))
    assert caught.value.rank == 0


def test_a_rank_with_too_few_tokens_is_named():
    one = domain()
    add(one)
    step = one.next_step()
    one.on_ack(ack(step, 0, tokens=()))
    with pytest.raises(Desync, match="rank 0 sampled 0 tokens in step 0 and its plan has 1"):
        one.on_ack(ack(step, 1, tokens=()))


class AnyText:
    """A matcher that takes everything."""

    def accept(self, token):
        return State.OPEN


def test_masks_are_due_when_all_tokens_before_are_known():
    one = domain()
    request = add(one)
    request.matcher = AnyText()
    one.schedulers[0]._has_grammars = True
    assert one.take_mask_due() is None
    first, second = one.next_step(), one.next_step()
    assert decode_body(second.bodies[0]).num_masked == 1
    assert one.take_mask_due() is first
    assert one.take_mask_due() is None
    for rank in (0, 1):
        one.on_ack(ack(first, rank))
    assert one.take_mask_due() is second


def test_a_poisoned_row_ends_its_request():
    one = domain()
    request = add(one)
    step = one.next_step()
    one.on_ack(ack(step, 1))
    done = one.on_ack(ack(step, 0, poisoned=(0,)))
    assert done[0].accepted == [[None]]
    assert one.schedulers[0].failed == [request]


def test_a_rank_that_reports_rows_it_does_not_have_is_named():
    one = domain()
    add(one)
    step = one.next_step()
    one.on_ack(ack(step, 1))
    with pytest.raises(Desync, match="rank 0 reports rows"):
        one.on_ack(ack(step, 0, poisoned=(1,)))
