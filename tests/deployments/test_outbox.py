"""What each ingress is told of a step, from plans that real schedulers could have made."""

import pytest

from deployments.domain import StepDone
from deployments.messages import Tokens
from deployments.outbox import outbox_of
from deployments.requests import Finish, Request
from deployments.scheduler import Chunk, Plan
from parallel.layout import Layout
from tests.headers import header_of
from workers.protocol import Ack, Body, TokenLogprobs

A, B = b"ingress a", b"ingress b"
LAYOUT = Layout(tp_size=2, dp_size=1)
SURE = TokenLogprobs(7, -0.5, 1, (7,), (-0.5,))


def request(owner, number, *, num_output=1, finish=None, prompt=(1, 2, 3)):
    tokens = [*prompt, *[7] * num_output]
    one = Request(key=(owner, number), tokens=tokens, num_prompt=len(prompt), max_tokens=9)
    one.finish, one.num_cached, one.queue_s = finish, 2, 0.25
    return one


def chunk_of(one, slot=0):
    return Chunk(one, slot, 0, one.num_prompt, samples=True)


def done(decodes, chunks, accepted, acks=()):
    plan = Plan(4, Body(), decodes, chunks)
    header = header_of((len(accepted),), epoch=3, step=4)
    return StepDone(4, [plan], [accepted], {ack.rank: ack for ack in acks}, 0, header, 0, 0.0)


def acked(*, logprobs=(), prompt_logprobs=()):
    return Ack(3, 0, 4, b"", b"", b"", 0.0, b"", logprobs, prompt_logprobs)


def outbox(*step):
    return outbox_of(done(*step), epoch=3, layout=LAYOUT)


def test_each_ingress_has_one_message_with_its_tokens_in_order():
    first, other, last = (request(A, 1, num_output=5), request(B, 9, num_output=2), request(A, 2))
    told = outbox([first, other, last], [], [(first, 4, 40), (other, 1, 41), (last, 0, 42)])
    assert told.boxes == {
        A: Tokens(3, [1, 2], [4, 0], [40, 42], []),
        B: Tokens(3, [9], [1], [41], []),
    }
    assert (told.num_tokens, told.begun, told.finished) == (3, [], [])


def test_a_lost_row_is_told_to_nobody():
    one = request(A, 1)
    told = outbox([one, one], [], [None, (one, 0, 7)])
    assert told.boxes == {A: Tokens(3, [1], [0], [7], [])}
    assert told.num_tokens == 1


def test_the_end_of_a_request_comes_with_its_last_token():
    one = request(A, 1, finish=Finish.LENGTH)
    told = outbox([one], [], [(one, 8, 7)])
    assert told.boxes[A].finished == [(1, "length")]
    assert told.finished == [one]


def test_a_first_token_tells_of_prefix_hits_once():
    new, resumed = request(A, 1), request(B, 2, num_output=3)
    told = outbox([], [chunk_of(new), chunk_of(resumed, 1)], [(new, 0, 7), (resumed, 2, 7)])
    assert told.boxes[A].begun == [(1, 2, 0.25)]
    assert told.boxes[B].begun == []  # it had been preempted, and has begun long ago
    assert told.begun == [new]


@pytest.mark.parametrize(("finish", "num_output"), [(None, 0), (Finish.LENGTH, 1)])
def test_log_probabilities_go_to_the_owner_of_the_row_and_of_the_slot(finish, num_output):
    decoding, reading = request(A, 1), request(B, 2, num_output=num_output, finish=finish)
    told = acked(logprobs=((0, SURE), (1, SURE)), prompt_logprobs=((5, 1, (SURE, SURE)),))
    sent = outbox([decoding], [chunk_of(reading, 5)], [(decoding, 3, 7), None], [told])
    assert sent.boxes[A].logprobs == [(1, 3, SURE)]
    assert sent.boxes[B].logprobs == []
    assert sent.boxes[B].prompt_logprobs == [(2, 1, (SURE, SURE))]


def test_a_request_cancelled_before_its_first_token_is_told_nothing():
    gone = request(B, 2, num_output=0, finish=Finish.CANCELLED)
    told = acked(prompt_logprobs=((5, 1, (SURE,)),))
    assert outbox([], [chunk_of(gone, 5)], [None], [told]).boxes == {}
