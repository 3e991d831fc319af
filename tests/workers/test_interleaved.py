"""Replayed and eager steps in any order say, bit for bit, what eager steps alone say.

Two runners of a rank get the same plans, thousands of random ones: requests come and are cancelled,
prompts are read in chunks, pages run out, replicas fall idle, buckets grow and shrink. One replays
decodes, in the smallest bucket or a larger one, or not, at random; the other never does. What a
GPU would replay is run as it is here; slots, positions, tables and turns on the device are real.
"""

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import pytest
import torch

from parallel.padding import align_rows, choose_bucket
from parallel.thread_world import run_thread_world
from tests.headers import header_of
from tests.workers import checksum_runs, tiny_moe
from tests.workers.random_driver import Planned, RandomDriver, Request
from workers.config import EngineConfig
from workers.protocol import Header, Sampling
from workers.runner import ModelRunner
from workers.step import StepResult

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen at import"),
    pytest.mark.timeout(3000),
    pytest.mark.row("S12"),
    pytest.mark.usefixtures("one_kernel_at_a_time"),
]

GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=1.0, seed=5, nonce=9, top_k=20)
PENALISED = Sampling(temperature=0.0, frequency_penalty=1.0)


class Crowd:
    """One replica's requests: they come in bursts with pauses, and some are cancelled."""

    def __init__(
        self, random: Random, vocab: int, kinds: Sequence[Sampling], *, max_tokens: int, **sizes
    ) -> None:
        self.driver = RandomDriver([], random, chaos=0.2, **sizes)
        self._random, self._vocab, self._kinds = random, vocab, kinds
        self._max_tokens = max_tokens
        self._rate = 0.3
        self.num_cancelled = 0

    def plan(self) -> Planned:
        draw, driver = self._random, self.driver
        if draw.random() < 0.05:
            self._rate = draw.choice([0.0, 0.0, 0.1, 0.5])
        if draw.random() < self._rate and len(driver.waiting) < 4:
            prompt = [draw.randrange(self._vocab) for _ in range(draw.randint(1, 12))]
            if draw.random() < 0.3:
                prompt = [3, 1, 4, 1, 5, 9, 2, 6, *prompt[:4]]  # pages to share
            length = draw.randint(1, self._max_tokens)
            driver.waiting.append(Request(prompt, length, draw.choice(self._kinds)))
        if draw.random() < 0.03 and driver.running:
            request = driver.running[draw.choice(sorted(driver.running))]
            request.max_tokens = len(request.output)  # leaves with the next plan
            self.num_cancelled += 1
        return driver.plan()


class Told(NamedTuple):
    mixed: Header
    eager: Header
    """The same rows in no bucket: with the same padding, or with none."""


def headers_of(
    plans: Sequence[Planned],
    number: int,
    buckets: Sequence[int],
    multiple: int,
    draw: Random,
    *,
    is_padded: bool,
) -> Told:
    """Decodes are replayed in a bucket that holds them, mostly the smallest, or run eagerly."""
    num_rows = tuple(len(plan.positions) for plan in plans)
    num_logit_rows = tuple(len(plan.logit_rows) for plan in plans)
    has_prompts = any(plan.body.chunk_slots for plan in plans)
    bucket = 0 if has_prompts else choose_bucket(num_rows, buckets)
    if bucket and draw.random() < 0.25:
        bucket = draw.choice([each for each in buckets if each >= bucket])
    if bucket and draw.random() < 0.25:
        bucket = 0
    aligned = align_rows(num_rows, multiple)
    padded = (bucket,) * len(plans) if bucket else aligned
    return Told(
        header_of(num_rows, num_logit_rows, padded_rows=padded, bucket=bucket, step=number),
        header_of(num_rows, num_logit_rows, padded_rows=padded if is_padded else aligned),
    )


def kind_of(header: Header, plans: Sequence[Planned]) -> str:
    if header.bucket:
        return f"bucket {header.bucket}"
    if any(plan.body.chunk_slots for plan in plans):
        return "prompts"
    return "eager decodes" if any(header.num_rows) else "idle"


class Listening:
    """A runner, and the logits of its last step."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.logits_RV: torch.Tensor | None = None
        logits = runner._model.logits

        def listen(
            hidden_RD: torch.Tensor,
            num_logit_rows: tuple[int, ...] | None = None,
            *,
            out: torch.Tensor | None = None,
        ) -> torch.Tensor:
            self.logits_RV = logits(hidden_RD, num_logit_rows, out=out)
            return self.logits_RV

        runner._model.logits = listen

    def step(self, header: Header, plan: Planned, replica: int) -> StepResult:
        self.logits_RV = None
        return self.runner.finish(self.runner.launch(header, plan.body, replica))


def assert_same(mixed: Listening, eager: Listening, num_rows: int, *, exact: bool) -> None:
    if num_rows:
        assert mixed.logits_RV is not None
        assert eager.logits_RV is not None
        one, other = mixed.logits_RV[:num_rows], eager.logits_RV[:num_rows]
        assert torch.equal(one, other) if exact else torch.allclose(one, other, atol=1e-4)


def interleave(
    mixed: Listening, eager: Listening, crowds: Sequence[Crowd], num_steps: int, *,
    seed: int, replica: int = 0, exact: bool, groups=None,
) -> Counter[tuple[str, str]]:  # fmt: skip
    """How often each kind of step followed each.

    Logits are bit-equal if numbers are `exact` in any shape, or until the first replay in another
    shape than the eager step's: what that left in the cache may differ in its last bit.
    """
    same_shapes = True
    is_padded = groups is not None and groups.tp.size > 1  # else a driver pads no eager step
    draw, runner, seen, before = Random(seed), mixed.runner, Counter(), "idle"
    for number in range(num_steps):
        plans = [crowd.plan() for crowd in crowds]
        told = headers_of(
            plans, number, runner.buckets, runner._row_multiple, draw, is_padded=is_padded
        )
        one = mixed.step(told.mixed, plans[replica], replica)
        other = eager.step(told.eager, plans[replica], replica)
        assert one.ids.tolist() == other.ids.tolist(), (number, told)
        assert one.logprobs == other.logprobs or not exact
        if told.mixed.bucket:
            is_full = set(told.mixed.num_rows) == {told.mixed.bucket}
            same_shapes &= is_full and (groups is None or groups.attn_cp.size == 1)
        num_logit_rows = told.mixed.num_logit_rows[replica]
        assert_same(mixed, eager, num_logit_rows, exact=exact or same_shapes)
        tokens = [one.ids.tolist()]
        if groups is not None:
            tokens = tiny_moe.tell(groups, told.mixed, replica, one.ids)
        for crowd, plan, ids in zip(crowds, plans, tokens, strict=True):
            crowd.driver.feed(plan, ids)
        kind = kind_of(told.mixed, plans)
        seen[before, kind] += 1
        before = kind
    return seen


@pytest.mark.parametrize(
    "num_steps", [60, pytest.param(10_000, marks=pytest.mark.slow)], ids=lambda n: f"{n} steps"
)
def test_any_order_of_replayed_and_eager_steps_is_bit_equal_to_eager_ones(num_steps):
    """Checksums of all that a row reads, in whole numbers: a wrong page, slot or position shows."""
    mixed, eager = (Listening(checksum_runs.checksum_runner()) for _ in range(2))
    crowd = Crowd(
        Random(7), 97, [GREEDY, DRAWN, PENALISED], max_tokens=20,
        **checksum_runs.DRIVER,
    )  # fmt: skip
    seen = interleave(mixed, eager, [crowd], num_steps, seed=3, exact=True)
    for part, theirs in zip(
        mixed.runner._steps.cache.parts, eager.runner._steps.cache.parts, strict=True
    ):
        # NOTE: the last page is nobody's: rows that fill a bucket up write there.
        assert torch.equal(part[:, :-1], theirs[:, :-1])
    buckets = [f"bucket {bucket}" for bucket in mixed.runner.buckets]
    assert sum(seen["prompts", each] for each in buckets)
    assert sum(seen[one, other] for one in buckets for other in buckets if one != other) > 2
    if num_steps < 1000:
        return
    for kind in ("prompts", "eager decodes", *buckets):
        assert any(seen[kind, each] for each in buckets), kind
        assert any(seen[each, kind] for each in buckets), kind
    assert seen["idle", "prompts"]
    assert crowd.num_cancelled > num_steps // 200


LAYOUTS = {
    "one rank": {"tp_size": 1},
    "two replicas": tiny_moe.DP2,
    "two replicas of two parts": tiny_moe.DP2_TP2 | {"ep_size": 2, "attn_cp_size": 2},
    "all-to-all": tiny_moe.DP2_TP2 | tiny_moe.A2A | {"ep_size": 4, "moe_dense_tp_size": 1},
}


@pytest.mark.row("S10")
@pytest.mark.parametrize(
    ("layout", "num_steps"),
    [
        pytest.param("two replicas", 300, marks=pytest.mark.slow),
        pytest.param("two replicas of two parts", 100, marks=pytest.mark.slow),
        pytest.param("all-to-all", 100, marks=pytest.mark.slow),
        pytest.param("one rank", 300, marks=pytest.mark.slow),
    ],
)
def test_replicas_and_parts_say_the_same_in_any_order(layout, num_steps):
    """A model with experts, in the interpreter: idle replicas, uneven ones, rows split in parts."""
    config = EngineConfig(**tiny_moe.SIZES | LAYOUTS[layout])
    num_replicas = config.layout.num_replicas

    @torch.inference_mode()
    def body(rank, groups):
        mixed, eager = (Listening(tiny_moe.tiny_runner(config, rank, groups)) for _ in range(2))
        crowds = [
            Crowd(Random(11 + replica), tiny_moe.VOCAB, [GREEDY], max_tokens=12, **tiny_moe.DRIVER)
            for replica in range(num_replicas)
        ]
        return interleave(
            mixed, eager, crowds, num_steps, seed=5, replica=groups.attn_dp.rank, exact=False,
            groups=groups,
        )  # fmt: skip

    ranks = run_thread_world(config.layout, body, time_limit_s=2900.0)
    assert all(seen == ranks[0] for seen in ranks)
    kinds = Counter()
    for (_, kind), count in ranks[0].items():
        kinds[kind] += count
    assert kinds["prompts"]
    num_replayed = sum(count for kind, count in kinds.items() if kind.startswith("bucket"))
    assert num_replayed > num_steps // (5 if num_replicas > 1 else 12)  # one is idle more often
    assert kinds["eager decodes"]
