"""Train the bundled model from nothing, measure it, and write its checkpoint.

    python -m workers.bundled.train --device cuda --minutes 7 --out workers/bundled/model

The learning rate falls with whichever is further gone, the steps or the minutes, so a run on any
machine ends annealed and in time; the final measurement and the writing come after it. Every step
reads one batch of short rows and one of long rows, of equally many tokens. Weights are rounded to
bf16 before they are measured. Needs torch and nothing else.
"""

import argparse
import copy
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn import functional

from workers.bundled.checkpoint import save_checkpoint, save_json
from workers.bundled.network import Network, NetworkConfig, padded
from workers.bundled.questions import ADDITION, COUNTING, REVERSING, TASKS, Pair, held_out
from workers.bundled.rows import (
    LONG,
    SHORT,
    SYSTEM_MESSAGES,
    RowKind,
    answer_ids,
    pack_rows,
    prompt_ids,
)

FINAL_SAMPLE = {ADDITION: 2000, COUNTING: 300, REVERSING: 300}
INTERIM_SAMPLE = {ADDITION: 1000, COUNTING: 100, REVERSING: 300}
NUM_CHATS = 500

FINAL_SEED, INTERIM_SEED = 0, 1
"""Seeds of the held-out samples; the best weights are chosen by another sample than reported."""

BALANCE_WEIGHT = 0.01
NUM_WARMUP_STEPS = 200
FINAL_RATE = 0.01
NUM_INTERIMS = 16
STEPS_PER_LINE = 100
ROWS_PER_JOB = 2000
EVALUATION_TOKENS = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What distinguishes one training run from another."""

    out: Path
    steps: int
    seed: int
    device: torch.device
    minutes: float
    """Of the wall clock, from making the data to the last step."""

    rows: int
    """Short rows made before training; the long rows hold as many tokens."""

    batch_tokens: int
    """Tokens of each kind of row in a step."""

    peak_rate: float
    compile: bool


@dataclass(frozen=True, slots=True)
class Pool:
    """All the training rows of one kind, on one device."""

    ids: Tensor
    """(N, T) int16; T is one more than the network reads."""

    weights: Tensor
    """(N, T) uint8, 0 where the token is not part of an answer."""

    def sample(self, num_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        num_pooled, length = self.ids.shape
        num_rows = max(1, num_tokens // (length - 1))
        indices = torch.randint(
            num_pooled, (num_rows,), generator=generator, device=self.ids.device
        )
        return self.ids[indices].long(), self.weights[indices].float()


def make_pools(run: Run) -> list[Pool]:
    """The short and the long pool, made by as many processes as there are cores."""
    # NOTE: forked, and therefore before CUDA is first used.
    num_cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(num_cores) as processes:
        pools = [_make_pool(run, kind, processes.starmap) for kind in (SHORT, LONG)]
    return [Pool(pool.ids.to(run.device), pool.weights.to(run.device)) for pool in pools]


def _make_pool(run: Run, kind: RowKind, starmap: Callable[..., list[tuple[bytes, bytes]]]) -> Pool:
    num_rows = max(1, run.rows * SHORT.length // kind.length)
    starts = range(0, num_rows, ROWS_PER_JOB)
    jobs = [
        (f"{run.seed} {kind.length} {start}", min(ROWS_PER_JOB, num_rows - start), kind)
        for start in starts
    ]
    parts = starmap(pack_rows, jobs, 1)
    ids = torch.frombuffer(bytearray(b"".join(part[0] for part in parts)), dtype=torch.int16)
    weights = torch.frombuffer(bytearray(b"".join(part[1] for part in parts)), dtype=torch.uint8)
    shape = (num_rows, kind.length)
    return Pool(ids.view(shape), weights.view(shape))


def train(network: Network, pools: Sequence[Pool], run: Run, *, started: float) -> int:
    """Leave the best weights in `network`; the number of steps taken."""
    decayed = [weight for weight in network.parameters() if weight.dim() > 1]
    scales = [weight for weight in network.parameters() if weight.dim() == 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": scales, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    forward = torch.compile(network) if run.compile else network
    generator = torch.Generator(run.device).manual_seed(run.seed)
    best_score, best_weights = -1.0, copy.deepcopy(network.state_dict())
    next_interim = 1 / NUM_INTERIMS
    for step in itertools.count():
        progress = max(step / run.steps, (time.monotonic() - started) / (60 * run.minutes))
        if progress >= next_interim or progress >= 1:
            score = sum(measure(network, INTERIM_SAMPLE, INTERIM_SEED).values())
            if score >= best_score:
                best_score, best_weights = score, copy.deepcopy(network.state_dict())
            next_interim = progress + 1 / NUM_INTERIMS
        if progress >= 1:
            network.load_state_dict(best_weights)
            return step
        for group in optimiser.param_groups:
            group["lr"] = run.peak_rate * rate_at(step, progress)
        losses = []
        for pool in pools:
            ids_BT, weights_BT = pool.sample(run.batch_tokens, generator)
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.device.type == "cuda"):
                logits_BTV, imbalance = forward(ids_BT[:, :-1])
            loss = answer_loss(logits_BTV, ids_BT[:, 1:], weights_BT[:, 1:])
            (loss + BALANCE_WEIGHT * imbalance).backward()
            losses += [loss.detach(), imbalance.detach()]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % STEPS_PER_LINE == 0:
            short, _, long, imbalance = (float(value) for value in losses)
            print(
                f"step {step}  {time.monotonic() - started:.0f} s  progress {progress:.3f}  "
                f"loss {short:.4f} short {long:.4f} long  imbalance {imbalance:.2f}",
                flush=True,
            )
    raise RuntimeError("unreachable: the loop ends with its last step")


def rate_at(step: int, progress: float) -> float:
    """Share of the peak learning rate: a linear warm-up, then half a cosine."""
    cosine = FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2
    return min(1.0, (step + 1) / NUM_WARMUP_STEPS) * cosine


def answer_loss(logits_BTV: Tensor, targets_BT: Tensor, weights_BT: Tensor) -> Tensor:
    losses = functional.cross_entropy(
        logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none"
    )
    weights = weights_BT.flatten()
    return (losses * weights).sum() / weights.sum().clamp(min=1)


def measure(network: Network, sample: Mapping[str, int], seed: int) -> dict[str, float]:
    """Share of held-out questions answered exactly, by task."""
    shares = {}
    for task, num_questions in sample.items():
        pairs = held_out(task, num_questions, seed)
        shares[task] = share_right(
            network, [(prompt_ids([question]), answer_ids(reply)) for question, reply in pairs]
        )
    print("held out: " + ", ".join(f"{k} {v:.4f}" for k, v in shares.items()), flush=True)
    return shares


@torch.inference_mode()
def share_right(network: Network, cases: Sequence[tuple[list[int], list[int]]]) -> float:
    """Share of (prompt, answer) whose greedy continuation is the answer, end token included.

    The answer is fed and every token must be the likeliest after those before it: the greedy
    continuation equals the answer exactly when that holds, and one forward pass tells.
    """
    device = network.model.embed_tokens.weight.device
    by_length = sorted(cases, key=lambda case: len(case[0]) + len(case[1]), reverse=True)
    num_right = start = 0
    while start < len(by_length):
        longest = sum(map(len, by_length[start]))
        batch = by_length[start : start + max(1, EVALUATION_TOKENS // longest)]
        start += len(batch)
        logits_BTV, _ = network(padded([prompt + reply[:-1] for prompt, reply in batch], device))
        likeliest = logits_BTV.argmax(-1).tolist()
        for tokens, (prompt, reply) in zip(likeliest, batch, strict=True):
            first = len(prompt) - 1
            num_right += tokens[first : first + len(reply)] == reply
    return num_right / len(cases)


def chat_cases(n: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Held-out additions asked last in a chat with a system message and two earlier turns."""
    rng = Random(f"chats {seed}")
    earlier: dict[str, list[Pair]] = {task: held_out(task, n, seed + 1) for task in TASKS}
    cases = []
    for i, (question, reply) in enumerate(held_out(ADDITION, n, seed)):
        turns = [earlier[rng.choice((ADDITION, REVERSING))][i], earlier[COUNTING][i]]
        rng.shuffle(turns)
        prompt = prompt_ids(
            [turn[0] for turn in turns] + [question],
            [turn[1] for turn in turns],
            rng.choice(SYSTEM_MESSAGES),
        )
        cases.append((prompt, answer_ids(reply)))
    return cases


def round_to_bf16(network: Network) -> None:
    for weight in network.parameters():
        weight.data = weight.data.bfloat16().float()


def run_training(run: Run) -> None:
    started = time.monotonic()
    pools = make_pools(run)
    for pool in pools:
        print(f"{len(pool.ids)} rows of {pool.ids.shape[1]} tokens", flush=True)
    config = NetworkConfig()
    network = Network(config)
    network.initialise(torch.Generator().manual_seed(run.seed))
    network.to(run.device)
    num_parameters = sum(weight.numel() for weight in network.parameters())
    print(f"{num_parameters} parameters", flush=True)

    steps = train(network, pools, run, started=started)
    trained_s = time.monotonic() - started
    round_to_bf16(network)
    weights = {name: weight.cpu() for name, weight in network.state_dict().items()}
    save_checkpoint(run.out, config, weights)

    accuracy = measure(network, FINAL_SAMPLE, FINAL_SEED)
    in_chat = share_right(network, chat_cases(NUM_CHATS, FINAL_SEED))
    in_bf16 = measure(copy.deepcopy(network).bfloat16(), FINAL_SAMPLE, FINAL_SEED)
    is_cuda = run.device.type == "cuda"
    report = {
        "seed": run.seed,
        "steps": steps,
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(run.device) if is_cuda else "cpu",
        "torch": torch.__version__,
        "wall_s": round(trained_s, 1),
        "tokens_a_step": len(pools) * run.batch_tokens,
        "peak_rate": run.peak_rate,
        "num_parameters": num_parameters,
        "num_held_out": FINAL_SAMPLE,
        "accuracy": accuracy,
        "accuracy_computed_in_bf16": in_bf16,
        "addition_accuracy_in_chats": in_chat,
    }
    save_json(run.out / "training.json", report)
    print(report, flush=True)


def parse_run() -> Run:
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=40000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--rows", type=int, default=1_000_000, help="short rows to train on")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--peak-rate", type=float, default=2e-3)
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    options = parser.parse_args()
    return Run(**vars(options))


if __name__ == "__main__":
    run_training(parse_run())
