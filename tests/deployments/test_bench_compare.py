"""tests/bench/compare.py: two engines in one run, and peers that do not do what they should."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.bench_cases import FULL
from tests.bench import compare
from tests.bench.ratios import FLOORS, GOALS, Line, Row, read_line, rows_of, table
from tests.bench.side_process import run_lines

pytestmark = pytest.mark.timeout(600)

PEER = """
import json, os, sys
def tell(case, value):
    print(json.dumps({"engine": "peer", "case": case, "value": value}), flush=True)
mode, model, tp = sys.argv[1:]
assert os.environ.get("PYTHONPATH", "") == os.environ.get("WANTED_PATH", ""), "our path came along"
if mode == "rubbish":
    print("Traceback? no: {not json")
    print(json.dumps([1, 2]))
    tell("bs1_tpot_ms", float("nan"))
    tell("bs1_tpot_ms", "5.0")
    sys.exit(0)
print("INFO a word before")
tell("bs1_tpot_ms", 5.0)
if mode == "dies":
    print("out of memory", file=sys.stderr)
    sys.exit(3)
tell("offline8_out_tok_s", 100)
"""

HANGS = """
echo '{"case": "bs1_tpot_ms", "value": 5.0}'
sleep 300 &
echo $! > "$PID_FILE"
wait
"""


VLLM = """
import json, sys
from types import SimpleNamespace as Any
class SamplingParams:
    def __init__(self, *, max_tokens, temperature, ignore_eos, detokenize):
        assert (temperature, ignore_eos, detokenize) == (0.0, True, False)
        self.max_tokens = max_tokens
class LLM:
    def __init__(self, *, model, **settings):
        assert json.load(open(model + "/config.json"))["num_hidden_layers"] == 28
        print(json.dumps(settings), file=sys.stderr)
    def generate(self, prompts, params, use_tqdm):
        for prompt, one in zip(prompts, params, strict=True):
            assert set(prompt) == {"prompt_token_ids"}
        return [Any(outputs=[Any(token_ids=(7,) * one.max_tokens)]) for one in params]
"""


def test_vllm_is_asked_the_same_requests_and_needs_no_package_of_ours(tmp_path):
    (tmp_path / "vllm.py").write_text(VLLM)
    words = ["tests.bench.peer_vllm", "0.6b", "2", "--set", '{"max_num_seqs": 256}']
    ran = subprocess.run(
        [sys.executable, "-S", "-m", *words],
        env={"PYTHONPATH": str(tmp_path)},
        cwd=Path(compare.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = [json.loads(text) for text in ran.stdout.splitlines()]
    assert [line["case"] for line in lines] == ["startup_s", *FULL.cases]
    assert all((line["engine"], line["model"], line["tp"]) == ("vllm", "0.6b", 2) for line in lines)
    assert lines[-1]["out_tokens"] == 133_966
    given = json.loads(ran.stderr.splitlines()[0])
    assert given["max_num_seqs"] == 256
    assert given["tensor_parallel_size"] == 2
    assert given["enable_prefix_caching"] is False


@pytest.fixture
def run(tmp_path):
    """Compares; (exit code, rows of ratios.csv)."""
    peer = tmp_path / "peer.py"
    peer.write_text(PEER)

    def run(mode, *flags):
        out = tmp_path / "out"
        words = [
            "--models",
            "",
            "--peer-command",
            f"{sys.executable} {peer} {mode} {{model}} {{tp}}",
        ]
        code = compare.main([*words, "--out", str(out), *flags])
        return code, rows_in(out)

    return run


def test_us_beside_a_peer(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    flags = ["--our-options", "--quick --device cpu --max-num-seqs 8", "--order", "ours,peer"]
    flags += ["--peer-env", "WANTED_PATH=/tmp/vs", "--peer-path", "/tmp/vs"]
    code, rows = run("works", *flags, "--cases", "offline8_out_tok_s", "--peer-name", "A 1.2")
    assert code == 0
    startup, offline = rows
    assert (startup["case"], startup["peer_runs"], startup["ratio"]) == ("startup_s", "0", "")
    assert (offline["peer"], offline["model"], offline["unit"]) == ("A 1.2", "bundled", "tok/s")
    assert (offline["ours_runs"], offline["peer_p50"]) == ("1", "100")
    assert float(offline["ratio"]) == pytest.approx(float(offline["ours_p50"]) / 100, rel=0.01)
    assert offline["tokens_ok"] == "true"
    assert 0 < float(offline["logprob_apart"]) < 1e-2
    assert "tokens right" in capsys.readouterr().out
    kept = compare.kept_lines(tmp_path / "out" / "compare.jsonl")
    assert [(row.case, row.peer) for row in rows_of(kept)] == [
        ("startup_s", ()), ("offline8_out_tok_s", (100.0,)),
    ]  # fmt: skip


def test_what_a_dying_peer_has_said_is_kept(run, capsys):
    code, [row] = run("dies", "--order", "peer")
    assert (code, row["case"], row["peer_p50"], row["ratio"]) == (1, "bs1_tpot_ms", "5", "")
    assert "run 1 (peer) ended with 3: out of memory" in capsys.readouterr().out


def test_rubbish_is_no_figure(run, capsys):
    code, rows = run("rubbish", "--order", "peer")
    assert (code, rows) == (1, [])
    out = capsys.readouterr().out
    assert out.count("gave no figure") == 2 * 2  # as it comes, and at the end
    assert "printed no case" in out


def test_a_peer_that_cannot_be_started_is_a_failure(tmp_path, capsys):
    words = ["--peer-command", "/nowhere/python x", "--order", "peer", "--out", str(tmp_path)]
    assert compare.main(words) == 1
    assert "could not be started" in capsys.readouterr().out


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def hangs(tmp_path, monkeypatch):
    """The command of a peer that hangs, and the file in which it names its child."""
    script = tmp_path / "hangs.sh"
    script.write_text(HANGS)
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    return f"sh {script}", tmp_path / "pid"


def rows_in(out):
    with (out / "ratios.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_peer_that_hangs_is_ended_and_so_are_its_children(hangs, tmp_path, monkeypatch, capsys):
    command, pid_file = hangs
    monkeypatch.setattr(compare, "LEAST_S", 0.5)
    words = ["--peer-command", command, "--order", "peer,peer", "--out", str(tmp_path)]
    assert compare.main([*words, "--deadline-s", "3", "--run-limit-s", "90"]) == 1
    [row] = rows_in(tmp_path)
    assert (row["case"], row["peer_p50"], row["peer_runs"]) == ("bs1_tpot_ms", "5", "1")
    assert not is_alive(int(pid_file.read_text()))
    out = capsys.readouterr().out
    assert "run 1 (peer) was not done after 3 s" in out
    assert "run 2 (peer) was not begun: 0 s were left" in out


def test_whoever_ignores_the_request_to_end_is_killed():
    lines = []
    words = ["sh", "-c", "trap '' TERM; echo 1; sleep 300"]
    environment = {"PATH": os.environ["PATH"]}
    reason = run_lines(words, lines.append, limit_s=3, environment=environment, grace_s=0.3)
    assert reason == "was not done after 3 s"
    assert lines == ["1"]


def has_content(path):
    return path.exists() and path.stat().st_size > 0


def test_told_to_stop_it_writes_what_it_has(hangs, tmp_path):
    command, pid_file = hangs
    words = ["-m", "tests.bench.compare", "--order", "peer", "--out", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, *words, "--peer-command", command], stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 280
        seen = (pid_file, tmp_path / "compare.jsonl")
        while not all(map(has_content, seen)) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(280) == 1
    [row] = rows_in(tmp_path)
    assert (row["case"], row["peer_p50"]) == ("bs1_tpot_ms", "5")
    assert not is_alive(int(pid_file.read_text()))


VALUES = st.lists(st.floats(0.1, 1e4), min_size=1, max_size=5)


@settings(max_examples=60)
@given(VALUES, VALUES)
def test_a_ratio_is_that_of_the_medians_and_turns_over_with_the_sides(ours, peer):
    def rows(ours, peer):
        lines = [Line("ours", "m", 1, "bs1_tpot_ms", value, {}) for value in ours]
        lines += [Line("peer", "m", 1, "bs1_tpot_ms", value, {}) for value in peer]
        [row] = rows_of(lines)
        return row

    row, turned = rows(ours, peer), rows(peer, ours)
    assert row.ratio == pytest.approx(sorted_median(ours) / sorted_median(peer))
    assert row.ratio * turned.ratio == pytest.approx(1.0)
    assert row.drift == pytest.approx(max(ours) / min(ours) - 1)


def sorted_median(values):
    values, half = sorted(values), len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


@pytest.mark.parametrize(
    ("case", "ours", "peer", "verdict"),
    [
        ("bs1_tpot_ms", (4.2,), (5.0,), ("<= 0.85", "met")),
        ("bs1_tpot_ms", (4.3,), (5.0,), ("<= 0.85", "missed")),
        ("bs1_tpot_ms", (5.1,), (5.0,), ("<= 0.85", "below the floor")),
        ("offline256_out_tok_s", (116,), (100,), (">= 1.15", "met")),
        ("offline256_out_tok_s", (101,), (100,), (">= 1.15", "missed")),
        ("offline256_out_tok_s", (99,), (100,), (">= 1.15", "below the floor")),
        ("startup_s", (60.0, 12.0), (80.0,), ("<= 30 s", "met")),  # the second has a warm cache
        ("startup_s", (31.0,), (80.0,), ("<= 30 s", "missed")),
        ("bs1_tpot_ms", (4.2,), (), ("<= 0.85", "")),
        ("bs64_1k_tpot_ms", (4.2,), (5.0,), ("", "")),
    ],
)
def test_goals_are_judged(case, ours, peer, verdict):
    assert Row("8b", 1, case, ours, peer, None).verdict == verdict


def test_a_floor_is_under_its_goal():
    for floor in FLOORS:
        [goal] = [goal for goal in GOALS if goal[:3] == floor[:3]]
        assert floor.met_by(goal.limit)
        assert not goal.met_by(floor.limit)


def test_wrong_tokens_and_drift_are_told():
    lines = [Line("ours", "8b", 1, "bs1_tpot_ms", value, {}) for value in (4.0, 4.2)]
    for value in (True, False):
        more = {"of": "bs1_tpot_ms", "logprob_apart": {"largest": 0.1}}
        lines.append(Line("ours", "8b", 1, "tokens_ok", value, more))
    [row] = rows_of(lines)
    assert row.tokens_ok == "false"
    shown = table([row], "peer")
    assert "WRONG TOKENS" in shown
    noisy = row._replace(tokens={"value": False, "wrong": 0, "logprob_apart": {"largest": 0.7}})
    assert "NOT RIGHT: log-probabilities up to 0.7 apart" in table([noisy], "peer")
    assert "our runs differ by 5.0%" in shown


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "5", '{"case": 1, "value": 2}', '{"case": "a"}',
        '{"case": "a", "value": true}', '{"case": "a", "value": 0}', '{"case": "a", "value": -1}',
        '{"case": "a", "value": Infinity}', '{"case": "tokens_ok", "value": true}',
        '{"case": "tokens_ok", "of": "a", "value": 1}',
    ],
)  # fmt: skip
def test_lines_that_are_no_figure(text):
    assert read_line(text, "peer", "8b", 1) is None


def test_kept_lines_make_the_rows_again(tmp_path, capsys):
    kept = tmp_path / "kept.jsonl"
    lines = [
        Line("ours", "8b", 1, "bs1_tpot_ms", 4.0, {}),
        Line("peer", "8b", 1, "bs1_tpot_ms", 5.0, {}),
    ]
    kept.write_text("\n".join(json.dumps({"at": "", "run": 1, **line._asdict()}) for line in lines))
    assert compare.main(["--from-lines", str(kept), "--out", str(tmp_path)]) == 0
    assert "0.800  <= 0.85 met" in capsys.readouterr().out
