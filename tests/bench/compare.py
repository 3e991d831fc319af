"""Us beside another engine, on one machine in one run: ours, the peer, ours, model by model.

    python -m tests.bench.compare --models 8b 0.6b --peer-name "vLLM 0.24.0" --deadline-s 570 \\
        --peer-command "python3 -m tests.bench.peer_vllm {model} {tp}" --peer-path /tmp/vs
    python -m tests.bench.compare --from-lines compare.jsonl        # the rows of an earlier run

The peer is any command that prints one JSON line a case, `{"case": "bs1_tpot_ms", "value": 5.1}`;
`{model}` and `{tp}` are filled in, and it may have packages (`--peer-path`) and variables
(`--peer-env NAME=VALUE`) of its own. Every run is a process with a time limit. Our first run of a
model checks its tokens (`lockstep bench offline`), the others only measure.

Lines are kept in `compare.jsonl` as they come, rows in `ratios.csv` after each model: percentiles
of each side over its runs, and the ratio of the medians, ours over the peer's. When `--deadline-s`
is over, or on SIGTERM, what there is so far is written. A table says which goals are met. The exit
code is 1 if a run failed or a token was wrong.
"""

import argparse
import csv
import datetime
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.ratios import Line, Row, read_line, rows_of, table, unit_of
from tests.bench.results import FOLDER, commit, device_name, percentiles, versions
from tests.bench.side_process import run_lines

OURS = "{python} -m deployments.cli bench offline --model {model} --tp-size {tp}"
COLUMNS = (
    "date", "commit", "device", "versions", "peer", "model", "tp", "case", "unit",
    "ours_p20", "ours_p50", "ours_p80", "ours_runs",
    "peer_p20", "peer_p50", "peer_p80", "peer_runs",
    "ratio", "goal", "met", "drift", "tokens_ok", "logprob_apart", "command",
)  # fmt: skip
LEAST_S = 10.0
"""A run with less time than that is not begun."""


class Stopped(Exception):
    """SIGTERM."""


class Comparison:
    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self._args, self._command = args, command
        self._deadline = time.monotonic() + args.deadline_s
        self._lines: list[Line] = []
        self.failures: list[str] = []

    def run(self) -> None:
        for model in self._args.models:
            lines: list[Line] = []
            try:
                self._run_model(model, lines)
            finally:
                self._lines += lines
                write_rows(rows_of(lines), self._args, self._command)
                print(table(rows_of(lines), self._args.peer_name), flush=True)

    @property
    def rows(self) -> list[Row]:
        return rows_of(self._lines)

    def _run_model(self, model: str, lines: list[Line]) -> None:
        ours = 0
        for number, side in enumerate(self._args.order.split(","), start=1):
            left_s = self._deadline - time.monotonic()
            name = f"{model or 'bundled'}, run {number} ({side})"
            if left_s < LEAST_S:
                self._fail(f"{name} was not begun: {max(0.0, left_s):.0f} s were left")
                continue
            if side == "ours":
                words, environment = self._our_command(model, ours), dict(os.environ)
                ours += 1
            else:
                words, environment = self._peer_command(model), self._peer_environment()
            print(f"# {name}: {shlex.join(words)}", flush=True)
            num_before, began = len(lines), time.monotonic()
            reason = run_lines(
                words,
                lambda text, side=side, number=number: self._keep(text, side, model, number, lines),
                limit_s=min(self._args.run_limit_s, left_s),
                environment=environment,
            )
            if not reason and len(lines) == num_before:
                reason = "printed no case"
            if reason:
                self._fail(f"{name} {reason}")
            print(f"# {name}: {time.monotonic() - began:.1f} s", flush=True)

    def _fail(self, sentence: str) -> None:
        self.failures.append(sentence)
        print(f"# FAILED: {sentence}", flush=True)

    def _keep(self, text: str, side: str, model: str, number: int, lines: list[Line]) -> None:
        line = read_line(text, side, model, self._args.tp)
        wanted = self._args.cases
        if line is None and '"case"' in text:
            self._fail(f"{model or 'bundled'}, run {number} ({side}) gave no figure: {text[:200]}")
        if line is None or (side == "peer" and line.case == "tokens_ok"):
            return
        if wanted and line.case not in (*wanted, "startup_s", "tokens_ok"):
            return
        lines.append(line)
        kept = {"at": now(), "run": number, **line._asdict()}
        with (self._args.out / "compare.jsonl").open("a") as file:
            file.write(json.dumps(kept) + "\n")
        print(f"{side} {json.dumps({'case': line.case, 'value': line.value} | line.more)}")

    def _our_command(self, model: str, num_before: int) -> list[str]:
        words = filled(OURS, model, self._args.tp)
        if self._args.cases:
            words += ["--cases", ",".join(self._args.cases)]
        if num_before:
            words.append("--no-check-tokens")
        return words + shlex.split(self._args.our_options)

    def _peer_command(self, model: str) -> list[str]:
        return filled(self._args.peer_command, model, self._args.tp)

    def _peer_environment(self) -> dict[str, str]:
        """Ours, but none of our packages."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if self._args.peer_path:
            environment["PYTHONPATH"] = self._args.peer_path
        pairs = (text.partition("=") for text in self._args.peer_env)
        return environment | {name: value for name, _, value in pairs}


def filled(template: str, model: str, tp: int) -> list[str]:
    """
    >>> filled("bench {model} --tp={tp}", "", 2)
    ['bench', '', '--tp=2']
    """
    values = {"{python}": sys.executable, "{model}": model, "{tp}": str(tp)}
    words = shlex.split(template)
    for name, value in values.items():
        words = [word.replace(name, value) for word in words]
    return words


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_rows(rows: Sequence[Row], args: argparse.Namespace, command: str) -> None:
    """Append to ratios.csv."""
    path = args.out / "ratios.csv"
    is_new = not path.exists()
    about = (
        datetime.date.today().isoformat(), args.commit or commit(), device_name(),
        versions("torch", "triton", "pyzmq"), args.peer_name,
    )  # fmt: skip
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for row in rows:
            sides = [figure for side in (row.ours, row.peer) for figure in _figures(side)]
            ratio = "" if row.ratio is None else f"{row.ratio:.4g}"
            goal, met = row.verdict
            writer.writerow(
                [
                    *about, row.model or "bundled", row.tp, row.case, unit_of(row.case), *sides,
                    ratio, goal, met, f"{row.drift:.3f}", row.tokens_ok, row.apart, command,
                ]
            )  # fmt: skip


def _figures(values: Sequence[float]) -> list[Any]:
    if not values:
        return ["", "", "", 0]
    return [*(f"{value:.4g}" for value in percentiles(values)), len(values)]


def kept_lines(path: Path) -> list[Line]:
    lines = (json.loads(text) for text in path.read_text().splitlines())
    return [Line(*(line[name] for name in Line._fields)) for line in lines]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.compare", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", default=["8b"], help="presets, or folders")
    parser.add_argument("--tp", type=int, default=1, help="GPUs of either engine")
    parser.add_argument("--cases", type=lambda text: text.split(","), default=[], help="only these")
    parser.add_argument("--order", default="ours,peer,ours", help="of the runs of a model")
    parser.add_argument("--peer-command", default="", help="with {model} and {tp}")
    parser.add_argument("--peer-name", default="peer", help="with its version")
    parser.add_argument("--peer-path", default="", help="PYTHONPATH of the peer")
    parser.add_argument("--peer-env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--our-options", default="", help="more for `lockstep bench offline`")
    parser.add_argument("--run-limit-s", type=float, default=240.0, help="of one run")
    parser.add_argument("--deadline-s", type=float, default=3600.0, help="of everything")
    parser.add_argument("--commit", default="", help="where this is no git repository")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the two files")
    parser.add_argument("--from-lines", type=Path, help="rows of kept lines; nothing is run")
    args = parser.parse_args(argv)
    sides = args.order.split(",")
    if set(sides) - {"ours", "peer"}:
        parser.error(f"--order {args.order} may have `ours` and `peer`, with commas between")
    if "peer" in sides and not args.peer_command and not args.from_lines:
        parser.error("say --peer-command, or --order ours")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    words = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join(["python", "-m", "tests.bench.compare", *words])
    if args.from_lines:
        rows = rows_of(kept_lines(args.from_lines))
        write_rows(rows, args, command)
        print(table(rows, args.peer_name))
        return 0

    def stop(*_: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    comparison = Comparison(args, command)
    try:
        comparison.run()
    except (Stopped, KeyboardInterrupt):
        comparison.failures.append("it was told to stop")
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"\n{table(comparison.rows, args.peer_name)}")
    for sentence in comparison.failures:
        print(f"FAILED: {sentence}")
    has_wrong = any(row.tokens_ok == "false" for row in comparison.rows)
    return 1 if comparison.failures or has_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
