"""The command line: `lockstep serve`, `chat`, `generate`, `batch`, `plan`, `check`, `bench`.

Flags are the settings of `deployments.config`, spelt with dashes (`tp_size` is `--tp-size`).
Exit codes: 0 done, 1 the service could not start or failed, 2 the command is wrong.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any

from deployments.bench_options import (
    ServeOptions,
    add_offline_flags,
    add_serve_flags,
    add_step_flags,
)
from deployments.config import ServiceConfig, ServiceSettings, fields, help_texts
from deployments.presets import PRESETS
from workers.config import EngineConfig

PRESET_NAMES = ", ".join(PRESETS)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["check"]:
        from deployments.check import check

        return check(argv[1:])
    parser = _parser()
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        print(f"lockstep: {_unknown(unknown[0])}", file=sys.stderr)
        return 2
    args = vars(known)
    command = args.pop("command")
    try:
        if command == "serve":
            from deployments.serve import serve_forever  # Ray takes seconds to import

            return serve_forever(_config(args))
        if command == "chat":
            from deployments.chat import chat

            return chat(args["url"], args["model"], args["message"])
        if command == "batch":
            from deployments.batch import BatchOptions, run_batch

            options = {name: args.pop(name) for name in BatchOptions.__slots__ if name in args}
            return run_batch(BatchOptions(**options), args)
        if command == "plan":
            from deployments.plan_table import print_plan

            return print_plan(args)
        if command == "bench":
            return _bench(args.pop("benchmark"), args)
        from deployments.llm import generate_lines

        prompts = args.pop("prompt")
        max_tokens = args.pop("max_tokens")
        return generate_lines(_config(args), prompts, max_tokens)
    except ValueError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from deployments.engine import EngineFailed

        if not isinstance(error, EngineFailed):
            raise
        print(f"lockstep: {error}", file=sys.stderr)
        return 1


def _bench(benchmark: str, args: dict[str, Any]) -> int:
    if benchmark == "serve":
        from deployments.bench_serve import bench_serve

        return bench_serve(ServeOptions(**args))
    if benchmark == "step":
        from deployments.bench_step import bench_step

        return bench_step(args.pop("cases"), args, json_file=args.pop("json"))
    from deployments.bench import offline
    from deployments.bench_cases import FULL, QUICK

    return offline(
        args,
        workload=QUICK if args.pop("quick") else FULL,
        cases=args.pop("cases"),
        check_tokens=args.pop("check_tokens"),
    )


def _unknown(flag: str) -> str:
    """What is wrong with an argument that no command takes."""
    settings = (*fields(EngineConfig), *fields(ServiceSettings))
    flags = [f"--{name.replace('_', '-')}" for name in settings]
    near = difflib.get_close_matches(flag.partition("=")[0], flags, n=1)
    return f"unknown argument `{flag}`" + (f": did you mean `{near[0]}`?" if near else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lockstep", description="Serve large language models from many GPUs on Ray."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve", allow_abbrev=False, help="serve a model over HTTP (OpenAI's API)"
    )
    _add_settings(serve, EngineConfig)
    _add_settings(serve, ServiceSettings)
    chat = commands.add_parser("chat", help="talk to a running service")
    chat.add_argument("message", nargs="*", help="one message; without it, a conversation")
    chat.add_argument("--url", default="http://127.0.0.1:8000", help="where the service listens")
    chat.add_argument("--model", default="", help="model to ask for; empty takes the first")
    commands.add_parser("check", help="try every collective of a layout (see check --help)")
    _add_batch(commands)
    plan = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="print a model's collectives under given settings; --preset names a model's shape",
    )
    plan.add_argument(
        "--preset",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help=f"instead of --model: {PRESET_NAMES}",
    )
    _add_settings(plan, EngineConfig)
    generate = commands.add_parser(
        "generate", allow_abbrev=False, help="answer chat prompts here, without a service"
    )
    generate.add_argument("prompt", nargs="+", help="what to ask")
    generate.add_argument("--max-tokens", type=int, default=256)
    _add_settings(generate, EngineConfig)
    _add_bench(commands)
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure how fast the engine or a service is")
    benchmarks = bench.add_subparsers(dest="benchmark", required=True)
    offline = benchmarks.add_parser(
        "offline",
        allow_abbrev=False,
        help=f"no HTTP, one JSON line a case; --model may be a preset: {PRESET_NAMES}",
    )
    add_offline_flags(offline)
    _add_settings(offline, EngineConfig)
    serve = benchmarks.add_parser(
        "serve", allow_abbrev=False, help="a running service, any with OpenAI's API, over HTTP"
    )
    add_serve_flags(serve)
    step = benchmarks.add_parser(
        "step",
        allow_abbrev=False,
        help="where a decode step's time goes; --model may be one of the same presets",
    )
    add_step_flags(step)
    _add_settings(step, EngineConfig)


BATCH_SETTINGS = ("served_model_name", "metrics_port", "cluster_wait_s", "log_format")
"""What of the service's settings concerns a batch too."""


def _add_batch(commands: Any) -> None:
    batch = commands.add_parser(
        "batch", allow_abbrev=False, help="answer a file of requests (OpenAI's batch JSONL)"
    )
    for flags, name, text in (
        (("-i", "--input"), "input", "lines to answer; a path or an fsspec URL"),
        (("-o", "--output"), "output", "where results go; what is there is not done again"),
    ):
        batch.add_argument(*flags, dest=name, required=True, metavar="FILE", help=text)
    for flag, metavar, kind, text in (
        ("--errors", "FILE", str, "where lines that failed go (default: with the others)"),
        ("--url", "URL", str, "ask this running service instead of starting an engine"),
        ("--api-key-file", "FILE", str, "holds the key that the service wants"),
        ("--concurrency", "N", int, "lines under way at once (default: what the engine can run)"),
        ("--give-up-s", "S", float, "end when nothing was answered for so long (default: 3600)"),
    ):
        batch.add_argument(flag, metavar=metavar, type=kind, help=text, default=argparse.SUPPRESS)
    _add_settings(batch, EngineConfig)
    _add_settings(batch, ServiceSettings, BATCH_SETTINGS)


def _add_settings(
    parser: argparse.ArgumentParser,
    kind: type[EngineConfig | ServiceSettings],
    names: Sequence[str] = (),
) -> None:
    """A flag for each setting, or for those in `names`."""
    group = parser.add_argument_group(
        "engine" if kind is EngineConfig else "service", description=None
    )
    texts = help_texts(kind)
    defaults = kind()
    for name in names or fields(kind):
        default = getattr(defaults, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            metavar="KEY" if name == "api_keys" else "VALUE",
            help=f"{texts[name]} (default: {default!r})".replace("%", "%%"),
            **_shape(default),
        )


def _shape(default: object) -> dict[str, Any]:
    """How a setting is given: `--flag`, `--no-flag`, `--flag true`; several times for a tuple."""
    if isinstance(default, bool):
        return {"nargs": "?", "const": "true"}
    if isinstance(default, tuple):
        return {"action": "append"}
    return {}


def _config(args: dict[str, Any]) -> ServiceConfig:
    return ServiceConfig.from_args(args)


if __name__ == "__main__":
    sys.exit(main())
