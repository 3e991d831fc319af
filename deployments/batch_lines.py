"""The lines of a batch, in and out: OpenAI's JSONL, and which of them are done already.

A line of input asks one thing; exactly one line of output says what became of it, joined to it by
`custom_id`. A line that cannot be asked has no answer but an error, and is known again by its
number, which is in the `id` of what was written about it. So what has been written says what is
left to do, whenever the writing stopped.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"id": "batch_req_1", "custom_id": "a", "response": {"status_code": 200, ...}, "error": null}

Pure but for reading the files it is handed: no engine, no network, no clock.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Annotated, Any, BinaryIO

import msgspec
from msgspec import Meta, Raw, Struct

from deployments.schemas import MAX_BODY_BYTES

URLS = ("/v1/chat/completions", "/v1/completions")
MAX_LINE_BYTES = MAX_BODY_BYTES + 2**16
LONGEST_REASON = 200


class BatchError(ValueError):
    """The batch cannot be run as it was asked for; the sentence is for who asked."""


class Asked(Struct, frozen=True):
    """One line of input."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    url: str
    body: Raw
    method: str = "POST"


class Body(Struct, frozen=True):
    stream: Any = None


class LineError(Struct, frozen=True):
    code: str
    message: str


class Response(Struct, frozen=True):
    status_code: int
    request_id: str
    body: Raw


class Result(Struct, frozen=True):
    """One line of output."""

    id: str
    custom_id: str | None
    response: Response | None
    error: LineError | None


class Usage(Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Counted(Struct, frozen=True):
    usage: Usage = Usage()


class RefusalError(Struct, frozen=True):
    message: str = ""


class Refusal(Struct, frozen=True):
    """An answer that is an error, as far as it is shown."""

    error: RefusalError = RefusalError()


@dataclass(frozen=True, slots=True)
class Question:
    """A line that can be asked."""

    number: int
    custom_id: str
    url: str
    body: bytes


@dataclass(slots=True)
class Done:
    """What has been written about."""

    answered: set[int] = field(default_factory=set)
    """`key` of every custom_id that has its answer."""
    refused: set[int] = field(default_factory=set)
    """Numbers of the lines that could not be asked."""

    def __len__(self) -> int:
        return len(self.answered) + len(self.refused)


def key(custom_id: str) -> int:
    """Eight bytes that stand for a custom_id: a million of them fit in memory."""
    return int.from_bytes(blake2b(custom_id.encode(), digest_size=8).digest(), "big")


_decode_asked = msgspec.json.Decoder(Asked).decode
_decode_body = msgspec.json.Decoder(Body).decode
_decode_result = msgspec.json.Decoder(Result).decode
_decode_counted = msgspec.json.Decoder(Counted).decode
_decode_refusal = msgspec.json.Decoder(Refusal).decode
_encode = msgspec.json.Encoder().encode


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Every line that is not blank, with its number from 1; None for one that is too long."""
    number = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        is_too_long = len(data) > MAX_LINE_BYTES
        while is_too_long and data and not data.endswith(b"\n"):
            data = file.readline(MAX_LINE_BYTES)
        if is_too_long:
            yield number, None
        elif data.strip():
            yield number, data


def read_question(number: int, data: bytes | None, seen: set[int]) -> Question | Result:
    """What the line asks, or the error to write about it. `seen` grows by its custom_id."""
    if data is None:
        return refusal(number, None, "line_too_long", f"The line is over {MAX_LINE_BYTES} bytes.")
    try:
        asked = _decode_asked(data)
    except msgspec.ValidationError as error:
        return refusal(number, None, "invalid_line", f"The line is not a request: {error}.")
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return refusal(number, None, "invalid_json", "The line is not valid JSON.")
    wrong = _wrong(asked, seen)
    if wrong is not None:
        return Result(_id(number), asked.custom_id, None, wrong)
    seen.add(key(asked.custom_id))
    return Question(number, asked.custom_id, asked.url, bytes(asked.body))


def _wrong(asked: Asked, seen: set[int]) -> LineError | None:
    if key(asked.custom_id) in seen:
        return LineError("duplicate_custom_id", "An earlier line has the same custom_id.")
    if asked.method != "POST":
        return LineError("invalid_method", "'method' must be POST.")
    if asked.url not in URLS:
        return LineError("invalid_url", f"'url' must be one of {', '.join(URLS)}.")
    try:
        body = _decode_body(asked.body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return LineError("invalid_body", "'body' must be an object.")
    if body.stream:
        return LineError("invalid_body", "'stream' is not offered in a batch: leave it out.")
    return None


def refusal(number: int, custom_id: str | None, code: str, message: str) -> Result:
    return Result(_id(number), custom_id, None, LineError(code, message))


def result(question: Question, status: int, request_id: str, body: bytes) -> Result:
    """What is written about an answer; an answer that is an error says so twice."""
    try:
        told = Raw(msgspec.json.format(body, indent=-1))  # on one line
        msgspec.json.decode(told)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        told, status = Raw(b"null"), status if status >= 400 else 502
    error = None
    if status >= 400:
        error = LineError(f"http_{status}", "The request was refused; the response says why.")
    response = Response(status, request_id, told)
    return Result(_id(question.number), question.custom_id, response, error)


def refusal_in_words(status: int, body: bytes) -> str:
    """Why a line was not answered, on one line of a terminal: "the service answers 503 (...)"."""
    try:
        message = _decode_refusal(body).error.message
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        message = ""  # from whatever is in front of the service
    said = "".join(one if one.isprintable() else " " for one in message)[:LONGEST_REASON]
    return f"the service answers {status}" + (f" ({said})" if said else "")


def encode_result(one: Result) -> bytes:
    return _encode(one) + b"\n"


def num_tokens(one: Result) -> Usage:
    """What an answer says that it took."""
    if one.response is None:
        return Usage()
    try:
        return _decode_counted(one.response.body).usage
    except msgspec.DecodeError:
        return Usage()


def read_done(file: BinaryIO, name: str, done: Done) -> tuple[int, bool]:
    """Note what has been written to `file`; how long its whole lines are, and whether the last one
    lacks its end only.

    A last line that was torn is not counted; any other that is not ours is a `BatchError`.
    """
    size = 0
    for number, data in enumerate(file, 1):
        found = _result_in(data)
        if found is None:
            if not data.endswith(b"\n"):
                break
            raise BatchError(
                f"line {number} of {name} is not a batch's result: name another output, or move "
                "that file away"
            )
        size += len(data)
        _note(found, done)
        if not data.endswith(b"\n"):
            return size, True
    return size, False


def _result_in(data: bytes) -> Result | None:
    try:
        found = _decode_result(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return found if _ID.fullmatch(found.id) else None


def _note(found: Result, done: Done) -> None:
    if found.response is not None and found.custom_id is not None:
        done.answered.add(key(found.custom_id))
    else:
        done.refused.add(int(found.id.removeprefix(_PREFIX)))


_PREFIX = "batch_req_"
_ID = re.compile(_PREFIX + r"[0-9]{1,12}")


def _id(number: int) -> str:
    return f"{_PREFIX}{number}"
