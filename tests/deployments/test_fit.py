"""What cannot be served is said before anything is started: no Ray, no ranks, no torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.config import ServiceConfig
from deployments.fit import check_fit, check_tokenizer
from deployments.llm import LLM, SamplingParams
from workers import bundled
from workers.config import EngineConfig

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = """
import contextlib, io, json, os, sys
from deployments.cli import main

def children():
    return open(f"/proc/self/task/{os.getpid()}/children").read().split()

for command in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(command)
    print(json.dumps([code, said.getvalue(), children(), "ray" in sys.modules]))
"""

WRONG = [
    (("--tp-size", "3"), "4 attention heads do not divide over 3 ranks; tp_size can be 1, 2, 4"),
    (("--model", "/nowhere"), "/nowhere/config.json does not exist: `model` must be a folder"),
    (("--tp-size", "2", "--moe-a2a-backend", "torch"), "set ep_size to 2"),
    (("--tp-size", "4", "--attn-cp-size", "3"), "tp_size=4 does not divide by attn_cp_size=3"),
    (("--max-model-len", "8192"), "max_model_len=8192 is more than the 4096 positions of the"),
    (("--dtype", "float8"), "dtype='float8' is not valid"),
    (("--page-size", "24"), "page_size=24 must be a power of two"),
    (("--max-restarts", "-1"), "max_restarts=-1 must not be negative"),
    (("--model", "{no_tokenizer}"), "has no tokenizer.json"),
    (("--model", "{no_architecture}"), "asks for MadeUpForCausalLM and there is"),
]
ONLY_SERVE = (("--api-keys-file", "/nowhere"), "api_keys_file=/nowhere cannot be read")
ONLY_GENERATE = [
    (("--max-tokens", "0"), "max_tokens=0 must be from 1 to"),
    (("--num-nodes", "2", "--tp-size", "2"), "num_nodes=2: `LLM` runs its ranks on this machine"),
]


@pytest.fixture
def folders(tmp_path):
    """Two spoilt copies of the bundled model."""
    copies = {}
    for name in ("no_tokenizer", "no_architecture"):
        copies[name] = str(shutil.copytree(bundled.path(), tmp_path / name))
    (tmp_path / "no_tokenizer" / "tokenizer.json").unlink()
    file = tmp_path / "no_architecture" / "config.json"
    file.write_text(file.read_text().replace("Qwen3MoeForCausalLM", "MadeUpForCausalLM"))
    return copies


@pytest.mark.parametrize(
    ("command", "cases"),
    [(["serve", "--port", "0"], [*WRONG, ONLY_SERVE]), (["generate", "hi"], WRONG + ONLY_GENERATE)],
    ids=["serve", "generate"],
)
def test_a_wrong_command_starts_nothing(command, cases, folders):
    flags = [[flag.format_map(folders) for flag in flags] for flags, _ in cases]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([command + one for one in flags])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(cases)
    for (_, sentence), (code, said, children, has_ray) in zip(cases, told, strict=True):
        assert (code, children, has_ray) == (2, [], False), said
        assert said.startswith("lockstep: ")
        assert said.count("\n") == 1
        assert sentence in said


def test_what_fits_has_a_plan():
    config = ServiceConfig.from_args({"tp_size": "2", "max_model_len": "4096"}).engine
    assert check_fit(config).layout == config.layout
    check_tokenizer(config)


def test_a_library_refuses_as_early():
    with pytest.raises(ValueError, match="8192 is more than the 4096 positions"):
        LLM(max_model_len=8192)
    with pytest.raises(ValueError, match="does not exist"):
        check_fit(EngineConfig(model="/nowhere"))


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens=0 must be from 1"),
        ({"temperature": -1.0}, "temperature=-1.0 is not valid"),
        ({"temperature": float("nan")}, "temperature=nan is not valid"),
        ({"top_p": 0.0}, "top_p=0.0 is not valid"),
        ({"top_k": -1}, "top_k=-1 is not valid"),
        ({"seed": -1}, "seed=-1 is not valid"),
        ({"logprobs": 21}, "logprobs=21 is not valid"),
        ({"min_tokens": -1}, "min_tokens=-1 is not valid"),
    ],
)
def test_sampling_that_no_engine_takes_is_refused(params, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**params)
