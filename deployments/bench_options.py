"""What `lockstep bench offline`, `step` and `serve` can be told, and the flags that say it.

Where `vllm bench serve` has a flag for the same thing, its spelling is taken too.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """`add_serve_flags` says what each does."""

    url: str = "http://127.0.0.1:8000"
    model: str = ""
    api_key: str = ""
    api_key_file: str = ""
    endpoint: str = "completions"
    dataset: str = ""
    token_ids: bool = False
    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0
    num_prefixes: int = 1
    max_token_id: int = 9999
    num_prompts: int = 1000
    num_warmups: int = 1
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: str = ""
    seed: int = 0
    temperature: float = 0.0
    ignore_eos: bool = False
    timeout_s: float = 600.0
    goodput: Sequence[str] = ()
    percentile_metrics: str = "ttft,tpot,itl,e2el"
    metric_percentiles: str = "50,90,99"
    json: str = ""
    plot: str = ""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_warmups < 0:
            raise ValueError(f"num_warmups={self.num_warmups} must be at least 0")
        if self.token_ids and self.endpoint == "chat":
            raise ValueError("token ids can be sent to completions only: drop --endpoint chat")
        if self.api_key and self.api_key_file:
            raise ValueError("give one of --api-key and --api-key-file")


def add_offline_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cases",
        type=lambda text: tuple(filter(None, text.split(","))),
        default=(),
        metavar="NAME[,NAME...]",
        help="only these, by the names that are printed (default: all)",
    )
    parser.add_argument(
        "--no-check-tokens",
        dest="check_tokens",
        action="store_false",
        help="do not read answers again to check them",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, to try the command on a CPU"
    )


def add_step_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cases",
        nargs="*",
        default=["1:128", "32:1024", "128:1024"],
        metavar="ROWS:CONTEXT",
        help="requests that decode at once, and the length of each (default: %(default)s)",
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write the figures there too")


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    default = ServeOptions()

    def add(group: Any, name: str, kind: Any, text: str, *more: str, **shape: Any) -> None:
        value = getattr(default, name)
        shown = "" if value in ("", (), False) else f" (default: {value})"
        if kind is not None:
            shape["type"] = kind
        flags = (f"--{name.replace('_', '-')}", *more)
        group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text + shown, **shape)

    asked = parser.add_argument_group("who is asked")
    add(asked, "url", str, "where the service listens", "--base-url")
    add(asked, "model", str, "model to ask for; unset takes the first that the service names")
    add(asked, "api_key_file", str, "holds the key that the service wants", metavar="FILE")
    add(asked, "api_key", str, "the key itself; a file keeps it from other users' eyes")
    add(
        asked, "endpoint", None, "/v1/completions, or /v1/chat/completions",
        choices=["completions", "chat"],
    )  # fmt: skip
    add(asked, "timeout_s", float, "a request without an end by then has failed", metavar="S")

    what = parser.add_argument_group("what is asked")
    add(
        what, "dataset", str,
        "JSONL with `prompt` (text or ids) or `messages`, and perhaps `max_tokens`, in each line; "
        "unset makes random prompts",
        "--dataset-path", metavar="FILE",
    )  # fmt: skip
    add(what, "token_ids", None, "random prompts are token ids, not words", action="store_true")
    add(what, "input_len", int, "tokens (words without --token-ids)", "--random-input-len")
    add(what, "output_len", int, "tokens asked for", "--random-output-len")
    add(
        what, "range_ratio", float, "lengths vary by this part, up and down",
        "--random-range-ratio",
    )  # fmt: skip
    add(
        what, "prefix_len", int, "tokens that prompts share at their beginning, beside input_len",
        "--random-prefix-len", "--prefix-repetition-prefix-len",
    )  # fmt: skip
    add(
        what, "num_prefixes", int, "different shared beginnings",
        "--prefix-repetition-num-prefixes",
    )  # fmt: skip
    add(what, "max_token_id", int, "highest id in random prompts, one that the model has")
    add(what, "seed", int, "of prompts and arrivals")
    add(what, "temperature", float, "sent with every request")
    add(what, "ignore_eos", None, "answers have their full length", action="store_true")

    when = parser.add_argument_group("when it is asked")
    add(when, "num_prompts", int, "requests of a run")
    add(when, "num_warmups", int, "requests before it, which are not counted")
    add(when, "request_rate", _rate, "requests a second, Poisson arrivals; inf: all at once")
    add(when, "burstiness", float, "shape of the gaps: below 1 in bursts, above 1 evener")
    add(
        when, "max_concurrency", str,
        "requests under way at most; several (1,8,64) make a run each", metavar="N[,N...]",
    )  # fmt: skip

    told = parser.add_argument_group("what is told")
    add(
        told, "goodput", None,
        "limits in ms that a good request keeps: ttft:200 tpot:50 e2el:5000",
        nargs="+", metavar="NAME:MS",
    )  # fmt: skip
    add(told, "percentile_metrics", str, "which rows the table has")
    add(told, "metric_percentiles", str, "which percentiles")
    add(told, "json", str, "write the figures there", "--result-filename", metavar="FILE")
    add(told, "plot", str, "draw throughput against latency there", metavar="FILE.png")


def _rate(text: str) -> float:
    rate = float(text)
    if not rate > 0 or math.isnan(rate):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return rate
