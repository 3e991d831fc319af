"""Text to token ids and back, for one checkpoint folder.

`ChatTokenizer` encodes prompts and renders the checkpoint's own chat template; `Detokenizer` turns
one request's ids into text as they come; `StopMatcher` finds stop strings in that text. Templates
come from the checkpoint only, never from a client, and run in jinja2's sandbox with a bound on
what they may write. Nothing here knows of HTTP, the driver or torch.

    >>> matcher = StopMatcher(("END",))
    >>> matcher.feed("one E"), matcher.feed("N"), matcher.feed("D two"), matcher.stopped
    ('one ', '', '', True)
"""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from deployments.errors import RequestError

MAX_RENDERED_CHARS = 16 * 2**20
"""Most characters a chat template may write; four times the largest body."""


class TemplateRefused(jinja2.TemplateError):
    """The template called `raise_exception`; its author wrote the sentence."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks answers for training; serving prints what is inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A checkpoint's chat template, compiled once."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._template = _environment().from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        max_chars: int = MAX_RENDERED_CHARS,
    ) -> str:
        """The prompt for an answer to `messages`; a `RequestError` if the template refuses them."""
        variables = {
            **self._special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **options,
        }
        try:
            return _bounded(self._template.generate(variables), max_chars)
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
            raise RequestError(
                f"The messages render to more than {max_chars} characters: send fewer.",
                param="messages",
                code="context_length_exceeded",
            )
        written.append(piece)
    return "".join(written)


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary, to that byte."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    letters = {chr(byte): byte for byte in printed}
    letters.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return letters


def _decoder_types(decoder: Mapping[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    nested = decoder.get("decoders", [])
    return {str(decoder.get("type"))}.union(*(_decoder_types(inner) for inner in nested))


class TokenBytes:
    """The bytes each id stands for: none for special tokens and for ids without a token.

    Knowing bytes, not text, is what makes a stream exact: a character may be spread over several
    tokens, and the bytes of all tokens joined are the bytes of the whole text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        types = _decoder_types(json.loads(tokenizer.to_str()).get("decoder"))
        if not types & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ValueError(
                f"tokenizer.json has the decoder {', '.join(sorted(types)) or 'none'}: only "
                "ByteLevel, ByteFallback and Metaspace vocabularies can be streamed"
            )
        self._letters = _byte_letters() if "ByteLevel" in types else None
        self._has_byte_tokens = "ByteFallback" in types
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._known: dict[int, bytes] = {
            token_id: b"" for token_id, token in added.items() if token.special
        }

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id)
            known = self._known[token_id] = b"" if token is None else self._spell(token)
        return known

    def _spell(self, token: str) -> bytes:
        if self._letters is not None:
            letters = [self._letters.get(letter) for letter in token]
            spelt = [byte for byte in letters if byte is not None]
            return bytes(spelt) if len(spelt) == len(letters) else token.encode()
        if self._has_byte_tokens and len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


class Detokenizer:
    """One request's output as text; never half a character, O(1) a token.

    Bytes that turn out not to be UTF-8 become U+FFFD, as when all of them are decoded at once.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._token_bytes[token_id])

    def finish(self) -> str:
        """What is left of a character that was never completed."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Passes text on until a stop string is complete, and nothing of that string.

    Of several stop strings the first to be complete counts, and of those that end at the same
    character the longest: so the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """The text that can be shown now; what might begin a stop string is kept back."""
        if not self._stops:
            return piece
        if self.stopped:
            return ""
        text = self._held + piece
        start = self._first_match(text)
        self.stopped = start is not None
        shown = self._first_doubt(text) if start is None else start
        self._held = "" if self.stopped else text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was kept back: no stop string will complete it."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        found = [(text.find(stop), len(stop)) for stop in self._stops]
        ends = [(start + length, start) for start, length in found if start >= 0]
        return min(ends)[1] if ends else None

    def _first_doubt(self, text: str) -> int:
        """Where the longest ending of `text` starts that begins a stop string."""
        doubt = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= start < doubt:
                if stop.startswith(text[start:]):
                    doubt = start
                    break
                start = text.find(stop[0], start + 1)
        return doubt


class ChatTokenizer:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.token_bytes = TokenBytes(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> "ChatTokenizer":
        """Read tokenizer.json, and chat_template.jinja or tokenizer_config.json's template."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json: save the model's fast tokenizer there"
            )
        return cls(Tokenizer.from_file(str(path)), _read_template(folder))

    def encode(self, text: str) -> list[int]:
        """A plain prompt, with what the tokenizer puts before one (a BOS token, if any)."""
        return self._tokenizer.encode(text).ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> list[int]:
        """The prompt of a chat; the template writes its own special tokens."""
        if self._template is None:
            raise RequestError(
                "This model has no chat template: use /v1/completions.", param="messages"
            )
        text = self._template.render(messages, options)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """All of `ids` at once, special tokens left out."""
        return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        """How a single token is shown: part of a character as `bytes:\\xNN`, as OpenAI does."""
        spelt = self.token_bytes[token_id]
        if not spelt:
            return self._tokenizer.id_to_token(token_id) or ""
        try:
            return spelt.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_template(folder: Path) -> ChatTemplate | None:
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
