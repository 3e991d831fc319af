"""The scheduler against a model of the workers: whatever happens, nothing is lost or mixed up."""

import hashlib
import subprocess
import sys
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.grammar import Vocabulary, compile_grammar
from deployments.messages import Grammar
from deployments.requests import Finish, Request
from deployments.scheduler import RequestTooLarge, Scheduler, route
from workers.protocol import Sampling, encode, unpack

EOS = 1


def scheduler(num_pages=32, page_size=4, max_num_seqs=4, budget=16, prefix=True):
    return Scheduler(
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=prefix,
    )


def request(number, prompt, max_tokens=8, stop=()):
    return Request(
        key=(b"", number),
        tokens=list(prompt),
        num_prompt=len(prompt),
        max_tokens=max_tokens,
        stop_token_ids=frozenset(stop),
        arrival=number,
    )


def next_token(tokens):
    """The model: a hash of everything before, so that a wrong token changes all later ones."""
    return 2 + hashlib.sha256(repr(tokens).encode()).digest()[0] % 50


class FakeWorker:
    """Obeys bodies as `workers.protocol` says, keeping tokens in pages like a cache would."""

    def __init__(self, num_pages, page_size):
        self.page_size = page_size
        self.pages = [[None] * page_size for _ in range(num_pages)]
        self.slots = {}

    def step(self, body):
        for slot in unpack(body.leaves).tolist():
            del self.slots[slot]
        for admit in body.admits:
            assert admit.slot not in self.slots
            self.slots[admit.slot] = {
                "tokens": unpack(admit.tokens).tolist(),
                "computed": admit.num_cached,
                "pages": unpack(admit.pages).tolist(),
            }
        for slot, page in zip(unpack(body.grow_slots), unpack(body.grow_pages), strict=True):
            self.slots[slot]["pages"].append(int(page))
        chunks = dict(
            zip(unpack(body.chunk_slots).tolist(), unpack(body.chunk_lengths).tolist(), strict=True)
        )
        decodes = [
            slot
            for slot, state in sorted(self.slots.items())
            if slot not in chunks and state["computed"] == len(state["tokens"]) - 1
        ]
        sampled, num_rows = [], 0
        for slot in [*decodes, *chunks]:
            state, length = self.slots[slot], chunks.get(slot, 1)
            num_rows += length
            for position in range(state["computed"], state["computed"] + length):
                page = state["pages"][position // self.page_size]
                self.pages[page][position % self.page_size] = state["tokens"][position]
            state["computed"] += length
            if state["computed"] == len(state["tokens"]):
                read = [
                    self.pages[state["pages"][p // self.page_size]][p % self.page_size]
                    for p in range(state["computed"])
                ]
                token = next_token(read)
                state["tokens"].append(token)
                sampled.append(token)
        return sampled, num_rows


def expected(prompt, max_tokens, stop):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop:
            break
    return tokens


class World:
    """A scheduler and a worker with up to `depth` steps between plan and result."""

    def __init__(self, depth=2, **sizes):
        self.scheduler = scheduler(**sizes)
        pool = self.scheduler.pool
        self.worker = FakeWorker(pool.num_pages, pool.page_size)
        self.depth = depth
        self.step = 0
        self.flying = deque()
        self.bodies = []

    def plan(self):
        if len(self.flying) >= self.depth or not self.scheduler.has_work:
            return False
        plan = self.scheduler.plan_step(self.step)
        assert plan.num_rows <= self.scheduler.max_num_batched_tokens
        assert plan.num_rows > 0 or self.flying  # when the pages of all are on their way back
        tokens, num_rows = self.worker.step(plan.body)
        assert num_rows == plan.num_rows
        self.flying.append((self.step, tokens))
        self.bodies.append(encode(plan.body))
        self.step += 1
        return True

    def land(self):
        if self.flying:
            self.scheduler.apply(*self.flying.popleft())
        self.check_pages()

    def check_pages(self):
        pool = self.scheduler.pool
        holders = [0] * pool.num_pages
        live = self.scheduler
        for r in (*live.prefilling, *live.decoding, *live.retiring):
            for page in r.pages:
                holders[page] += 1
        assert holders == [pool.refs(page) for page in range(pool.num_pages)]
        assert pool.num_free == holders.count(0)
        free = [page for page, num in enumerate(holders) if num == 0]
        assert pool.num_cached == sum(pool._names[page] is not None for page in free)

    def run(self, limit=5000):
        for _ in range(limit):
            while self.plan():
                pass
            if not self.flying:
                break
            self.land()
        assert not self.scheduler.unfinished()
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_pages
        assert not self.scheduler.retiring


def test_a_request_is_read_and_answered():
    world = World()
    one = request(0, [5, 6, 7], max_tokens=4)
    world.scheduler.add(one)
    world.run()
    assert one.tokens == expected([5, 6, 7], 4, ())
    assert one.finish is Finish.LENGTH


def test_a_long_prompt_is_read_in_pieces_beside_decodes():
    world = World(budget=8)
    short, long = request(0, [5], max_tokens=9), request(1, range(10, 40), max_tokens=2)
    world.scheduler.add(short)
    world.plan()
    world.scheduler.add(long)
    plan = world.scheduler.plan_step(1)
    assert plan.decodes == [short]
    assert [(c.start, c.num_tokens, c.samples) for c in plan.chunks] == [(0, 7, False)]


def test_the_last_token_is_not_overrun():
    world = World()
    world.scheduler.add(request(0, [5, 6], max_tokens=1))
    assert world.plan()
    assert not world.plan()


def test_a_stop_token_learnt_late_costs_one_dropped_token():
    world = World()
    stop = expected([5, 6], 3, ())[3]
    one = request(0, [5, 6], max_tokens=8, stop=[stop])
    world.scheduler.add(one)
    world.run()
    assert one.tokens == expected([5, 6], 8, [stop])
    assert one.finish is Finish.STOP


def test_equal_beginnings_share_pages():
    world = World()
    prompt = list(range(10, 23))
    world.scheduler.add(request(0, prompt))
    world.run()
    again = request(1, prompt)
    world.scheduler.add(again)
    world.run()
    assert again.num_cached == 12
    assert again.tokens == expected(prompt, 8, ())


def test_a_prompt_of_whole_pages_computes_its_last_page_again():
    world = World()
    prompt = list(range(10, 18))
    for number in (0, 1):
        world.scheduler.add(request(number, prompt, max_tokens=2))
        world.run()
    hit = request(2, prompt, max_tokens=2)
    world.scheduler.add(hit)
    world.run()
    assert hit.num_cached == 4


def test_salts_do_not_share():
    world = World()
    prompt = list(range(10, 30))
    world.scheduler.add(request(0, prompt))
    world.run()
    other = request(1, prompt)
    other.salt = "tenant"
    world.scheduler.add(other)
    world.run()
    assert other.num_cached == 0


def test_prompt_logprobs_do_not_read_the_prefix_cache():
    world = World()
    prompt = list(range(10, 30))
    world.scheduler.add(request(0, prompt))
    world.run()
    asking = request(1, prompt)
    asking.sampling = Sampling(num_prompt_logprobs=1)
    world.scheduler.add(asking)
    world.run()
    assert asking.num_cached == 0


def test_a_request_that_can_never_fit_is_refused_with_both_numbers():
    sentence = (
        "100 prompt tokens and 40 output tokens need 35 pages of cache and there are 32: "
        "ask for at most 128 in all"
    )
    with pytest.raises(RequestTooLarge, match=sentence):
        scheduler().add(request(0, [5] * 100, max_tokens=40))


def test_a_cancelled_request_is_in_no_later_plan():
    world = World()
    one, two = request(0, [5, 6], max_tokens=30), request(1, [7, 8], max_tokens=30)
    world.scheduler.add(one)
    world.scheduler.add(two)
    world.plan()
    world.plan()
    world.scheduler.cancel(one)
    world.land()
    plan = world.scheduler.plan_step(2)
    assert plan.decodes == [two]
    assert one.finish is Finish.CANCELLED


def test_the_earliest_request_is_never_preempted():
    world = World(num_pages=8, page_size=4, budget=16)
    first = request(0, [5] * 6, max_tokens=20)
    world.scheduler.add(first)
    for number in (1, 2, 3):
        world.scheduler.add(request(number, [5 + number] * 6, max_tokens=20))
    world.run()
    assert world.scheduler.num_preemptions > 0
    assert first.num_preemptions == 0


def test_a_new_request_goes_to_the_replica_with_less_work_or_its_prefix():
    busy, idle = World().scheduler, World()
    busy.add(request(0, range(10, 30), max_tokens=20))
    assert route([busy, idle.scheduler], 8, list) == 1
    prompt = list(range(10, 34))
    idle.scheduler.add(request(1, prompt, max_tokens=1))
    idle.run()
    ask = request(2, prompt)
    idle.scheduler._name_pages(ask, 6)
    assert route([World().scheduler, idle.scheduler], 24, lambda: ask.names) == 1


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 24),  # prompt length
        st.integers(1, 16),  # max_tokens
        st.integers(0, 2),  # prompts of one kind share beginnings
        st.booleans(),  # has stop tokens
    ),
    min_size=1,
    max_size=12,
)
EVENTS = st.lists(st.sampled_from(["plan", "land", "add", "cancel"]), max_size=120)


@settings(max_examples=150)
@given(
    wanted=REQUESTS,
    events=EVENTS,
    num_pages=st.integers(10, 30),
    page_size=st.sampled_from([1, 2, 4, 8]),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(5, 20),
    depth=st.integers(1, 2),
    prefix=st.booleans(),
)
def test_nothing_is_lost_mixed_up_or_starved(
    wanted, events, num_pages, page_size, max_num_seqs, budget, depth, prefix
):
    num_pages *= max(1, 8 // page_size)
    world = World(
        depth=depth,
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        budget=budget,
        prefix=prefix,
    )
    todo = deque(
        request(
            number,
            [kind * 20 + 2 + i % 7 for i in range(length)],
            max_tokens,
            range(2, 6) if stops else (),
        )
        for number, (length, max_tokens, kind, stops) in enumerate(wanted)
    )
    every, cancelled = list(todo), set()
    for event in events:
        if event == "plan":
            world.plan()
        elif event == "land":
            world.land()
        elif event == "add" and todo:
            world.scheduler.add(todo.popleft())
        elif event == "cancel" and (alive := world.scheduler.unfinished()):
            cancelled.add(alive[-1].key)
            world.scheduler.cancel(alive[-1])
    while todo:
        world.scheduler.add(todo.popleft())
    world.run()
    for one in every:
        right = expected(one.tokens[: one.num_prompt], one.max_tokens, one.stop_token_ids)
        if one.key in cancelled:
            assert one.tokens == right[: len(one.tokens)]
        else:
            assert one.tokens == right
            assert one.finish in (Finish.STOP, Finish.LENGTH)


SAME_PLANS = """
from tests.deployments.test_scheduler import World, request
world = World(num_pages=12, max_num_seqs=3)
for number in range(9):
    world.scheduler.add(request(number, [number % 3] * (3 + number), max_tokens=6))
world.run()
print(b"".join(world.bodies).hex())
"""


def test_plans_do_not_depend_on_the_hash_seed():
    def bodies(seed):
        return subprocess.run(
            [sys.executable, "-c", SAME_PLANS],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert bodies("1") == bodies("2") != ""


# Grammars, and rows that are not numbers


@pytest.fixture(scope="module")
def pairs():
    """A grammar over the ids of bytes: any of the model's ids, four of them."""
    return compile_grammar(Grammar("regex", r"(?s)[\x02-\x7f]{4}"), Vocabulary.of_bytes())


def constrained(number, prompt, matcher, max_tokens=8):
    one = request(number, prompt, max_tokens=max_tokens)
    one.matcher = matcher.copy()
    return one


def test_rows_of_requests_with_a_grammar_are_counted_in_the_body(pairs):
    world = World()
    world.scheduler.add(request(0, [5, 6, 7]))
    world.scheduler.add(constrained(1, [5, 6], pairs))
    plan = world.scheduler.plan_step(0)
    assert plan.masked_rows == [1]
    assert plan.body.num_masked == 1


def test_a_request_ends_with_the_last_token_its_grammar_has_room_for(pairs):
    world = World()
    one = constrained(0, [5, 6, 7], pairs)
    world.scheduler.add(one)
    world.run()
    assert one.tokens == expected([5, 6, 7], 4, ())
    assert one.finish is Finish.STOP


def test_a_token_the_grammar_does_not_have_ends_only_its_request(pairs):
    world = World()
    narrow = compile_grammar(Grammar("regex", r"\x01{9}"), Vocabulary.of_bytes())
    bad, good = constrained(0, [5, 6, 7], narrow), constrained(1, [8, 9], pairs)
    world.scheduler.add(bad)
    world.scheduler.add(good)
    world.run()
    assert (bad.finish, bad.failure, bad.num_output) == (Finish.ERROR, "grammar_error", 0)
    assert good.tokens == expected([8, 9], 4, ())
    assert world.scheduler.failed == [bad]


def test_preemption_leaves_a_matcher_where_it_was(pairs):
    long = compile_grammar(Grammar("regex", r"(?s)[\x02-\x7f]{12}"), Vocabulary.of_bytes())
    world = World(num_pages=8, page_size=4, max_num_seqs=4)
    several = [constrained(i, [5 + i, 6, 7, 8, 9], long, max_tokens=20) for i in range(4)]
    for one in several:
        world.scheduler.add(one)
    world.run()
    assert world.scheduler.num_preemptions > 0
    for one in several:
        assert one.tokens == expected(one.tokens[:5], 12, ())
        assert one.finish is Finish.STOP


def test_a_poisoned_row_ends_its_request_and_nobody_finds_its_pages():
    world = World(page_size=4)
    prompt = list(range(10, 23))
    bad, good = request(0, prompt), request(1, [8, 9])
    for one in (bad, good):
        world.scheduler.add(one)
    world.plan()
    world.plan()
    step, tokens = world.flying.popleft()
    assert world.scheduler.apply(step, tokens, poisoned=[0])[0] is None
    world.run()
    assert (bad.finish, bad.failure, bad.num_output) == (Finish.ERROR, "numerical_error", 0)
    assert good.tokens == expected([8, 9], 8, ())
    again = request(2, prompt)
    world.scheduler.add(again)
    world.run()
    assert again.num_cached == 0


def test_pages_published_before_the_poison_was_seen_are_forgotten():
    world = World(page_size=4, budget=8)
    prompt = list(range(10, 23))
    bad = request(0, prompt)
    world.scheduler.add(bad)
    world.plan()
    world.land()
    assert world.scheduler.num_cached_tokens(bad.names) == 8
    world.plan()
    step, tokens = world.flying.popleft()
    world.scheduler.apply(step, tokens, poisoned=[0])
    assert world.scheduler.num_cached_tokens(bad.names) == 0
    world.run()
