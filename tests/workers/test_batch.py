from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.random_driver import RandomDriver, Request
from workers.batch import BatchState, ProtocolError
from workers.protocol import Admit, Body, Sampling, pack


def new_state(num_pages: int = 12) -> BatchState:
    return BatchState(
        max_num_seqs=4,
        max_num_batched_tokens=32,
        max_model_len=30,
        page_size=4,
        num_pages=num_pages,
        vocab_size=50,
    )


def admit(
    slot: int = 0,
    tokens: list[int] | None = None,
    pages: list[int] | None = None,
    num_cached: int = 0,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
) -> Admit:
    tokens = [1, 2, 3, 4, 5] if tokens is None else tokens
    pages = [7, 3] if pages is None else pages
    return Admit(slot, pack(tokens), max(len(tokens), 1), num_cached, pack(pages), sampling)


def chunk(slot: int, length: int, *admits: Admit) -> Body:
    return Body(admits=admits, chunk_slots=pack([slot]), chunk_lengths=pack([length]))


def started(*bodies: Body) -> BatchState:
    state = new_state()
    for body in bodies:
        state.apply(body)
    return state


def test_decodes_go_first_by_slot_then_the_chunks_in_their_order():
    state = started(chunk(3, 5, admit(3)), chunk(1, 5, admit(1, pages=[0, 1])))
    rows = state.apply(
        Body(
            admits=(admit(2, pages=[4, 5]), admit(0, pages=[8, 9])),
            chunk_slots=pack([2, 0]),
            chunk_lengths=pack([4, 5]),
        )
    )
    assert rows.decode_slots_B.tolist() == [1, 3]
    assert rows.positions_T.tolist() == [5, 6, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert rows.kv_rows_T.tolist() == [5, 14, *range(16, 20), *range(32, 36), 36]
    assert (rows.logit_rows_R.tolist(), rows.logit_slots_R.tolist()) == ([0, 1, 10], [1, 3, 0])


def test_a_slot_decodes_from_the_step_after_its_last_chunk_until_it_leaves():
    state = started(chunk(0, 3, admit()))
    assert state.apply(Body()).num_rows == 0
    assert state.apply(chunk(0, 2)).decode_slots_B.tolist() == []
    assert state.apply(Body()).decode_slots_B.tolist() == [0]
    assert state.apply(Body(leaves=pack([0]))).num_rows == 0


def test_a_slot_may_leave_and_be_filled_again_in_one_step():
    state = started(chunk(0, 5, admit()))
    again = admit(0, tokens=[9, 8], pages=[1])
    body = Body(leaves=pack([0]), admits=(again,), chunk_slots=pack([0]), chunk_lengths=pack([2]))
    assert state.apply(body).positions_T.tolist() == [0, 1]


def test_a_padded_read_meets_only_the_slots_own_pages():
    state = started(chunk(0, 5, admit(0, pages=[7, 3])))
    assert state.page_table_SN[0].tolist() == [7, 3, 7, 7, 7, 7, 7, 7]
    state.apply(Body(grow_slots=pack([0]), grow_pages=pack([5])))
    assert state.page_table_SN[0, :4].tolist() == [7, 3, 5, 7]


def test_steady_decodes_keep_their_arrays():
    state = started(chunk(0, 5, admit()))
    first, second = state.apply(Body()), state.apply(Body())
    assert first.decode_slots_B is second.decode_slots_B


def test_pages_of_a_poisoned_slot_are_cleared_when_another_gets_them():
    state = started(chunk(0, 5, admit(0, pages=[7, 3])))
    state.mark_dirty(0)
    state.apply(Body(leaves=pack([0])))
    assert state.apply(Body(admits=(admit(1, pages=[2, 4]),))).dirty_pages == ()
    assert state.apply(Body(admits=(admit(2, pages=[7, 5], num_cached=4),))).dirty_pages == ()
    assert state.apply(Body(admits=(admit(3, pages=[6, 3], num_cached=4),))).dirty_pages == (3,)
    assert state.apply(Body(grow_slots=pack([3]), grow_pages=pack([7]))).dirty_pages == (7,)


REFUSED = [
    (Body(leaves=pack([1])), "slot 1 leaves, but no request was admitted to it"),
    (Body(leaves=pack([0, 0])), "slot 0 leaves, but no request"),
    (Body(leaves=pack([-1])), "slot -1 leaves, but max_num_seqs is 4"),
    (Body(leaves=b"abc"), "leaves has 3 bytes, which is no array of int32"),
    (Body(admits=(admit(4),)), "slot 4 is admitted to, but max_num_seqs is 4"),
    (Body(admits=(admit(0),)), "slot 0 is admitted to, but its request has not left"),
    (Body(admits=(admit(1, tokens=[]),)), "slot 1 enters with 0 tokens"),
    (Body(admits=(admit(1, tokens=[1] * 31),)), "31 tokens; there must be 1 to max_model_len=30"),
    (Body(admits=(admit(1, num_cached=5),)), "5 tokens, of which 5 are prompt and 5 cached"),
    (Body(admits=(admit(1, tokens=[50]),)), "slot 1 has an id outside the vocabulary of 50"),
    (Body(admits=(admit(1, tokens=[-1]),)), "slot 1 has an id outside the vocabulary of 50"),
    (Body(admits=(admit(1, pages=[]),)), "enters with 0 pages; its table holds 1 to 8"),
    (Body(admits=(admit(1, pages=[0] * 9),)), "enters with 9 pages; its table holds 1 to 8"),
    (Body(admits=(admit(1, pages=[12, 0]),)), "slot 1 is given a page outside the 12"),
    (Body(admits=(admit(1, tokens=[1] * 9, pages=[1], num_cached=8),)), "8 cached tokens in 1"),
    (Body(admits=(admit(1, sampling=Sampling(logit_bias=((50, 1.0),))),)), "slot 1 biases or"),
    (Body(admits=(admit(1, sampling=Sampling(stop_token_ids=(-1,))),)), "slot 1 biases or"),
    (Body(grow_slots=pack([0])), "a step grows 1 slots by 0 pages"),
    (Body(grow_slots=pack([2]), grow_pages=pack([1])), "slot 2 grows, but no request"),
    (Body(grow_slots=pack([0]), grow_pages=pack([-2])), "a growing slot is given a page outside"),
    (Body(grow_slots=pack([0] * 7), grow_pages=pack([1] * 7)), "past its page table of 8 pages"),
    (Body(chunk_slots=pack([1])), "a step has 1 chunk slots, 0 chunk lengths"),
    (Body(chunk_slots=pack([1, 1]), chunk_lengths=pack([1, 1])), "two chunks of one slot"),
    (chunk(1, 1), "slot 1 has a chunk, but no request"),
    (chunk(0, 1), "slot 0 has a chunk, but it decodes"),
    (chunk(1, 0, admit(1)), "slot 1 has a chunk of 0 tokens with 5 left"),
    (chunk(1, 6, admit(1)), "slot 1 has a chunk of 6 tokens with 5 left"),
    (chunk(1, 5, admit(1, pages=[1])), "slot 1 computes position 4, but its 1 pages of 4"),
]


@pytest.mark.parametrize(("body", "sentence"), REFUSED, ids=[text for _, text in REFUSED])
def test_what_does_not_fit_is_refused_in_a_sentence(body, sentence):
    state = started(chunk(0, 5, admit()))
    with pytest.raises(ProtocolError, match=sentence):
        state.apply(body)


def test_a_decode_past_its_pages_is_refused():
    state = started(chunk(0, 5, admit()))
    for _ in range(3):
        state.apply(Body())
    with pytest.raises(ProtocolError, match=r"slot 0 computes position 8, but its 2 pages of 4"):
        state.apply(Body())


def test_a_decode_past_the_longest_sequence_is_refused():
    state = started(chunk(0, 29, admit(0, tokens=[1] * 29, pages=list(range(8)))), Body())
    with pytest.raises(ProtocolError, match=r"position 30, but .* max_model_len=30 end at 30"):
        state.apply(Body())


def test_more_rows_than_a_step_may_have_are_refused():
    tokens, pages = [1] * 20, list(range(5))
    admits = (admit(0, tokens=tokens, pages=pages), admit(1, tokens=tokens, pages=pages))
    body = Body(admits=admits, chunk_slots=pack([0, 1]), chunk_lengths=pack([20, 20]))
    with pytest.raises(ProtocolError, match="40 rows and max_num_batched_tokens is 32"):
        new_state().apply(body)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), chaos=st.sampled_from([0.0, 0.3, 0.8]))
def test_any_legal_bodies_give_the_rows_of_a_plain_simulation(seed, chaos):
    random = Random(seed)
    requests = [
        Request([random.randrange(3) for _ in range(random.randint(1, 14))], random.randint(1, 8))
        for _ in range(6)
    ]
    driver = RandomDriver(
        requests, random, max_num_seqs=4, num_pages=12, page_size=4, budget=16, chaos=chaos
    )
    state = new_state()
    for _ in range(60):
        planned = driver.plan()
        rows = state.apply(planned.body)
        assert rows.positions_T.tolist() == planned.positions
        assert rows.kv_rows_T.tolist() == planned.kv_rows
        assert rows.logit_rows_R.tolist() == planned.logit_rows
        assert rows.logit_slots_R.tolist() == [request.slot for request in planned.sampling]
        assert rows.kv_rows_T.dtype == rows.positions_T.dtype == np.int64
        driver.feed(planned, [random.randrange(3) for _ in planned.sampling])
