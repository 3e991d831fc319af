"""The bodies of OpenAI's API, in and out, as msgspec structs with their limits in the types.

A limit is written once, in the annotation of its field; `parse` turns what msgspec finds into a
`RequestError` whose `param` names the field. A field of OpenAI's that is not offered is listed
in `NEUTRAL`: clients may send it at the value that asks for nothing. What depends on the model
(its vocabulary, the length of its context) is checked in `deployments.request_plan`.

    >>> parse_completion(b'{"model": "m", "prompt": "2+2=", "max_token": 4}')
    Traceback (most recent call last):
    ...
    deployments.errors.RequestError: Unknown field 'max_token': did you mean 'max_tokens'?
"""

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from deployments.errors import RequestError
from deployments.messages import MAX_GRAMMAR_CHARS

MAX_BODY_BYTES = 4 * 2**20
MAX_CHOICES = 8
MAX_MESSAGES = 2048
MAX_PROMPTS = 64
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_CHOICES_OF_TEXT = 4096

# NOTE: `\Z`, because `$` would let a trailing newline through.
Label = Annotated[str, Meta(pattern=r"^[\x20-\x7e]{1,128}\Z")]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
GrammarText = Annotated[str, Meta(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
TextChoices = Annotated[list[GrammarText], Meta(min_length=1, max_length=MAX_CHOICES_OF_TEXT)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted and ignored: no padding is ever sent."""


class JsonSchemaFormat(Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
    schema: dict[str, Any]
    strict: bool | None = None
    """Accepted and ignored: a schema is always followed to the letter."""
    description: Annotated[str, Meta(max_length=4096)] | None = None
    """Accepted and ignored."""


class ResponseFormat(Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """vLLM's object; the `guided_*` fields are its older names for the same."""

    json: dict[str, Any] | GrammarText | None = None
    regex: GrammarText | None = None
    choice: TextChoices | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None


class GenerationRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """What both endpoints understand. `None` is OpenAI's default."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """-1 and 0 keep all."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] | None = None
    logit_bias: (
        Annotated[
            dict[int, Annotated[float, Meta(ge=-100.0, le=100.0)]],
            Meta(max_length=MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    prompt_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | GrammarText | None = None
    """A JSON schema, as an object or as its text."""
    guided_regex: GrammarText | None = None
    guided_choice: TextChoices | None = None
    guided_grammar: GrammarText | None = None
    """In Lark's notation, as llguidance reads it."""
    cache_salt: Label | None = None
    """Requests share cached prefixes only under the same salt."""
    user: Label | None = None
    """Accepted and ignored."""


class CompletionRequest(GenerationRequest):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    best_of: Any = None
    """Only as many as `n`."""
    suffix: Any = None
    prompt_embeds: Any = None


class ContentPart(Struct, forbid_unknown_fields=True):
    type: Annotated[str, Meta(max_length=64)]
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: str | None = None


class ChatMessage(Struct, forbid_unknown_fields=True):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Meta(max_length=MAX_MESSAGES)] | None = None
    name: Label | None = None
    refusal: str | None = None
    """Accepted and ignored, so that an answer can be sent back as it came."""
    annotations: Any = None
    """Accepted and ignored."""
    audio: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None


class ChatTemplateOptions(Struct, forbid_unknown_fields=True):
    """The template variables a client may set; never the template itself."""

    enable_thinking: bool | UnsetType = UNSET
    thinking: bool | UnsetType = UNSET


class ChatRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    chat_template_kwargs: ChatTemplateOptions | None = None
    safety_identifier: Label | None = None
    """Accepted and ignored, like `prompt_cache_key`."""
    prompt_cache_key: Label | None = None
    audio: Any = None
    chat_template: Any = None
    function_call: Any = None
    functions: Any = None
    metadata: Any = None
    modalities: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None


NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (None,),
    "chat_template": (None,),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "prompt_cache_retention": (None,),
    "prompt_embeds": (None,),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_call_id": (None,),
    "tool_calls": (None, []),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "image_url": (None,),
    "input_audio": (None,),
    "file": (None,),
}
"""Fields that are not offered, and the values at which they ask for nothing."""


def unsupported(param: str) -> RequestError:
    return RequestError(
        f"'{param}' is not supported by this server: leave it out.",
        param=param,
        code="unsupported_parameter",
    )


def refuse_unsupported(body: Struct, where: str = "") -> None:
    """Raise for the first field that asks for what is not offered."""
    for name in body.__struct_fields__:
        neutral = NEUTRAL.get(name)
        if neutral is not None and getattr(body, name) not in neutral:
            raise unsupported(where + name)


Body = TypeVar("Body", bound=GenerationRequest)

_WHERE = re.compile(r"^(?P<what>.*?) - at (?:`key` in )?`\$\.?(?P<where>.*)`$", re.DOTALL)
_EXPECTED = re.compile(r"^Expected `([^`]{1,120})`(.{0,80})$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(\w+)`$")
_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "an integer",
    "null": "null",
    "object": "an object",
    "str": "a string",
}


def _in_words(types: str) -> str:
    """`int | null` as a reader of JSON would say it."""
    return " or ".join(_WORDS.get(name, name) for name in types.split(" | "))


def _complaint(param: str, what: str) -> str:
    """msgspec's finding as a sentence that quotes nothing of the body."""
    expected = _EXPECTED.match(what)
    if expected is None:
        reason = "is out of range" if "out of range" in what else "has a value that is not valid"
        return f"'{param}' {reason}."
    types, rest = expected.groups()
    got = re.match(r"^, got `(\w+)`$", rest)
    if got is not None:
        return f"'{param}' must be {_in_words(types)}, not {_in_words(got[1])}."
    return f"'{param}' must be {_in_words(types)}{rest}."


def _unknown_field(name: str, prefix: str, known: tuple[str, ...]) -> RequestError:
    shown = name if re.match(r"^[\x20-\x7e]{1,64}\Z", name) else "?"
    sentence = f"Unknown field '{prefix}{shown}'"
    nearest = difflib.get_close_matches(shown, known, n=1)
    hint = f": did you mean '{nearest[0]}'?" if nearest else ": leave it out."
    return RequestError(sentence + hint, param=prefix + shown, code="unknown_parameter")


_NESTED: Mapping[str, type[Struct]] = {
    "stream_options": StreamOptions,
    "response_format": ResponseFormat,
    "response_format.json_schema": JsonSchemaFormat,
    "structured_outputs": StructuredOutputs,
    "chat_template_kwargs": ChatTemplateOptions,
    "messages[...]": ChatMessage,
    "messages[...].content[...]": ContentPart,
}


def _refusal(text: str, body: type[Struct]) -> RequestError:
    """What msgspec found wrong, as OpenAI's error object names it."""
    place = _WHERE.match(text)
    what, where = (place["what"], place["where"]) if place else (text, "")
    unknown, missing = _UNKNOWN.match(what), _MISSING.match(what)
    prefix = f"{where}." if where else ""
    if unknown is not None:
        holder = _NESTED.get(re.sub(r"\[\d+\]", "[...]", where), body)
        return _unknown_field(unknown[1], prefix, holder.__struct_fields__)
    if missing is not None:
        param = prefix + missing[1]
        return RequestError(f"'{param}' is required.", param=param, code="missing_parameter")
    if not where:
        return RequestError("The request body must be a JSON object.")
    return RequestError(_complaint(where, what), param=where, code="invalid_value")


def _parse(data: bytes, decoder: msgspec.json.Decoder[Body], body: type[Body]) -> Body:
    try:
        request = decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), body) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise RequestError("The request body is not valid JSON.", code="invalid_json") from None
    except RecursionError:
        raise RequestError("The request body is nested too deeply.", code="invalid_json") from None
    refuse_unsupported(request)
    _check_together(request)
    return request


def _check_together(request: GenerationRequest) -> None:
    """What no single field shows."""
    if request.stream_options is not None and not request.stream:
        raise RequestError("'stream_options' needs 'stream' to be true.", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise RequestError(
            "'prompt_logprobs' is not offered with 'stream': leave one out.",
            param="prompt_logprobs",
        )


_completion_decoder = msgspec.json.Decoder(CompletionRequest)
_chat_decoder = msgspec.json.Decoder(ChatRequest)


def parse_completion(data: bytes) -> CompletionRequest:
    request = _parse(data, _completion_decoder, CompletionRequest)
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("'max_tokens' must be at least 1 without 'echo'.", param="max_tokens")
    if request.best_of not in (None, request.n or 1):
        raise unsupported("best_of")
    return request


def parse_chat(data: bytes) -> ChatRequest:
    request = _parse(data, _chat_decoder, ChatRequest)
    if request.max_tokens == 0:
        raise RequestError("'max_tokens' must be at least 1.", param="max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    asked, older = request.max_completion_tokens, request.max_tokens
    if asked is not None and older is not None and asked != older:
        raise RequestError(
            "'max_tokens' and 'max_completion_tokens' differ: send one of them.",
            param="max_tokens",
        )
    return request


class PromptTokensDetails(Struct):
    cached_tokens: int = 0


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[ContentLogprob]
    refusal: None = None


class CompletionLogprobs(Struct):
    """Parallel lists; the first token of an echoed prompt has neither log-probability nor top."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class PromptLogprob(Struct):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""A prompt token's id and those of the likeliest there, to their log-probabilities."""


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct):
    """The whole answer, and one event of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


class AnswerMessage(Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(Struct):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Delta(Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class Model(Struct):
    id: str
    created: int
    max_model_len: int | None
    object: Literal["model"] = "model"
    owned_by: Literal["lockstep"] = "lockstep"


class ModelList(Struct):
    data: list[Model]
    object: Literal["list"] = "list"
