"""`lockstep bench serve` against a server with known delays and known faults."""

import importlib
import json
import math
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments import bench_serve as module
from deployments.bench_client import EventLines
from deployments.bench_options import ServeOptions
from deployments.bench_serve import bench_serve
from deployments.cli import main
from tests.deployments.streaming_server import streaming_server


def run(server, tmp_path, **options):
    """(exit code, figures)"""
    file = tmp_path / "figures.json"
    small = {"num_prompts": 8, "input_len": 5, "output_len": 4, "token_ids": True}
    code = bench_serve(ServeOptions(url=server.url, json=str(file), **small | options))
    return code, json.loads(file.read_text()) if file.exists() else None


@given(
    st.lists(st.binary(max_size=9).filter(lambda b: b"\n" not in b and b"\r" not in b)), st.data()
)
def test_events_are_the_same_however_the_bytes_are_cut(payloads, data):
    sent = b"".join(b"data: " + payload + b"\n\n" for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)))))
    lines, found = EventLines(), []
    for begin, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        found += lines.feed(sent[begin:end])
    assert found == [payload.strip() for payload in payloads]


def test_times_are_the_servers_delays(tmp_path):
    with streaming_server(first_s=0.1, gap_s=0.02) as server:
        code, figures = run(server, tmp_path, max_concurrency="4", goodput=("ttft:5000",))
    assert code == 0
    assert (figures["completed"], figures["failed"]) == (8, 0)
    assert figures["model_id"] == "found"
    assert figures["total_input_tokens"] == 40
    assert figures["total_output_tokens"] == 32
    # A busy machine may be later than the server's clock, never sooner; but a first token that is
    # late has the second one close behind it.
    assert 100 <= figures["median_ttft_ms"] < 2000
    assert 160 <= figures["median_e2el_ms"] < 3000
    between = (figures["mean_e2el_ms"] - figures["mean_ttft_ms"]) / 3
    assert 0 < between < 500
    assert figures["mean_tpot_ms"] == pytest.approx(between, rel=0.02)
    assert figures["mean_itl_ms"] == pytest.approx(between, rel=0.02)
    assert figures["request_goodput"] == pytest.approx(figures["request_throughput"])
    assert figures["max_concurrency"] == 4
    assert figures["request_rate"] == "inf"
    assert server.most_at_once == 4
    assert figures["max_concurrent_requests"] <= 4


def test_what_is_sent_is_what_was_asked_for(tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    with streaming_server() as server:
        code, _ = run(
            server, tmp_path, num_warmups=2, ignore_eos=True, model="m", api_key_file=str(key)
        )
    assert code == 0
    assert len(server.seen) == 10
    for body in server.seen:
        assert body["model"] == "m"
        assert len(body["prompt"]) == 5
        assert body["max_tokens"] == 4
        assert body["ignore_eos"] is True
        assert body["stream_options"] == {"include_usage": True}
    assert set(server.keys) == {"bearer secret"}
    assert len({tuple(body["prompt"]) for body in server.seen}) == 10


def test_a_second_run_finds_no_prompt_of_the_first_in_a_cache(tmp_path):
    with streaming_server() as server:
        code, runs = run(server, tmp_path, max_concurrency="1,8", prefix_len=4)
    assert code == 0
    assert runs[0]["total_input_tokens"] == runs[1]["total_input_tokens"] == 8 * 9
    beginnings = [tuple(body["prompt"][:4]) for body in server.seen]
    assert len(set(beginnings)) == 3  # warm-up, one run, the other


def test_requests_come_at_the_rate_asked(tmp_path):
    with streaming_server() as server:
        code, figures = run(server, tmp_path, request_rate=20.0, num_prompts=10)
    assert code == 0
    assert figures["request_rate"] == 20.0
    assert 0.5 <= figures["duration"] < 5.0


def test_a_chats_role_is_not_its_first_token(tmp_path):
    with streaming_server(first_s=0.1) as server:
        code, figures = run(server, tmp_path, endpoint="chat", token_ids=False, num_prompts=2)
    assert code == 0
    assert figures["median_ttft_ms"] >= 100
    assert server.seen[0]["messages"][0]["role"] == "user"


def test_a_dataset_is_sent_as_it_is(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "hello", "max_tokens": 2}\n{"messages": [{"role": "user"}]}\n')
    with streaming_server() as server:
        code, figures = run(server, tmp_path, dataset=str(file), num_prompts=3, num_warmups=0)
    assert code == 0
    assert figures["total_output_tokens"] == 2 + 4 + 2
    assert {body.get("prompt") for body in server.seen} == {"hello", None}


def test_without_usage_chunks_are_counted(tmp_path):
    with streaming_server(fault="no_usage") as server:
        code, figures = run(server, tmp_path)
    assert code == 0
    assert figures["total_output_tokens"] == 32
    assert figures["total_input_tokens"] == 40


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("status_500", "500: broken on purpose"),
        ("no_done", "the stream ended without [DONE]"),
        ("error_event", "the stream failed: the engine is gone"),
        ("hang", "no end after 0.3 s"),
        ("cut", "payload is not completed"),
    ],
)
def test_a_request_that_fails_is_counted_with_its_reason(tmp_path, capsys, fault, reason):
    with streaming_server(fault=fault) as server:
        timeout_s = 0.3 if fault == "hang" else 60.0
        code, figures = run(server, tmp_path, num_warmups=0, model="m", timeout_s=timeout_s)
    assert code == 1
    assert (figures["completed"], figures["failed"]) == (0, 8)
    assert figures["output_throughput"] == 0
    said = capsys.readouterr().out
    assert "failed 8 times" in said
    assert reason in said


def test_a_first_request_that_fails_ends_it(tmp_path, capsys):
    with streaming_server(fault="status_500") as server:
        code, figures = run(server, tmp_path)
    assert (code, figures) == (1, None)
    assert "did not answer a first request: 500: broken on purpose" in capsys.readouterr().err


def test_nobody_there_is_said(capsys):
    with socket.socket() as holder:  # bound, not listening
        holder.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{holder.getsockname()[1]}"
        code = main(["bench", "serve", "--url", url, "--num-prompts", "2"])
    assert code == 1
    assert f"no service answers at {url}" in capsys.readouterr().err


def test_several_limits_make_a_run_each_and_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plot.png"
    with streaming_server(gap_s=0.005) as server:
        code, runs = run(server, tmp_path, max_concurrency="1,4", plot=str(picture))
    assert code == 0
    assert [figures["max_concurrency"] for figures in runs] == [1, 4]
    assert runs[0]["max_concurrent_requests"] == 1 < runs[1]["max_concurrent_requests"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Time to first token" in capsys.readouterr().out


def test_a_plot_is_drawn_of_what_was_measured(tmp_path, monkeypatch):
    drawn = []

    class Axis:
        def __getattr__(self, name):
            return lambda *args, **more: drawn.append((name, args))

    class Figure:
        def suptitle(self, text):
            assert text.startswith("m: ")

        def savefig(self, path, dpi):
            drawn.append(("savefig", (path,)))

    class Pyplot:
        def subplots(self, *args, **more):
            return Figure(), [Axis(), Axis()]

        def close(self, figure):
            return None

    monkeypatch.setattr(module, "plotting", Pyplot)
    names = {"output_throughput": 10.0, "median_tpot_ms": 2.0, "median_ttft_ms": 3.0}
    module.plot([names | {"max_concurrency": 1, "model_id": "m"}], tmp_path / "p.png")
    assert ("savefig", (tmp_path / "p.png",)) in drawn
    assert ("plot", ([2.0], [10.0])) in drawn


def test_without_matplotlib_a_plot_is_refused_before_the_run(monkeypatch, capsys):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    assert main(["bench", "serve", "--plot", "p.png"]) == 2
    assert "pip install 'lockstep[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max-concurrency", "1,x"], "must be numbers from 1, like 1,8,64"),
        (["--goodput", "itl:5"], "write ttft:MS, tpot:MS or e2el:MS"),
        (["--dataset", "/nowhere.jsonl"], "the dataset /nowhere.jsonl cannot be read"),
        (["--api-key-file", "/nowhere"], "the API key cannot be read"),
        (["--num-prompts", "0"], "num_prompts=0 must be at least 1"),
        (["--token-ids", "--endpoint", "chat"], "token ids can be sent to completions only"),
        (["--burstiness", "0"], "burstiness=0.0 must be above 0"),
    ],
)
def test_a_wrong_command_says_what_to_change(capsys, flags, sentence):
    assert main(["bench", "serve", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_the_fields_spelling_is_taken_too():
    from deployments.cli import _parser

    words = "bench serve --base-url http://x --random-input-len 7 --random-output-len 9"
    args = _parser().parse_args(words.split())
    assert (args.url, args.input_len, args.output_len) == ("http://x", 7, 9)
    assert ServeOptions().request_rate == math.inf
