"""Models over a symmetric arena: the same numbers, no fallback, and nothing stale is ever read."""

from collections import Counter

import msgspec
import pytest
import torch

from parallel.arena import ArenaTooSmall
from parallel.context import cut_rows
from parallel.groups import single_rank_groups
from parallel.layout import Layout
from parallel.plan import compile_plan
from parallel.thread_world import run_thread_world
from tests.workers.exact import CONFIGS, build, install, part_of, sequences_of
from tests.workers.layers.tiny import CONFIG
from tests.workers.test_exact import ACCEPTED, compiled, expected_by_length, steps_of
from workers.architectures import layers_of, plan_of
from workers.config import EngineConfig
from workers.symmetric import arena_plan, open_arena, slots_of

MAX_ROWS = 24


def poison_on_take(arena):
    """Whatever a slot held is not a number any more once it is handed out again."""

    def place(slot):
        arena._block.bytes_N[slot.offset : slot.offset + slot.num_bytes].fill_(255)
        return slot.offset

    arena.place = place


def run_case(case) -> Counter:
    """The exact model on every rank, each step compared; what its collectives ran on."""
    plan = compiled(case)
    steps = list(steps_of(case, plan.row_multiple))

    def body(rank, groups):
        config = CONFIGS[rank_independent(case)]
        planned = compile_plan(case.layout(), case.settings(), layers_of(config))
        groups.arena.open(
            slots_of(config, planned, torch.float32, num_rows=MAX_ROWS, num_logit_rows=MAX_ROWS),
            groups.by_name(),
            torch.device("cpu"),
            is_strict=True,
        )
        groups.arena.seal()
        poison_on_take(groups.arena)
        replica = groups.attn_dp.rank
        model = build(config, groups, case.settings())
        for by_replica, counts in steps:
            lengths = by_replica[replica]
            here = part_of(sequences_of(replica, lengths), counts, groups)
            hidden = here.all_rows(model.forward(here.batch), counts.num_real[replica])
            logits = model.logits(hidden, counts.num_logit_rows)
            groups.ledger.take()
            if lengths:
                number = rank_independent(case)
                assert torch.equal(logits, expected_by_length(number, lengths, replica))
        return groups.ledger.counts

    for by_replica, _ in steps:
        for replica, lengths in enumerate(by_replica):
            if lengths:
                expected_by_length(rank_independent(case), lengths, replica)
    return sum(run_thread_world(case.layout(), body), Counter())


def rank_independent(case) -> int:
    """One of the models, the same on every rank."""
    return (case.ep + case.moe_dp + case.cp + (case.dense or 0)) % len(CONFIGS)


def run_cases(cases) -> Counter:
    counts: Counter = Counter()
    with torch.inference_mode():
        for case in cases:
            try:
                counts += run_case(case)
            except BaseException as error:
                raise AssertionError(f"{case}: {error}") from error
    return counts


@pytest.mark.row("S2", "S4", "S5", "S12")
@pytest.mark.parametrize("tp", [2, 4])
def test_every_combination_on_poisoned_slots_equals_one_rank(tp, monkeypatch):
    install(monkeypatch)
    counts = run_cases(case for case in ACCEPTED if case.tp == tp and case.cp == 1)
    paths = Counter(dict.fromkeys(("symmetric", "chosen", "fallback"), 0))
    for (_, _, path, _), count in counts.items():
        paths[path] += count
    assert paths["fallback"] == 0
    assert paths["symmetric"] > paths["chosen"] > 0
    assert {reason for _, _, path, reason in counts if path == "chosen"} <= {
        "uneven_rows", "no_kernel", "dtype", "empty"
    }  # fmt: skip
    attention = {path for group, _, path, reason in counts if group == "attn_tp" and not reason}
    assert attention == {"symmetric"}
    copied = {(group, op): n for (group, op, _, reason), n in counts.items() if reason == "copied"}
    written = sum(
        n for (*_, path, reason), n in counts.items() if path == "symmetric" and not reason
    )
    assert set(copied) <= {("attn_dp", "all_gather"), ("attn_tp", "all_gather")}
    assert sum(copied.values()) < written / 10  # once a step, and ranks that have no row


@pytest.mark.row("S4", "S6", "S7")
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_parts_gather_symmetrically_over_their_own_group(tp, monkeypatch):
    """What padding holds, in slots and rows, is NaN: it reaches nothing."""
    install(monkeypatch)
    cases = [case for case in ACCEPTED if case.tp == tp and case.cp > 1]
    counts = run_cases(cases[:: {2: 1, 4: 4, 8: 40}[tp]])
    over_cp = Counter()
    for (group, op, path, reason), count in counts.items():
        assert path != "fallback"
        if group == "attn_cp":
            over_cp[op, path, reason] += count
    assert set(over_cp) == {("all_gather", "symmetric", "")}


@pytest.mark.row("S6")
def test_a_model_that_needs_more_than_the_cap_is_refused_at_start():
    config = EngineConfig(
        tp_size=2,
        enable_symm_mem=True,
        symm_mem_prealloc_gb=0.01,
        max_num_batched_tokens=100_000,
        device="cpu",
    )
    sentence = r"collectives need 0\.\d\d GiB .* symm_mem_prealloc_gb=0\.01: raise it, or lower"
    with pytest.raises(ArenaTooSmall, match=sentence):
        arena_plan(config, CONFIG, plan_of(config), torch.bfloat16)


def test_an_nccl_without_symmetric_kernels_is_refused(monkeypatch):
    monkeypatch.setattr("workers.symmetric.nccl_version", lambda: (2, 26))
    config = EngineConfig(tp_size=2, enable_symm_mem=True)
    with pytest.raises(ValueError, match=r"needs NCCL 2\.27 or later and this torch has 2\.26"):
        open_arena(
            config, CONFIG, plan_of(config), single_rank_groups(), torch.device("cuda"), torch.half
        )


@pytest.mark.row("S6")
@pytest.mark.parametrize("cp", [2, 4, 8])
def test_what_parts_gather_is_counted_for_the_longest_step(cp):
    """One chunk of max_num_batched_tokens, in a model whose sequences may be as long."""
    config = EngineConfig(
        tp_size=8,
        attn_cp_size=cp,
        enable_symm_mem=True,
        max_model_len=128,
        max_num_batched_tokens=128_001,
        symm_mem_prealloc_gb=4.0,
    )
    made = arena_plan(config, CONFIG, plan_of(config), torch.bfloat16)
    size = {slot.name: slot.num_bytes for slot in made.slots}
    longest = max(cut_rows(0, [128_001], cp).counts)
    width = 2 * max(CONFIG.num_kv_heads // (8 // cp), 1) * CONFIG.head_dim * 2
    assert size["cp_in.attn_cp"] >= longest * width
    assert size["cp_kv.attn_cp"] >= cp * longest * width > (cp - 1) * size["cp_in.attn_cp"]
    rest = made.num_bytes - size["cp_kv.attn_cp"]
    small = msgspec.structs.replace(config, symm_mem_prealloc_gb=rest / 2**30)
    with pytest.raises(ArenaTooSmall, match="raise it, or lower max_num_batched_tokens"):
        arena_plan(small, CONFIG, plan_of(small), torch.bfloat16)


@pytest.mark.row("S1")
def test_slots_are_of_the_groups_that_the_plan_talks_over():
    def groups_of(layout, config):
        plan = compile_plan(layout, EngineConfig().plan_settings, layers_of(config))
        made = slots_of(config, plan, torch.bfloat16, num_rows=8, num_logit_rows=8)
        return {(slot.role, *slot.groups) for slot in made.slots}

    assert groups_of(Layout(tp_size=2), CONFIG) == {
        ("embedded", "attn_tp"),
        ("reduced", "attn_tp"),
        ("reduced", "tp"),
        ("logits", "attn_tp"),
        ("all_logits", "attn_tp"),
    }
    split = Layout(tp_size=4, dp_size=2, enable_dp_attention=True)
    assert groups_of(split, CONFIG) >= {
        ("reduced", "attn_tp"),
        ("scattered", "attn_tp"),
        ("gather_in", "tp"),
        ("global_dp", "tp"),
        ("reduced", "tp"),
        ("local_dp", "tp"),
    }
    assert groups_of(Layout(), CONFIG) == set()
