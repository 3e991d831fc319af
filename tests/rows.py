"""The rows of the mission, and the mutations of the code that must turn their tests red.

A row (S1, ..., C6) is a behaviour. A test shows it by `@pytest.mark.row("S1")` on the function (or
in a module's `pytestmark`), and a `Mutation` here breaks it: `path` in a copy of the tree has `old`
replaced by `new`, and of the tests marked with the row at least one must fail then. A test that
stays green whatever the code does shows nothing; this is how it is found out.

    make rows                            every row
    python -m tests.rows S1 S4           some
    python -m tests.rows --list          the table alone

To add a row: mark its tests, and append to `MUTATIONS` a `Mutation(row, name, path, old, new)`
with `old` a text that is in `path` exactly once (take whole lines) and `name` what is then broken.
One row may have several. A mutation must leave the code importable: a test that fails to start
proves nothing and is reported as such. Tests of a row need not be quick, but they must be green
without the mutation, which is tried first; a row whose tests need GPUs is skipped without them.
"""

import argparse
import ast
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = (".git", ".*venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "build")
TIME_LIMIT_S = 1500.0
GREEN, RED, NOTHING_RAN = 0, 1, 5
"""Exit codes of pytest."""


class Mutation(NamedTuple):
    row: str
    name: str
    """What is broken, in a few words."""
    path: str
    old: str
    new: str


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "S1",
        "a communicator for every group, not for every list of members",
        "parallel/groups.py",
        "            if members not in transports:\n",
        "            if True:\n",
    ),
    Mutation(
        "S1",
        "only the TP group is registered",
        "parallel/arena.py",
        "    for name in GROUP_NAMES:\n        transport = groups[name].transport\n",
        "    for name in GROUP_NAMES[:1]:\n        transport = groups[name].transport\n",
    ),
    Mutation(
        "S2",
        "one gate for all groups",
        "parallel/symmetric.py",
        "    return not group.is_shared or group.arena.rows_are_even\n",
        "    return group.arena.rows_are_even\n",
    ),
    Mutation(
        "S2",
        "row-parallel products in ordinary memory",
        "parallel/symmetric.py",
        "    return None if memory is None else memory.empty(shape, like)\n",
        "    return None\n",
    ),
    Mutation(
        "S2",
        "no gate",
        "parallel/symmetric.py",
        "    return not group.is_shared or group.arena.rows_are_even\n",
        "    return True\n",
    ),
    Mutation(
        "S2",
        "norms write anywhere, and gathers copy",
        "workers/layers/communicator.py",
        "        if self._gathered_over is None or split is None:\n",
        "        if True:\n",
    ),
    Mutation(
        "S2",
        "a way to sum is taken that is wrong on one rank",
        "parallel/sums.py",
        "        path: tuple(max(figures) for figures in zip(",
        "        path: tuple(min(figures) for figures in zip(",
    ),
    Mutation(
        "S4",
        "the rows of all replicas are asked for of another group",
        "parallel/dp_attention.py",
        "        out = get_global_dp_buffer(tp, _times(tp, x_SD), x_SD)\n",
        "        out = get_local_dp_buffer(tp, _times(tp, x_SD), x_SD)\n",
    ),
    Mutation(
        "S4",
        "memory of any group will do",
        "parallel/arena.py",
        "        return id(transport) in self._users[slot.name]\n",
        "        return True\n",
    ),
    Mutation(
        "S1",
        "an engine does not open its arena",
        "workers/runner.py",
        "    if config.enable_symm_mem:\n",
        "    if False:\n",
    ),
    Mutation(
        "S5",
        "nobody asks where memory is registered",
        "parallel/symmetric.py",
        "    if not group.arena.is_registered(group.transport):\n",
        "    if False:\n",
    ),
    Mutation(
        "S5",
        "memory is registered after ready",
        "parallel/arena.py",
        "        if self._is_sealed:\n",
        "        if False:\n",
    ),
    Mutation(
        "S6",
        "the cap on symmetric memory is not kept",
        "parallel/arena.py",
        "        if self.num_bytes <= cap_gb * GIB:\n",
        "        if True:\n",
    ),
    Mutation(
        "S6",
        "keys and values are waited for before anything else is computed",
        "parallel/collectives.py",
        "    pending = PendingGather(group, x_TD, out, transport.start_all_gather(out, x_TD))\n",
        "    transport.start_all_gather(out, x_TD)()\n"
        "    pending = PendingGather(group, x_TD, out, lambda: None)\n",
    ),
    Mutation(
        "S6",
        "keys and values are not waited for",
        "parallel/collectives.py",
        "        self._finish()\n",
        "",
    ),
    Mutation(
        "S6",
        "a gather that nobody waits for is forgotten",
        "parallel/groups.py",
        "        if self._begun:\n",
        "        if False:\n",
    ),
    Mutation(
        "S6",
        "parts are padded to their own length, not to the longest",
        "parallel/context.py",
        "        return max(self.counts)\n",
        "        return min(self.counts)\n",
    ),
    Mutation(
        "S6",
        "what parts keep is gathered into the TP group's memory",
        "parallel/context_gather.py",
        '        out = self._memory("cp_kv", send_LC, shape)\n',
        "        out = get_local_dp_buffer(self._group, shape, send_LC)\n",
    ),
    Mutation(
        "S6",
        "a replica's parts are not counted in the arena",
        "parallel/arena.py",
        '        Need("cp_kv", ("attn_cp",), num_parts * cached),\n',
        '        Need("cp_kv", ("attn_cp",), cached),\n',
    ),
    Mutation(
        "S7",
        "rows of parts are stored in the order in which they come",
        "parallel/context_gather.py",
        "        return self.pending.wait().index_select(0, self.places_U)\n",
        "        return self.pending.wait()[: len(self.places_U)]\n",
    ),
    Mutation(
        "S7",
        "each part stores its own rows twice",
        "parallel/context.py",
        "        return Places(self.longest, self.part_T * self.longest + self.row_T)\n",
        "        return Places(self.longest, self.row_T)\n",
    ),
    Mutation(
        "S7",
        "chunks are cut straight, not zigzag",
        "parallel/context.py",
        "np.concatenate([forth, forth[::-1]])",
        "np.repeat(forth, 2)",
    ),
    Mutation(
        "S7",
        "a part's rows of a chunk begin where the chunk does",
        "workers/context.py",
        "            start = chunk.start + piece.first\n",
        "            start = chunk.start\n",
    ),
    Mutation(
        "S3",
        "a sparse model's dense layers sum over one replica whatever the plan says",
        "workers/models/qwen3_moe.py",
        "        mlp = GatedMLP(build, prefix, place=place)\n",
        "        mlp = GatedMLP(build, prefix, place=build.plan.attention)\n",
    ),
    Mutation(
        "S3",
        "Llama forgets replicas",
        "workers/models/llama.py",
        "    mlp = GatedMLP(build, prefix, place=build.plan.mlps[layer], bias=config.mlp_bias)\n",
        "    mlp = GatedMLP(build, prefix, place=build.plan.attention, bias=config.mlp_bias)\n",
    ),
    Mutation(
        "S8",
        "rows are rounded up although attention gathers them itself",
        "parallel/plan.py",
        "            return num_parts  # the block pads inside its own collectives\n",
        "            return num_parts * self.layout.attn_tp_size\n",
    ),
    Mutation(
        "S8",
        "attention sums scattered rows with those of other shares",
        "workers/layers/whole_rows.py",
        "    return Activation(sum_to_shares(out_TD, split, attn_tp), rows)\n",
        "    return Activation(out_TD[: split.num_share], rows)\n",
    ),
    Mutation(
        "S8",
        "a lone decode is padded to a bucket of more rows",
        "parallel/padding.py",
        "SMALL_BUCKETS = range(1, 9)\n",
        "SMALL_BUCKETS = range(2, 9)\n",
    ),
    Mutation(
        "S9",
        "the attention-TP size for dense layers is taken for 1",
        "parallel/plan.py",
        "    if layout.moe_dense_tp_size == layout.attn_tp_size:\n",
        "    if layout.moe_dense_tp_size == 0:\n",
    ),
    Mutation(
        "S9",
        "tp_size for dense layers is no synonym of unset",
        "parallel/plan.py",
        "    if layout.moe_dense_tp_size in (None, layout.tp_size):\n",
        "    if layout.moe_dense_tp_size is None:\n",
    ),
    Mutation(
        "S10",
        "a tie is not padded to the longest",
        "parallel/padding.py",
        'return "max_len" if 2 * sum(num_rows) >= max',
        'return "max_len" if 2 * sum(num_rows) > max',
    ),
    Mutation(
        "S10",
        "computing a row of padding costs nothing",
        "parallel/padding_cost.py",
        "_at(curves.rows, figures, moved) + _at(curves.rows, curves.mlps, total)",
        "_at(curves.rows, figures, moved)",
    ),
    Mutation(
        "S10",
        "a tie of two modes is not padded to the longest",
        "parallel/padding_cost.py",
        "    return min(every, key=costs.of)\n",
        "    return min(reversed(every), key=costs.of)\n",
    ),
    Mutation(
        "S10",
        "padding is timed at too few sizes to know where cost has kinks",
        "workers/padding_times.py",
        "SHARES = (FEW, MANY, 32, 2048, 8, 128, 512, 8192, 64, 1024, 4096, 16, 4, 2)\n",
        "SHARES = (FEW, MANY, 32, 2048)\n",
    ),
    Mutation(
        "S10",
        "the quickest rank's figures stand for all",
        "parallel/padding_cost.py",
        "        slow = [max(each) for each in zip(*figures, strict=True)]\n",
        "        slow = [min(each) for each in zip(*figures, strict=True)]\n",
    ),
    Mutation(
        "S10",
        "the way to exchange uneven rows is not what the header says",
        "workers/step.py",
        "                IN_ONE_BUFFER.get(header.padding),\n",
        "",
    ),
    Mutation(
        "S10",
        "a request does not go to where its beginning is cached",
        "deployments/scheduler.py",
        "scheduler.remaining_tokens + num_tokens - scheduler.num_cached_tokens(page_names)",
        "scheduler.remaining_tokens + num_tokens",
    ),
    Mutation(
        "S10",
        "a request goes to the replica that has its beginning, whatever that has to do",
        "deployments/scheduler.py",
        "scheduler.remaining_tokens + num_tokens - scheduler.num_cached_tokens(page_names)",
        "num_tokens - scheduler.num_cached_tokens(page_names)",
    ),
    Mutation(
        "S10",
        "prompts wait for others that nobody has asked for",
        "deployments/alignment.py",
        "    num_queues = sum(count > 0 for count in num_waiting)\n",
        "    num_queues = len(num_waiting)\n",
    ),
    Mutation(
        "S10",
        "a prompt waits for others without end",
        "deployments/alignment.py",
        "    if num_open == 0 or num_held >= most or num_reading or sum",
        "    if num_open == 0 or num_reading or sum",
    ),
    Mutation(
        "S10",
        "prompts begin when they come, whatever was set",
        "deployments/gang.py",
        "                    most_held=self.config.prefill_delayer_max_delay_passes,\n",
        "",
    ),
    Mutation(
        "S10",
        "attention sees padding",
        "workers/layers/attention.py",
        "        num_real = num_rows if split is None else split.num_real\n",
        "        num_real = num_rows\n",
    ),
    Mutation(
        "S11",
        "padding chooses experts",
        "workers/layers/moe.py",
        "        if live_T is not None:\n",
        "        if False:\n",
    ),
    Mutation(
        "S11",
        "a row is sent only to a rank that has all its experts",
        "workers/layers/dispatch.py",
        "        goes_TW = (peer_TK.unsqueeze(2) == ranks_W).any(1)\n",
        "        goes_TW = (peer_TK.unsqueeze(2) == ranks_W).all(1)\n",
    ),
    Mutation(
        "S11",
        "experts that all rows go through are left out where rows are sent",
        "workers/layers/moe.py",
        "        if self._shared is not None:\n            out_TD",
        "        if self._shared is not None and self._all_to_all is None:\n            out_TD",
    ),
    Mutation(
        "S11",
        "a row chooses outside its best groups",
        "workers/layers/moe.py",
        "    if num_groups_chosen < num_groups:\n",
        "    if False:\n",
    ),
    Mutation(
        "S6",
        "the arena has no room for an indexer's keys",
        "workers/symmetric.py",
        "        return latent.rank + model.head_dim + index\n",
        "        return latent.rank + model.head_dim\n",
    ),
    Mutation(
        "S7",
        "sparse attention reads all tokens",
        "kernels/latent_attention.py",
        "    if num_chosen >= score_TL.shape[1]:\n",
        "    if True:\n",
    ),
    Mutation(
        "S7",
        "a part keeps its own latents alone",
        "workers/layers/latent_attention.py",
        "        pending = None if context is None else context.start(kept_TC)\n",
        "        pending = None\n",
    ),
    Mutation(
        "S14",
        "a rank may have compiled another collective plan",
        "deployments/gang.py",
        "        if ready.plan != self.plan.digest:\n",
        "        if False:\n",
    ),
    Mutation(
        "S14",
        "a part of a sum passes for the sum",
        "parallel/dp_attention.py",
        "        if self.owed is not None or self.rows is not rows:\n",
        "        if self.rows is not rows:\n",
    ),
    Mutation(
        "S14",
        "a stream that the next layer wants whole stays scattered",
        "parallel/plan.py",
        "    whole = at is Rows.SCATTERED and target is stream is Rows.TP_ATTN_FULL\n",
        "    whole = False\n",
    ),
    Mutation(
        "S12",
        "offsets are not compared",
        "parallel/groups.py",
        "{tuple(c.shape)} {c.path} {c.places}",
        "{tuple(c.shape)} {c.path}",
    ),
    Mutation(
        "S12",
        "gathers and scatters in place",
        "parallel/collectives.py",
        "    if first.data_ptr() + first.nbytes > second.data_ptr():\n",
        "    if False:\n",
    ),
    Mutation(
        "S12",
        "padding of a captured step is routed to experts",
        "parallel/dp_attention.py",
        "        if self._num_live_P is None and self._rows == self._num_real:\n",
        "        if self._rows == self._num_real:\n",
    ),
    Mutation(
        "S12",
        "nobody compares what ranks have captured",
        "deployments/gang.py",
        "        self._refuse_unlike_graphs()\n",
        "",
    ),
    Mutation(
        "S11",
        "padding of a replayed step with prompts is routed to experts",
        "workers/prompt_graphs.py",
        "    inputs.num_live_P[:] = num_live\n",
        "    inputs.num_live_P[:] = sizes.num_rows\n",
    ),
    Mutation(
        "S12",
        "idle replicas are not padded to the bucket",
        "deployments/domain.py",
        "            return bucket, padding, (bucket,) * len(num_rows)\n",
        "            return bucket, padding, tuple(bucket if n else 0 for n in num_rows)\n",
    ),
    Mutation(
        "S12",
        "a replay goes on from rows that an eager step has left behind",
        "workers/graphs.py",
        'are no longer the newest."""\n        self._slots = None\n',
        'are no longer the newest."""\n',
    ),
    Mutation(
        "S12",
        "every graph keeps logits of its own",
        "workers/graphs.py",
        "        logits_BV = self._model.logits(hidden_BD, every, out=out)\n",
        "        logits_BV = self._model.logits(hidden_BD, every)\n",
    ),
    Mutation(
        "S12",
        "ranks capture before their symmetric memory is final",
        "workers/worker.py",
        "        groups.arena.seal()\n        link.send(self._ready(runner))\n",
        "        link.send(self._ready(runner))\n",
    ),
    Mutation(
        "S12",
        "memory is registered inside a capture",
        "parallel/arena.py",
        "        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():\n",
        "        if False:\n",
    ),
    Mutation(
        "S12",
        "the residual stream stays in a slot that is written again",
        "parallel/symmetric.py",
        "    return x.clone() if group.arena.is_open and group.arena.find(x) is not None else x\n",
        "    return x\n",
    ),
    Mutation(
        "S12",
        "rows that fill a step with prompts up are stored on somebody's page",
        "workers/prompt_graphs.py",
        "    inputs.places_T[num_rows:] = spare_place\n",
        "    inputs.places_T[num_rows:] = 0\n",
    ),
    Mutation(
        "S12",
        "a step with more chunks than its graph has room for is replayed",
        "parallel/padding.py",
        "[each for each in buckets if chunks <= chunks_in_bucket(each)]",
        "buckets",
    ),
    Mutation(
        "S13",
        "a replayed step with prompts reads only the first of them",
        "workers/prompt_graphs.py",
        "        blocks_M4 = cut_chunks(chunk.span for chunk in rows.chunks)\n",
        "        blocks_M4 = cut_chunks(chunk.span for chunk in rows.chunks[:1])\n",
    ),
    Mutation(
        "S13",
        "heads that share keys are taken for tokens that follow each other",
        "kernels/paged_prefill.py",
        "    positions = first_token + rows // SHARING\n",
        "    positions = first_token + rows\n",
    ),
    Mutation(
        "S13",
        "a block of rows has no program for its last ones",
        "kernels/paged_prefill.py",
        "    num_programs = triton.cdiv(BLOCK_ROWS, tiles.rows // sharing)\n",
        "    num_programs = BLOCK_ROWS // (tiles.rows // sharing)\n",
    ),
    Mutation(
        "S13",
        "rows that are no decodes are cut as if they read a token",
        "kernels/paged_decode.py",
        "        reads = here & (blocks > 0)\n",
        "        reads = here\n",
    ),
    Mutation(
        "S13",
        "buckets are captured at another size than their own",
        "workers/graphs.py",
        "        rows = self._rows(bucket)\n",
        "        rows = self._rows(self.buckets[-1])\n",
    ),
    Mutation(
        "S13",
        "experts run the tiles that were measured at the largest size",
        "kernels/expert_tiles.py",
        "        return self.measured[near]\n",
        "        return self.measured[sizes[-1]]\n",
    ),
    Mutation(
        "S13",
        "parts of a sequence are added up as if all weighed the same",
        "kernels/paged_decode.py",
        "        shrink, grow = tl.exp2(highest - new_highest), tl.exp2(weight - new_highest)\n",
        "        shrink, grow = tl.exp2(highest - highest), tl.exp2(weight - weight)\n",
    ),
    Mutation(
        "S13",
        "the draw of a row depends on where in the batch it stands",
        "kernels/draw.py",
        "    position = zero + tl.load(position_ptr + row).to(tl.int32)\n",
        "    position = zero + row.to(tl.int32) + tl.load(position_ptr + row).to(tl.int32)\n",
    ),
    Mutation(
        "S13",
        "only a step's first prompt is read",
        "workers/gpu_attention.py",
        "(chunk.span for chunk in rows.chunks)",
        "(chunk.span for chunk in rows.chunks[:1])",
    ),
    Mutation(
        "S13",
        "an indexer's captured rows choose among the last step's tokens",
        "workers/gpu_latent_attention.py",
        "        self._longest = self._max_model_len\n",
        "",
    ),
    Mutation(
        "S13",
        "a decode reads the keys of an e4m3 cache without their scale",
        "kernels/paged_decode.py",
        "        (scale if scales.key is None else scale * scales.key) * LOG2_E,\n",
        "        scale * LOG2_E,\n",
    ),
    Mutation(
        "S13",
        "queries in bfloat16 are not made float16 where e4m3 is",
        "kernels/fp8.py",
        "    return q_dtype == torch.bfloat16 and cache_dtype == E4M3\n",
        "    return False\n",
    ),
    Mutation(
        "S13",
        "e4m3 is rounded towards zero",
        "kernels/rope_store.py",
        "    return (x + large) - large\n",
        "    return x\n",
    ),
    Mutation(
        "C1",
        "a stream ends without [DONE]",
        "deployments/service.py",
        '    await exchange.write(last + event_of(b"[DONE]"), more=False)\n',
        "    await exchange.write(last, more=False)\n",
    ),
    Mutation(
        "C2",
        "data-parallel replicas get no GPUs",
        "helm/templates/_engine.tpl",
        "{{ mul (int .Values.engine.tp_size) (int .Values.engine.dp_size) }}",
        "{{ int .Values.engine.tp_size }}",
    ),
    Mutation(
        "C3",
        "a torn last line stays in the output",
        "deployments/batch_files.py",
        "        self._file.truncate(size)\n        if lacks_end:\n",
        "        if lacks_end:\n",
    ),
    Mutation(
        "C4",
        "ranks are laid out in the order of the bundles, not of the nodes",
        "deployments/placement.py",
        "        key=lambda i: (bundle_nodes[i] != driver_node, bundle_nodes[i], i),\n",
        "        key=lambda i: i,\n",
    ),
    Mutation(
        "C5",
        "prompts are read at once, whatever was set",
        "deployments/gang.py",
        "                    prompt_interval=self.config.prefill_decode_interval,\n",
        "",
    ),
    Mutation(
        "C5",
        "a Ray call for every message of tokens",
        "deployments/driver_client.py",
        "            case Tokens():\n",
        "            case Tokens():\n                asyncio.ensure_future(self._locate())\n",
    ),
    Mutation(
        "C6",
        "generations that end are not counted",
        "deployments/counting.py",
        "        setattr(self, outcome, getattr(self, outcome) + num)\n",
        "        setattr(self, outcome, getattr(self, outcome))\n",
    ),
)


class Verdict(NamedTuple):
    row: str
    what: str
    word: str
    is_good: bool
    seconds: float


def files_of(row: str, tests: Path = ROOT / "tests") -> list[Path]:
    """The test files in which `row` is marked."""
    return [path for path in sorted(tests.rglob("test_*.py")) if row in rows_in(path.read_text())]


def rows_in(source: str) -> set[str]:
    """The rows that a test file names in calls of `pytest.mark.row`."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {
        str(argument.value)
        for call in calls
        if ast.unparse(call.func) == "pytest.mark.row"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }


def copy_tree(folder: Path) -> Path:
    """A copy of the tree as it lies here, committed or not."""
    return Path(shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*NOT_COPIED)))


def mutate(tree: Path, mutation: Mutation) -> str:
    """Apply the mutation; the file's text before."""
    path = tree / mutation.path
    before = path.read_text()
    if before.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.row}: {mutation.path} has the text {mutation.old!r} "
            f"{before.count(mutation.old)} times and must have it once"
        )
    path.write_text(before.replace(mutation.old, mutation.new))
    return before


def run_row(tree: Path, row: str) -> int | None:
    """pytest's exit code for the tests of one row in `tree`; None if they are not done in time."""
    found = sorted(files_of(row, tree / "tests"), key=lambda path: path.parent.name == "e2e")
    files = [str(path.relative_to(tree)) for path in found]  # the slow ones last
    if not files:
        return NOTHING_RAN
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, "--row", row, *files],
            cwd=tree,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode not in (GREEN, RED):
        print(done.stdout[-3000:], done.stderr[-1000:], file=sys.stderr)
    all_skipped = done.returncode == GREEN and " passed" not in done.stdout
    return NOTHING_RAN if all_skipped else done.returncode


def judge(tree: Path, rows: Sequence[str]) -> Iterator[Verdict]:
    """Each row's tests as the tree is, then under each of the row's mutations."""
    for row in rows:
        start = time.monotonic()
        code = run_row(tree, row)
        word = {GREEN: "green", RED: "RED WITHOUT A MUTATION", NOTHING_RAN: "nothing ran here"}
        said = word.get(code, "DID NOT RUN") if code is not None else "NOT DONE IN TIME"
        is_good = code in (GREEN, NOTHING_RAN)
        yield Verdict(row, "the tree as it is", said, is_good, time.monotonic() - start)
        if code != GREEN:
            continue
        for mutation in MUTATIONS:
            if mutation.row == row:
                yield judge_mutation(tree, mutation)


def judge_mutation(tree: Path, mutation: Mutation) -> Verdict:
    start = time.monotonic()
    before = mutate(tree, mutation)
    try:
        code = run_row(tree, mutation.row)
    finally:
        (tree / mutation.path).write_text(before)
    said = {GREEN: "STAYED GREEN", RED: "red", None: "NOT DONE IN TIME"}.get(code, "DID NOT RUN")
    return Verdict(mutation.row, mutation.name, said, code == RED, time.monotonic() - start)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rows", description=__doc__)
    parser.add_argument("row", nargs="*", help="rows to try; none tries all")
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    args = parser.parse_args(argv)
    known = list(dict.fromkeys(mutation.row for mutation in MUTATIONS))
    unknown = [row for row in args.row if row not in known]
    if unknown:
        parser.error(f"no mutation of row {unknown[0]}; there are {', '.join(known)}")
    if args.list:
        for mutation in MUTATIONS:
            print(f"{mutation.row:4} {mutation.path:32} {mutation.name}")
        return 0
    num_bad = 0
    with tempfile.TemporaryDirectory(prefix="lockstep-rows-") as folder:
        tree = copy_tree(Path(folder))
        for verdict in judge(tree, args.row or known):
            num_bad += not verdict.is_good
            print(
                f"{verdict.row:4} {verdict.word:22} {verdict.seconds:6.1f} s  {verdict.what}",
                flush=True,
            )
    print(f"{num_bad} not as they must be" if num_bad else "every mutation was noticed")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
