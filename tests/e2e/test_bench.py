"""Benchmarks as a user runs them: `lockstep bench serve` against the whole line, and others."""

import json

import pytest

from deployments.cli import main
from tests.bench import bench_context, bench_parallel
from tests.e2e.conftest import deployed


@pytest.fixture(scope="module")
def url(cluster):
    with deployed(cluster, max_num_seqs=32) as url:
        yield url


def bench(url, tmp_path, *flags):
    file = tmp_path / "figures.json"
    flags = ("--json", str(file), "--seed", "3", *flags)
    assert main(["bench", "serve", "--url", url, *flags]) == 0
    return json.loads(file.read_text())


def test_random_ids_with_a_shared_prefix_all_answered(url, tmp_path):
    words = "--token-ids --max-token-id 250 --input-len 16 --prefix-len 32 --output-len 24"
    words += " --ignore-eos --num-prompts 24 --max-concurrency 2,8 --goodput ttft:60000"
    few, many = bench(url, tmp_path, *words.split())
    for figures in (few, many):
        assert (figures["completed"], figures["failed"]) == (24, 0)
        assert figures["total_input_tokens"] == 24 * 48
        assert figures["total_output_tokens"] == 24 * 24
        assert 0 < figures["median_ttft_ms"] < figures["median_e2el_ms"]
        assert figures["request_goodput"] == pytest.approx(figures["request_throughput"])
        assert figures["tokens_per_chunk"] >= 1.0
    assert many["max_concurrent_requests"] <= 8


def test_a_file_of_chats_at_a_rate(url, tmp_path):
    file = tmp_path / "chats.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"What is {n}+{n}?"}], "max_tokens": 12}
        for n in range(1, 5)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    words = f"--dataset {file} --num-prompts 8 --request-rate 20"
    figures = bench(url, tmp_path, *words.split())
    assert (figures["completed"], figures["failed"]) == (8, 0)
    assert figures["duration"] >= 0.4
    assert 0 < figures["total_output_tokens"] <= 8 * 12


def test_bench_context_measures_a_replica_in_parts(capfd):
    words = ["--device", "cpu", "--model", "", "--prompt", "100", "--budget", "64"]
    assert bench_context.main([*words, "--layouts", "0"]) == 0
    [told] = map(json.loads, capfd.readouterr().out.splitlines())
    assert (told["tp_size"], told["attn_cp_size"], told["prompt"]) == (2, 2, 100)
    assert told["prefill_s"] > 0
    assert told["tpot_ms"] > 0


def test_bench_parallel_counts_what_a_layout_did(capfd):
    assert bench_parallel.main(["one", "--sanity"]) == 0
    [told] = map(json.loads, capfd.readouterr().out.splitlines())
    assert told["good"]
    assert (told["fallbacks"], told["recoveries"]) == (0, 0)
    assert told["sync_us"]["driver"] > 0
