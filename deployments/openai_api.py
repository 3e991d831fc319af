"""OpenAI's request bodies to generations, and generations' tokens back to OpenAI's answers.

Pure translation: no HTTP, no sockets, no clock. `plan_completion` and `plan_chat` check what
depends on the model and give a `Plan`; an `Answer` is fed the events of that plan's generations and
gives stream events, and the whole answer at the end. Both read the same text, token by token, so
a stream says exactly what the whole answer says.

    request body -> schemas.parse_* -> plan_* -> Plan.specs -> DriverClient.generate
                    Answer.body <─┐                                  │
                    Answer.stream <┴──────── Answer.feed <── events ──┘
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from deployments.driver_client import Event, GenerateSpec
from deployments.errors import NotFound, RequestError
from deployments.messages import FINISH_LENGTH, FINISH_STOP
from deployments.response_format import grammar_of
from deployments.schemas import (
    MAX_PROMPTS,
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    ContentLogprob,
    Delta,
    GenerationRequest,
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    TopLogprob,
    Usage,
    refuse_unsupported,
    unsupported,
)
from deployments.tokenizer import ChatTokenizer, Detokenizer, StopMatcher
from workers.protocol import Sampling, TokenLogprobs, pack

DEFAULT_COMPLETION_TOKENS = 16

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no word for."""


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
) -> Plan:
    """The generations of a chat's next message. `seed` is used if the request has none."""
    options = request.chat_template_kwargs
    ids = tokenizer.encode_chat(
        [_message(message, place) for place, message in enumerate(request.messages)],
        {} if options is None else msgspec.to_builtins(options),
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


class Piece(Struct):
    """What one choice has to say since it was last asked."""

    text: str
    logprobs: list[TokenLogprobs]
    texts: list[str]
    """How each token of `logprobs` is shown."""
    finish_reason: str | None


class Choice:
    """The text of one generation as it grows; ends itself at a stop string."""

    def __init__(self, tokenizer: ChatTokenizer, plan: Plan, index: int) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._spec = plan.specs[index]
        self._hidden = plan.echo_only
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer.token_bytes)
        self._matcher = StopMatcher(plan.stops)
        self._piece = Piece("", [], [], None)

    def feed(self, event: Event) -> bool:
        """Take one token; true if it completes a stop string, so that no more are wanted."""
        if self.finish_reason is not None:
            return False
        if self._hidden:
            self._end(FINISH_LENGTH)
            return event.finish_reason is None
        self.num_tokens += 1
        if event.finish_reason == FINISH_STOP and event.token in self._spec.stop_token_ids:
            self._close(FINISH_STOP)
            return False
        if event.logprobs is not None:
            self._piece.logprobs.append(event.logprobs)
            self._piece.texts.append(self._tokenizer.token_text(event.token))
        self._say(self._detokenizer.feed(event.token))
        if self._matcher.stopped:
            self._end(FINISH_STOP)
            return event.finish_reason is None
        if event.finish_reason is not None:
            self._close(event.finish_reason)
        return False

    def take(self) -> Piece:
        piece, self._piece = self._piece, Piece("", [], [], None)
        return piece

    def _say(self, text: str) -> None:
        """Until `min_tokens` are out nothing can stop the text, so nothing is kept back."""
        if self.num_tokens < self._spec.sampling.min_tokens:
            self._piece.text += text
        elif text:
            self._piece.text += self._matcher.feed(text)

    def _close(self, reason: str) -> None:
        """No more tokens come: what was kept back is shown, unless its end completes a stop."""
        self._piece.text += self._matcher.feed(self._detokenizer.finish())
        self._piece.text += self._matcher.finish()
        self._end(FINISH_STOP if self._matcher.stopped else reason)

    def _end(self, reason: str) -> None:
        self.finish_reason = self._piece.finish_reason = reason


class Answer:
    """What is said to the client about one plan, as events of a stream or all at once."""

    def __init__(
        self, plan: Plan, tokenizer: ChatTokenizer, *, answer_id: str, created: int, model: str
    ) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self.id = answer_id
        self._created = created
        self._model = model
        self._choices = [Choice(tokenizer, plan, i) for i in range(len(plan.specs))]
        self._offsets = [0] * len(plan.specs)
        """Where in the text the next token of each choice starts, for completions' logprobs."""
        self._begun = [False] * len(plan.specs)
        self._whole: list[list[Piece]] = [[] for _ in plan.specs]

    def feed(self, events: Iterable[Event]) -> list[tuple[int, int]]:
        """Take tokens; the (choice, index) from which on they are not wanted any more."""
        ended = []
        for event in events:
            if self._choices[event.choice].feed(event):
                ended.append((event.choice, event.index + 1))
        return ended

    @property
    def finish_reasons(self) -> list[str]:
        """Of the choices that have ended."""
        return [one.finish_reason for one in self._choices if one.finish_reason is not None]

    # As a stream.

    def stream(
        self, events: Iterable[Event], prompt_logprobs: Sequence[Mapping[int, TokenLogprobs]]
    ) -> list[ChatChunk] | list[Completion]:
        """The stream's next events, for the choices that `events`, fed before, belong to."""
        touched = dict.fromkeys(event.choice for event in events)
        if self._plan.is_chat:
            return [chunk for choice in touched for chunk in self._chat_chunks(choice)]
        return [
            chunk
            for choice in touched
            for chunk in self._completion_chunks(choice, prompt_logprobs[choice])
        ]

    def usage_event(self, num_cached: Sequence[int]) -> ChatChunk | Completion:
        """The last event, if the client asked for it."""
        kind = ChatChunk if self._plan.is_chat else Completion
        return kind(self.id, self._created, self._model, [], usage=self.usage(num_cached))

    def _chat_chunks(self, choice: int) -> list[ChatChunk]:
        piece = self._choices[choice].take()
        chunks = []
        if not self._begun[choice]:
            self._begun[choice] = True
            chunks.append(self._chat_chunk(choice, Delta("assistant", ""), None, None))
        if piece.text or piece.logprobs:
            logprobs = self._chat_logprobs(piece)
            chunks.append(self._chat_chunk(choice, Delta(content=piece.text), logprobs, None))
        if piece.finish_reason is not None:
            chunks.append(self._chat_chunk(choice, Delta(), None, piece.finish_reason))
        return chunks

    def _chat_chunk(
        self, choice: int, delta: Delta, logprobs: ChatLogprobs | None, reason: str | None
    ) -> ChatChunk:
        usage = None if self._plan.include_usage else UNSET
        said = ChatChunkChoice(choice, delta, logprobs, reason)
        return ChatChunk(self.id, self._created, self._model, [said], usage)

    def _completion_chunks(
        self, choice: int, prompt_logprobs: Mapping[int, TokenLogprobs]
    ) -> list[Completion]:
        piece = self._choices[choice].take()
        text = piece.text
        logprobs = self._new_logprobs()
        if not self._begun[choice]:
            self._begun[choice] = True
            text = self._echo(choice, logprobs, prompt_logprobs) + text
        self._add_logprobs(choice, logprobs, piece)
        if not text and piece.finish_reason is None and not (logprobs and logprobs.tokens):
            return []
        usage = None if self._plan.include_usage else UNSET
        said = CompletionChoice(choice, text, logprobs, piece.finish_reason)
        return [Completion(self.id, self._created, self._model, [said], usage)]

    # All at once.

    def collect(self, events: Iterable[Event]) -> None:
        """Keep what was fed, until `body`."""
        for choice in dict.fromkeys(event.choice for event in events):
            self._whole[choice].append(self._choices[choice].take())

    def body(
        self, num_cached: Sequence[int], prompt_logprobs: Sequence[Mapping[int, TokenLogprobs]]
    ) -> ChatCompletion | Completion:
        pieces = [_joined(pieces) for pieces in self._whole]
        head = (self.id, self._created, self._model)
        if self._plan.is_chat:
            return ChatCompletion(
                *head,
                [self._chat_choice(choice, piece) for choice, piece in enumerate(pieces)],
                self.usage(num_cached),
                prompt_logprobs=self._prompt_logprobs(0, prompt_logprobs[0]),
            )
        choices = [
            self._completion_choice(choice, piece, prompt_logprobs[choice])
            for choice, piece in enumerate(pieces)
        ]
        return Completion(*head, choices, self.usage(num_cached))

    def usage(self, num_cached: Sequence[int]) -> Usage:
        """A prompt counts once, however many samples it has."""
        plan = self._plan
        prompt = sum(map(len, plan.prompts))
        output = sum(choice.num_tokens for choice in self._choices)
        cached = sum(num_cached[:: plan.num_samples])
        return Usage(prompt, output, prompt + output, PromptTokensDetails(cached))

    def _chat_choice(self, choice: int, piece: Piece) -> ChatChoice:
        logprobs = self._chat_logprobs(piece)
        return ChatChoice(choice, AnswerMessage(piece.text), logprobs, piece.finish_reason)

    def _completion_choice(
        self, choice: int, piece: Piece, prompt_logprobs: Mapping[int, TokenLogprobs]
    ) -> CompletionChoice:
        logprobs = self._new_logprobs()
        text = self._echo(choice, logprobs, prompt_logprobs) + piece.text
        self._add_logprobs(choice, logprobs, piece)
        return CompletionChoice(
            choice,
            text,
            logprobs,
            piece.finish_reason,
            prompt_logprobs=self._prompt_logprobs(choice, prompt_logprobs),
        )

    # Log-probabilities.

    def _chat_logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if self._plan.num_logprobs < 0:
            return None
        return ChatLogprobs(
            [
                ContentLogprob(
                    text,
                    _finite(found.logprob),
                    list(self._tokenizer.token_bytes[found.token]),
                    [
                        TopLogprob(
                            self._tokenizer.token_text(token),
                            _finite(logprob),
                            list(self._tokenizer.token_bytes[token]),
                        )
                        for token, logprob in self._top(found)
                    ],
                )
                for text, found in zip(piece.texts, piece.logprobs, strict=True)
            ]
        )

    def _top(self, found: TokenLogprobs) -> list[tuple[int, float]]:
        pairs = zip(found.top_ids, found.top_logprobs, strict=False)
        return list(pairs)[: self._plan.num_logprobs]

    def _new_logprobs(self) -> CompletionLogprobs | None:
        if self._plan.num_logprobs < 0:
            return None
        return CompletionLogprobs([], [], [] if self._plan.num_logprobs > 0 else None, [])

    def _add_logprobs(self, choice: int, logprobs: CompletionLogprobs | None, piece: Piece) -> None:
        if logprobs is not None:
            for found in piece.logprobs:
                self._add_logprob(choice, logprobs, found.token, found)

    def _add_logprob(
        self,
        choice: int,
        logprobs: CompletionLogprobs,
        token: int,
        found: TokenLogprobs | None,
    ) -> None:
        text = self._tokenizer.token_text(token)
        logprobs.tokens.append(text)
        logprobs.token_logprobs.append(None if found is None else _finite(found.logprob))
        logprobs.text_offset.append(self._offsets[choice])
        # NOTE: counts characters begun: bytes 10xxxxxx only go on with one.
        spelt = self._tokenizer.token_bytes[token]
        self._offsets[choice] += sum(byte & 0xC0 != 0x80 for byte in spelt)
        if logprobs.top_logprobs is not None:
            logprobs.top_logprobs.append(None if found is None else self._top_by_text(found))

    def _top_by_text(self, found: TokenLogprobs) -> dict[str, float]:
        """The likeliest and the chosen token; of two that read the same the likelier counts."""
        shown: dict[str, float] = {}
        for token, logprob in (*self._top(found), (found.token, found.logprob)):
            shown.setdefault(self._tokenizer.token_text(token), _finite(logprob))
        return shown

    def _echo(
        self,
        choice: int,
        logprobs: CompletionLogprobs | None,
        prompt_logprobs: Mapping[int, TokenLogprobs],
    ) -> str:
        """The prompt's text, with its tokens in `logprobs`, if the client wants it back."""
        if not self._plan.echo:
            return ""
        prompt = choice // self._plan.num_samples
        if logprobs is not None:
            for position, token in enumerate(self._plan.prompts[prompt]):
                found = prompt_logprobs.get(position) if position else None
                self._add_logprob(choice, logprobs, token, found)
        return self._plan.texts[prompt]

    def _prompt_logprobs(
        self, choice: int, found: Mapping[int, TokenLogprobs]
    ) -> PromptLogprobs | msgspec.UnsetType:
        if not self._plan.show_prompt_logprobs:
            return UNSET
        prompt = self._plan.prompts[choice // self._plan.num_samples]
        return [
            self._prompt_logprob(found.get(position) if position else None)
            for position in range(len(prompt))
        ]

    def _prompt_logprob(self, found: TokenLogprobs | None) -> dict[str, PromptLogprob] | None:
        if found is None:
            return None
        shown = {
            str(token): PromptLogprob(_finite(logprob), rank, self._tokenizer.token_text(token))
            for rank, (token, logprob) in enumerate(
                zip(found.top_ids, found.top_logprobs, strict=False), start=1
            )
        }
        text = self._tokenizer.token_text(found.token)
        own = PromptLogprob(_finite(found.logprob), found.rank, text)
        return {str(found.token): own, **shown}


def _finite(logprob: float) -> float:
    """JSON has no infinity, and NaN fails the comparison too."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        "".join(piece.text for piece in pieces),
        [found for piece in pieces for found in piece.logprobs],
        [text for piece in pieces for text in piece.texts],
        pieces[-1].finish_reason if pieces else None,
    )
