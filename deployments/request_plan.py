"""OpenAI's request bodies to generations: what depends on the model is checked, then translated.

Pure: no HTTP, no sockets, no clock. A `Plan` holds the generations of one request, and what
`deployments.answer` needs to know to answer it.

    request body -> schemas.parse_* -> plan_* -> Plan.specs -> DriverClient.generate
                    Answer.body <─┐                                  │
                    Answer.stream <┴──────── Answer.feed <── events ──┘
"""

from collections.abc import Collection, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from deployments.chat_template import ASIDE, Effort
from deployments.errors import NotFound, RequestError
from deployments.generations import GenerateSpec
from deployments.response_format import grammar_of
from deployments.schemas import (
    MAX_PROMPTS,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    refuse_unsupported,
    unsupported,
)
from deployments.tokenizer import ChatTokenizer
from workers.protocol import Sampling, pack

DEFAULT_COMPLETION_TOKENS = 16


class ModelLimits(Struct, frozen=True, kw_only=True):
    """What of the model bounds a request."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Plan(Struct, frozen=True, kw_only=True):
    """One checked request: its generations, and what its answer needs to know."""

    specs: tuple[GenerateSpec, ...]
    """Choice number j * n + i is sample i of prompt j."""
    prompts: tuple[tuple[int, ...], ...]
    """Prompt ids, one entry a prompt."""
    texts: tuple[str, ...]
    """The prompts as text; only filled for `echo`."""
    num_samples: int
    stops: tuple[str, ...]
    num_logprobs: int
    """-1 none, else how many of the likeliest are shown."""
    is_chat: bool
    echo: bool
    echo_only: bool
    """`max_tokens` is 0: the one token that has to be generated is not shown."""
    show_prompt_logprobs: bool
    stream: bool
    include_usage: bool


def check_model(asked: str, served: str) -> None:
    if asked != served:
        raise NotFound(
            f"This server serves the model '{served}', not the one that was asked for.",
            param="model",
            code="model_not_found",
        )


def plan_completion(
    request: CompletionRequest,
    tokenizer: ChatTokenizer,
    limits: ModelLimits,
    *,
    seed: int,
    salt: str = "",
) -> Plan:
    """The generations of a completion. `seed` is used if the request has none."""
    given = _prompts(request.prompt)
    prompts = [tokenizer.encode(one) if isinstance(one, str) else one for one in given]
    for ids in prompts:
        _in_vocabulary(ids, "prompt", limits)
    texts: tuple[str, ...] = ()
    if request.echo:
        texts = tuple(one if isinstance(one, str) else tokenizer.decode(one) for one in given)
    num_logprobs = -1 if request.logprobs is None else request.logprobs
    num_prompt_logprobs = -1 if request.prompt_logprobs is None else request.prompt_logprobs
    if request.echo:
        num_prompt_logprobs = max(num_prompt_logprobs, num_logprobs)
    return _plan(
        request,
        prompts,
        limits,
        max_tokens=request.max_tokens,
        default_tokens=DEFAULT_COMPLETION_TOKENS,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        texts=texts,
        seed=seed,
        salt=salt,
    )


def plan_chat(
    request: ChatRequest,
    tokenizer: ChatTokenizer,
    limits: ModelLimits,
    *,
    seed: int,
    salt: str = "",
    effort: Effort = ASIDE,
) -> Plan:
    """The generations of a chat's next message. `seed` is used if the request has none.

    `TooMuchEffort` if its prompt takes more than `effort` to render.
    """
    options = request.chat_template_kwargs
    ids = tokenizer.encode_chat(
        [_message(message, place) for place, message in enumerate(request.messages)],
        {} if options is None else msgspec.to_builtins(options),
        effort,
    )
    _in_vocabulary(ids, "messages", limits)
    return _plan(
        request,
        [ids],
        limits,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        default_tokens=None,
        num_logprobs=(request.top_logprobs or 0) if request.logprobs else -1,
        num_prompt_logprobs=-1 if request.prompt_logprobs is None else request.prompt_logprobs,
        texts=(),
        seed=seed,
        salt=salt,
    )


def _plan(
    request: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    limits: ModelLimits,
    *,
    max_tokens: int | None,
    default_tokens: int | None,
    num_logprobs: int,
    num_prompt_logprobs: int,
    texts: tuple[str, ...],
    seed: int,
    salt: str,
) -> Plan:
    is_chat = isinstance(request, ChatRequest)
    param = "messages" if is_chat else "prompt"
    rooms = [_room(len(ids), limits, param) for ids in prompts]
    sampling = _sampling(
        request, limits, num_logprobs=num_logprobs, num_prompt_logprobs=num_prompt_logprobs
    )
    num_samples = request.n or 1
    grammar = grammar_of(request)
    specs = []
    for ids, room in zip(prompts, rooms, strict=True):
        allowed = _allowed(request, len(ids), room, max_tokens, default_tokens, limits)
        prompt = pack(ids)
        for _ in range(num_samples):
            keyed = msgspec.structs.replace(
                sampling,
                seed=(seed if request.seed is None else request.seed) & (2**63 - 1),
                nonce=len(specs),
            )
            specs.append(
                GenerateSpec(
                    prompt=prompt,
                    max_tokens=allowed,
                    stop_token_ids=sampling.stop_token_ids,
                    sampling=keyed,
                    salt=salt,
                    grammar=grammar,
                )
            )
    options = request.stream_options
    return Plan(
        specs=tuple(specs),
        prompts=tuple(map(tuple, prompts)),
        texts=texts,
        num_samples=num_samples,
        stops=_stops(request),
        num_logprobs=num_logprobs,
        is_chat=is_chat,
        echo=bool(texts),
        echo_only=max_tokens == 0,
        show_prompt_logprobs=request.prompt_logprobs is not None,
        stream=bool(request.stream),
        include_usage=options is not None and bool(options.include_usage),
    )


def _prompts(
    prompt: str | list[str | int | list[int]],
) -> Sequence[str | Sequence[int]]:
    """OpenAI's four ways to write prompts, as a list of texts or of id lists."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("'prompt' must not be empty.", param="prompt")
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [ids]
    texts = [item for item in prompt if isinstance(item, str)]
    lists = [item for item in prompt if isinstance(item, list)]
    if len(prompt) not in (len(texts), len(lists)):
        raise RequestError(
            "'prompt' must be a string, a list of strings, a list of token ids or a list of such "
            "lists, not a mixture.",
            param="prompt",
        )
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(
            f"'prompt' has {len(prompt)} prompts and the limit is {MAX_PROMPTS}.", param="prompt"
        )
    return texts or lists


def _room(num_prompt: int, limits: ModelLimits, param: str) -> int:
    """Output tokens that fit behind a prompt; at least one must."""
    if num_prompt == 0:
        raise RequestError(f"'{param}' must not be empty.", param=param)
    if num_prompt >= limits.max_model_len:
        raise RequestError(
            f"This model's context is {limits.max_model_len} tokens and the prompt has "
            f"{num_prompt}, which leaves no room for an answer: shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )
    return limits.max_model_len - num_prompt


def _allowed(
    request: GenerationRequest,
    num_prompt: int,
    room: int,
    max_tokens: int | None,
    default_tokens: int | None,
    limits: ModelLimits,
) -> int:
    """How many tokens may be generated for a prompt."""
    if max_tokens is None:
        allowed = room if default_tokens is None else min(room, default_tokens)
    else:
        allowed = max(max_tokens, 1)
    if allowed > room:
        raise RequestError(
            f"This model's context is {limits.max_model_len} tokens, and {num_prompt} in the "
            f"prompt and {allowed} to generate are {num_prompt + allowed}: shorten the prompt or "
            f"ask for at most {room}.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if (request.min_tokens or 0) > allowed:
        raise RequestError(
            f"'min_tokens' is {request.min_tokens} and at most {allowed} will be generated.",
            param="min_tokens",
        )
    return allowed


def _in_vocabulary(ids: Collection[int], param: str, limits: ModelLimits) -> None:
    """Every id is one the model has, whatever the tokenizer's size."""
    if ids and not (min(ids) >= 0 and max(ids) < limits.vocab_size):
        raise RequestError(
            f"'{param}' has a token id outside 0 to {limits.vocab_size - 1}.", param=param
        )


def _sampling(
    request: GenerationRequest,
    limits: ModelLimits,
    *,
    num_logprobs: int,
    num_prompt_logprobs: int,
) -> Sampling:
    bias, stop_ids = request.logit_bias or {}, request.stop_token_ids or []
    _in_vocabulary(bias, "logit_bias", limits)
    _in_vocabulary(stop_ids, "stop_token_ids", limits)
    ends = () if request.ignore_eos else limits.eos_token_ids
    return Sampling(
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=max(0, request.top_k or 0),
        min_p=_or(request.min_p, 0.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        logit_bias=tuple(bias.items()),
        min_tokens=request.min_tokens or 0,
        stop_token_ids=tuple(dict.fromkeys((*ends, *stop_ids))),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _stops(request: GenerationRequest) -> tuple[str, ...]:
    stop = request.stop
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _message(message: ChatMessage, place: int) -> dict[str, Any]:
    """A message as chat templates read it: a role they know and its text."""
    where = f"messages[{place}]"
    if message.role in ("tool", "function"):
        raise unsupported(f"{where}.role")
    refuse_unsupported(message, f"{where}.")
    role = "system" if message.role == "developer" else message.role
    told = {"role": role, "content": _content(message, where)}
    return told if message.name is None else {**told, "name": message.name}


def _content(message: ChatMessage, where: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role != "assistant":
            raise RequestError(f"'{where}.content' is required.", param=f"{where}.content")
        return message.refusal or ""
    texts = []
    for place, part in enumerate(content):
        inside = f"{where}.content[{place}]"
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "refusal"):
            raise unsupported(f"{inside}.type")
        refuse_unsupported(part, f"{inside}.")
        if text is None:
            raise RequestError(f"'{inside}.text' is required.", param=f"{inside}.text")
        texts.append(text)
    return "".join(texts)
