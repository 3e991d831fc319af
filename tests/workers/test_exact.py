"""Every accepted combination of sizes and settings gives the numbers of one rank, to the last bit.

The combinations are enumerated, not chosen; the refused ones are told apart by reasons that are
stated here a second time, from the settings alone. Run with -s to see how many there were.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from parallel.dp_attention import RowCounts
from parallel.layout import Layout, LayoutError
from parallel.padding import pad_rows
from parallel.plan import Plan, PlanError, PlanSettings, Rows, compile_plan
from parallel.thread_world import run_thread_world
from tests.workers.exact import CONFIGS, build, install, part_of, sequences_of, whole_logits
from workers.architectures import layers_of

pytestmark = [
    pytest.mark.row("S8"),
    pytest.mark.row("S9"),
    pytest.mark.row("S10"),
    pytest.mark.row("S11"),
    pytest.mark.row("S14"),
]

LENGTHS = (
    ((3, 2), (1,), (4,), (2, 1)),  # uneven
    ((), (6, 3), (), ()),  # all but one idle
    ((1, 1, 1), (1, 1), (1, 1, 1), ()),  # decodes
)
"""Lengths of the sequences of up to four replicas; of eight, the second four have the same."""


class Case(NamedTuple):
    """One combination."""

    tp: int
    dp: int
    ep: int
    moe_dp: int
    dense: int | None
    backend: str
    dp_lm_head: bool
    inside: bool
    cp: int

    def layout(self) -> Layout:
        return Layout(
            tp_size=self.tp,
            dp_size=self.dp,
            enable_dp_attention=self.dp > 1,
            attn_cp_size=self.cp,
            ep_size=self.ep,
            moe_dp_size=self.moe_dp,
            moe_dense_tp_size=self.dense,
        )

    def settings(self) -> PlanSettings:
        return PlanSettings(self.dp_lm_head, self.backend, self.inside)


SIZES = (1, 2, 4, 8)
CASES = [
    Case(*each)
    for each in itertools.product(
        SIZES, SIZES, SIZES, SIZES, (None, 1, 2, 3, 4, 8), ("none", "torch"), (False, True),
        (False, True), SIZES,
    )
]  # fmt: skip


def expected_reason(case: Case) -> str | None:
    """Why a combination must be refused, worked out from the settings; None if it must not."""
    if case.tp % (case.dp * case.cp):
        return "attention gives every part the same number of ranks"
    if case.tp % (case.ep * case.moe_dp):
        return "experts give every part the same number of ranks"
    if case.dense not in (None, 1, case.tp // case.dp // case.cp, case.tp):
        return "moe_dense_tp_size="
    if case.dp_lm_head and case.dp == 1:
        return "enable_dp_lm_head"
    if case.backend == "none" and case.moe_dp > 1:
        return "moe_dp_size="
    if case.backend == "torch" and case.ep * case.moe_dp < case.tp:
        return "sends rows to whole experts"
    return None


def compiled(case: Case) -> Plan | str:
    """The plan, or the sentence of the refusal."""
    try:
        return compile_plan(case.layout(), case.settings(), layers_of(CONFIGS[0]))
    except (LayoutError, PlanError) as refusal:
        return str(refusal)


def test_a_combination_is_refused_for_its_reason_and_for_no_other():
    reasons: Counter[tuple[bool, str]] = Counter()
    for case in CASES:
        found, reason = compiled(case), expected_reason(case)
        if reason is None:
            assert isinstance(found, Plan), (case, found)
        else:
            assert isinstance(found, str), (case, reason)
            assert reason in found, case
        reasons[case.cp > 1, reason or "accepted"] += 1
    for in_parts in (False, True):
        found = {why: count for (parts, why), count in reasons.items() if parts is in_parts}
        print(f"\nattn_cp_size {'> 1' if in_parts else '= 1'}: {found}")
        assert found["accepted"] > 400
        assert len(found) == 7


def distinct(cases: Iterator[Case]) -> list[Case]:
    """Without those that are the same but for the name: 1, attn_tp or tp of equal size."""
    seen: dict[tuple, Case] = {}
    for case in cases:
        plan = compiled(case)
        if isinstance(plan, Plan):
            inside = plan.attention.rows is Rows.SCATTERED
            lm_head = plan.head.rows
            sizes = (case.tp, case.dp, case.cp, case.ep, case.moe_dp)
            key = (*sizes, plan.mlps, case.backend, lm_head, inside)
            seen.setdefault(key, case)
    return list(seen.values())


ACCEPTED = distinct(iter(CASES))


def expected_by_length(config_number: int, lengths: tuple[int, ...], seed: int) -> torch.Tensor:
    key = (config_number, lengths, seed)
    if key not in _EXPECTED:
        _EXPECTED[key] = whole_logits(CONFIGS[config_number], sequences_of(seed, lengths))
    return _EXPECTED[key]


_EXPECTED: dict[tuple, torch.Tensor] = {}


def steps_of(case: Case, row_multiple: int) -> Iterator[tuple[list[tuple[int, ...]], RowCounts]]:
    """Steps with every pattern of lengths, padded in both ways.

    Uneven rows are exchanged in the way that the cost model might choose and the rule does not,
    and at last as the rule says.
    """
    for pattern, in_one_buffer in zip(LENGTHS, (True, False, None), strict=True):
        by_replica = [pattern[replica % 4] for replica in range(case.dp)]
        num_real = tuple(map(sum, by_replica))
        if not any(num_real):
            continue
        rows = [
            pad_rows(num_real, has_prompts=False, row_multiple=row_multiple, mode=mode).rows
            for mode in ("max_len", "sum_len")
        ]
        for padded in dict.fromkeys(rows):
            yield by_replica, RowCounts(num_real, padded, num_real, (), in_one_buffer)


def run_case(case: Case, numbers: tuple[int, ...]) -> int:
    """Every rank's logits of every step, compared; how many steps there were.

    The collectives that were made must be the plan's, in its order, wherever shares are equal.
    """
    plan = compiled(case)
    assert isinstance(plan, Plan)
    steps = list(steps_of(case, plan.row_multiple))

    def body(rank, groups):
        replica = groups.attn_dp.rank
        for number in numbers:
            config = CONFIGS[number]
            model = build(config, groups, case.settings())
            planned = compile_plan(case.layout(), case.settings(), layers_of(config)).collectives
            for by_replica, counts in steps:
                groups.ledger.cut()
                lengths = by_replica[replica]
                here = part_of(sequences_of(replica, lengths), counts, groups)
                hidden = here.all_rows(model.forward(here.batch), counts.num_real[replica])
                logits = model.logits(hidden, counts.num_logit_rows)
                made = [(call.op, call.group) for call in groups.ledger.cut()]
                alike = len(set(counts.padded)) == 1 and (case.cp == 1 or all(counts.num_real))
                if alike and counts.padded[0] % (case.cp * groups.attn_tp.size) == 0:
                    assert made == list(planned)
                if lengths:
                    assert torch.equal(logits, expected_by_length(number, lengths, replica))
                else:
                    assert logits.shape[0] == 0

    for replica in range(case.dp):
        for number, (by_replica, _) in itertools.product(numbers, steps):
            if by_replica[replica]:
                expected_by_length(number, by_replica[replica], replica)
    run_thread_world(case.layout(), body)
    return len(steps) * len(numbers)


def run_cases(cases: list[Case], num_models: int) -> None:
    """Each case with so many of the models, in turn."""
    num_steps = 0
    with torch.inference_mode():
        for index, case in enumerate(cases):
            numbers = tuple((index + more) % len(CONFIGS) for more in range(num_models))
            try:
                num_steps += run_case(case, numbers)
            except BaseException as error:
                raise AssertionError(f"{case}: {error}") from error
    print(f"\n{len(cases)} combinations, {num_steps} steps")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_accepted_combination_equals_one_rank(tp, monkeypatch):
    install(monkeypatch)
    num_models = {1: 3, 2: 3, 4: 2}[tp]
    run_cases([case for case in ACCEPTED if case.tp == tp and case.cp == 1], num_models)


@pytest.mark.timeout(600)
def test_of_eight_ranks_some_do(monkeypatch):
    install(monkeypatch)
    run_cases([case for case in ACCEPTED if (case.tp, case.cp) == (8, 1)][::3], 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_of_eight_ranks_all_do(monkeypatch):
    install(monkeypatch)
    run_cases([case for case in ACCEPTED if (case.tp, case.cp) == (8, 1)], 1)


@pytest.mark.row("S7")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tp", [2, 4])
def test_with_context_parallelism_too(tp, monkeypatch):
    install(monkeypatch)
    run_cases([case for case in ACCEPTED if case.tp == tp and case.cp > 1], 3 if tp == 2 else 1)


@pytest.mark.row("S7")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cp", [2, 4, 8])
def test_of_eight_ranks_in_context_parallelism_some_do(cp, monkeypatch):
    install(monkeypatch)
    run_cases([case for case in ACCEPTED if (case.tp, case.cp) == (8, cp)][::16], 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cp", [2, 4, 8])
def test_of_eight_ranks_in_context_parallelism_all_do(cp, monkeypatch):
    install(monkeypatch)
    run_cases([case for case in ACCEPTED if (case.tp, case.cp) == (8, cp)], 1)
