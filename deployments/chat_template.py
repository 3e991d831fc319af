"""A checkpoint's chat template: messages to the text of a prompt, with a bound on the work.

Templates come from the checkpoint only, never from a client, and run in jinja2's sandbox. But the
messages are a client's, and what a template does with them may be far more than reading them: so
each turn of a loop and each call of a macro looks at the clock of this thread's CPU, and what is
written is counted. `AT_ONCE` is what an event loop can bear between two tokens of its streams;
what needs more is rendered again in a thread, up to `ASIDE`, and then refused.

    >>> loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    >>> ChatTemplate(loops, {}).render([], {}, AT_ONCE)
    Traceback (most recent call last):
    ...
    deployments.chat_template.TooMuchEffort: The model's chat template takes more than 0.01 s ...
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from deployments.errors import RequestError


class Effort(NamedTuple):
    """What rendering may take."""

    cpu_s: float
    num_chars: int


AT_ONCE = Effort(0.01, 2**16)
"""On an event loop: streams wait meanwhile, for the template and for the tokens of its text."""
ASIDE = Effort(1.0, 16 * 2**20)
"""In a thread; four times the characters of the largest body."""


class TooMuchEffort(RequestError):
    """The messages need more than the effort that was allowed."""


class TemplateRefused(jinja2.TemplateError):
    """The template called `raise_exception`; its author wrote the sentence."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks answers for training; serving prints what is inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


LOOK_S = 0.001
"""Least time between two questions for the CPU's."""

CLOCK = "the clock"
"""Where the context of a rendering has its clock: with a space, so that no template can name it."""


class _Clock:
    """Ends a rendering that has used up its CPU time.

    To ask for that costs a system call, and it never runs faster than the time of day, which costs
    none: so that is asked first.
    """

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s
        self._end = time.thread_time() + cpu_s
        self._not_before = time.monotonic() + cpu_s

    def look(self) -> None:
        now = time.monotonic()
        if now < self._not_before:
            return
        left = self._end - time.thread_time()
        self._not_before = now + max(left, LOOK_S)
        if left < 0:
            raise TooMuchEffort(
                f"The model's chat template takes more than {self._cpu_s:g} s for these messages: "
                "send fewer.",
                param="messages",
                code="template_timeout",
            )


class _Clocked(jinja2.ext.Extension):
    """What every turn of a loop and every call of a macro begins with."""

    def look(self, context: jinja2.runtime.Context) -> bool:
        context.parent[CLOCK].look()
        return True

    def clocked(self, template: jinja2.nodes.Template) -> jinja2.nodes.Template:
        """The template with a look at the clock wherever it could go round for long."""
        for loop in template.find_all(jinja2.nodes.For):
            loop.body.insert(0, jinja2.nodes.ExprStmt(self._look()))
            if loop.test is not None:
                loop.test = jinja2.nodes.And(self._look(), loop.test)
        for macro in template.find_all((jinja2.nodes.Macro, jinja2.nodes.CallBlock)):
            macro.body.insert(0, jinja2.nodes.ExprStmt(self._look()))
        return template

    def _look(self) -> jinja2.nodes.Expr:
        context = jinja2.nodes.ContextReference()
        return jinja2.nodes.Call(self.attr("look"), [context], [], None, None)


def _raise_exception(message: object) -> None:
    raise TemplateRefused(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, as templates expect: jinja2's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, _Clocked, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A checkpoint's chat template, compiled once."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        clocked = _Clocked(environment).clocked(environment.parse(source))
        self._template = environment.from_string(clocked)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        effort: Effort = ASIDE,
    ) -> str:
        """The prompt for an answer to `messages`; a `RequestError` if the template refuses them.

        `TooMuchEffort` is one that `effort` is not enough for.
        """
        variables = {
            **self._special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **options,
            CLOCK: _Clock(effort.cpu_s),
        }
        try:
            return _bounded(self._template.generate(variables), effort.num_chars)
        except TemplateRefused as refused:
            sentence = "".join(c for c in str(refused) if c.isprintable())[:200]
            raise RequestError(
                f"The model's chat template refused the messages: {sentence}", param="messages"
            ) from None
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ):
            raise RequestError(
                "The model's chat template cannot render these messages.", param="messages"
            ) from None


def _bounded(pieces: Iterable[str], max_chars: int) -> str:
    written: list[str] = []
    room = max_chars
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            raise TooMuchEffort(
                f"The messages render to more than {max_chars} characters: send fewer.",
                param="messages",
                code="context_length_exceeded",
            )
        written.append(piece)
    return "".join(written)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_template(folder: Path) -> ChatTemplate | None:
    """chat_template.jinja's, or tokenizer_config.json's; None if the folder has neither."""
    config = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json") | config
    beside = folder / "chat_template.jinja"
    written = config.get("chat_template")
    source = beside.read_text(encoding="utf-8") if beside.is_file() else _default_template(written)
    if source is None:
        return None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return ChatTemplate(source, {name: _content(special.get(name)) for name in names})


def _default_template(written: object) -> str | None:
    """A template, or a list of named ones of which `default` is meant."""
    if isinstance(written, list):
        named = {entry.get("name"): entry.get("template") for entry in written}
        written = named.get("default")
    return written if isinstance(written, str) else None


def _content(token: object) -> str:
    """A special token is written as a string or as an object with its `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
