"""Text to token ids and back, for one checkpoint folder.

`ChatTokenizer` encodes prompts, chats by the checkpoint's own template
(`deployments.chat_template`); `Detokenizer` turns one request's ids into text as they come;
`StopMatcher` finds stop strings in that text. Nothing here knows of HTTP, the driver or torch.

    >>> matcher = StopMatcher(("END",))
    >>> matcher.feed("one E"), matcher.feed("N"), matcher.feed("D two"), matcher.stopped
    ('one ', '', '', True)
"""

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from deployments.chat_template import ASIDE, ChatTemplate, Effort, read_template
from deployments.errors import RequestError


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
        return cls(Tokenizer.from_file(str(path)), read_template(folder))

    def encode(self, text: str) -> list[int]:
        """A plain prompt, with what the tokenizer puts before one (a BOS token, if any)."""
        return self._tokenizer.encode(text).ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        effort: Effort = ASIDE,
    ) -> list[int]:
        """The prompt of a chat; the template writes its own special tokens.

        `TooMuchEffort` if rendering it takes more than `effort`.
        """
        if self._template is None:
            raise RequestError(
                "This model has no chat template: use /v1/completions.", param="messages"
            )
        text = self._template.render(messages, options, effort)
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
