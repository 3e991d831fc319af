"""`LLM`: the engine inside your own process, without Ray and without HTTP.

    from deployments.llm import LLM, SamplingParams

    with LLM(model="/models/Qwen3-8B", tp_size=2) as llm:
        for answer in llm.chat(["What is 128+305?"], SamplingParams(max_tokens=64)):
            print(answer.text)

Ranks are processes of this machine; several nodes need Ray and `lockstep serve`. `LLM` speaks to
its engine as an ingress does, over the same socket and messages, so what is measured here is what
is served; and like an ingress it sends its prompts again, with what they have got so far, when the
engine has lost a rank and is back.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, get_type_hints

import msgspec
import zmq
from tqdm import tqdm

from deployments.config import ServiceConfig
from deployments.engine import Engine
from deployments.fit import check_fit, check_tokenizer, folder_of
from deployments.fleet import LocalFleet
from deployments.messages import (
    DriverBeat,
    Finish,
    Forgotten,
    Grammar,
    IngressBeat,
    Refused,
    RequestFailed,
    Submit,
    Tokens,
    decode_to_ingress,
)
from deployments.tokenizer import ChatTokenizer, Detokenizer, StopMatcher, TokenBytes
from workers.protocol import MAX_MESSAGE_BYTES, Sampling, TokenLogprobs, encode, pack

LAST_WORD_MS = 1000
"""How long a closed line may take to send what was still to be said."""

SAMPLING_TYPES = get_type_hints(Sampling, include_extras=True)
"""Of every field, with the values that the engine takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one prompt is answered; the names are OpenAI's and vLLM's."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    """How many of the likeliest to tell beside each prompt token's own."""
    grammar: Grammar | None = None
    """What the text must look like: `Grammar("regex", "[0-9]+")`; "json" takes a schema's text."""

    def __post_init__(self) -> None:
        """What the engine could not read is refused here, with the name of the field."""
        if not 1 <= self.max_tokens < 2**31:
            raise ValueError(f"max_tokens={self.max_tokens} must be from 1 to {2**31 - 1}")
        sampling = self.sampling((), 0 if self.seed is None else self.seed)
        for name, kind in SAMPLING_TYPES.items():
            value = getattr(sampling, name)
            try:
                msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                asked = name.removeprefix("num_") if "logprobs" in name else name
                raise ValueError(f"{asked}={value!r} is not valid: {error}") from None

    def sampling(self, stop_token_ids: tuple[int, ...], seed: int) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            min_tokens=self.min_tokens,
            stop_token_ids=() if self.ignore_eos else stop_token_ids,
            num_logprobs=-1 if self.logprobs is None else self.logprobs,
            num_prompt_logprobs=-1 if self.prompt_logprobs is None else self.prompt_logprobs,
            seed=seed,
        )


@dataclass(slots=True)
class Answer:
    """One prompt's answer."""

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """Of the prompt's tokens by position, if they were asked for; the first has none."""
    num_cached: int = 0
    """Prompt tokens found in the prefix cache."""


class EngineLost(RuntimeError):
    """The engine has given up; the message says why."""


class LLM:
    def __init__(
        self,
        *,
        in_process: bool = False,
        runner: str = "workers.runner:ModelRunner",
        **settings: Any,
    ) -> None:
        """`settings` are those of `lockstep serve` (see `workers.config.EngineConfig`).

        `in_process` runs the one rank of a world of one as a thread of this process; `runner`
        names what computes the steps (`module:class`).
        """
        self.config = ServiceConfig.from_args(settings).engine
        check_fit(self.config)
        if self.config.num_nodes > 1:
            raise ValueError(
                f"num_nodes={self.config.num_nodes}: `LLM` runs its ranks on this machine; several "
                "nodes need Ray, as with `lockstep serve` or a batch as a Ray job"
            )
        self._tokenizer: ChatTokenizer | None = None
        self._engine = Engine(self.config, LocalFleet(in_process=in_process), runner=runner)
        self._engine.start()
        try:
            self._engine.wait_ready()
        except BaseException:
            self._engine.stop()
            raise
        info = self._engine.info()
        self.max_model_len, self.vocab_size = info.max_model_len, info.vocab_size
        self.stop_token_ids = info.stop_token_ids
        self._epoch = info.epoch
        self._beat_ms = info.beat_ms
        self._ipc_address = info.ipc_address
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._num_requests = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._engine.stop()
        self._context.destroy(linger=0)

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def tokenizer(self) -> ChatTokenizer:
        """Read when first needed: prompts of token ids need none."""
        if self._tokenizer is None:
            self._tokenizer = ChatTokenizer.load(folder_of(self.config))
        return self._tokenizer

    def chat(
        self,
        questions: Sequence[str],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        *,
        use_tqdm: bool = False,
    ) -> list[Answer]:
        """Answer each question as the first turn of a chat."""
        prompts = [
            self.tokenizer.encode_chat([{"role": "user", "content": question}], {})
            for question in questions
        ]
        return self.generate(prompts, params, use_tqdm=use_tqdm)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        *,
        detokenize: bool = True,
        use_tqdm: bool = False,
    ) -> list[Answer]:
        """Continue each prompt (text or token ids); all of them run together."""
        every = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(every) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with {len(every)} sampling params")
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        first = self._num_requests
        self._num_requests += len(ids)
        readers = {
            first + number: _Reader(
                Answer(prompt_ids),
                one,
                self._sampling(one),
                self.tokenizer.token_bytes if detokenize else None,
            )
            for number, (prompt_ids, one) in enumerate(zip(ids, every, strict=True))
        }
        for reader in readers.values():
            self._check_fits(len(reader.answer.prompt_ids))
        self._collect(dict(readers), use_tqdm)
        return [reader.answer for reader in readers.values()]

    def _check_fits(self, num_prompt: int) -> None:
        if not 0 < num_prompt < self.max_model_len:
            raise ValueError(
                f"a prompt of {num_prompt} tokens leaves nothing to generate of the model's "
                f"{self.max_model_len}: prompts must have from 1 to {self.max_model_len - 1}"
            )

    def _sampling(self, params: SamplingParams) -> Sampling:
        """Fixed once a request, so that a request sent again draws the same tokens."""
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return params.sampling(self.stop_token_ids, seed)

    def _submit(self, request: int, reader: "_Reader") -> None:
        answer, sampling = reader.answer, reader.sampling
        num_prompt = len(answer.prompt_ids)
        self._send(
            Submit(
                epoch=self._epoch,
                request=request,
                tokens=pack(answer.prompt_ids + answer.ids),
                num_prompt=num_prompt,
                max_tokens=min(reader.max_tokens, self.max_model_len - num_prompt),
                stop_token_ids=sampling.stop_token_ids,
                sampling=sampling,
                grammar=reader.grammar,
            )
        )

    def _open_line(self) -> "zmq.Socket[bytes]":
        """A new line: the engine does not listen long to one on which nothing is said."""
        if self._socket is not None:
            self._socket.close(linger=LAST_WORD_MS)
        socket = self._socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.connect(self._ipc_address)
        socket.send(encode(IngressBeat(opens=True)))
        return socket

    def _submit_all(self, readers: "dict[int, _Reader]") -> None:
        for request, reader in readers.items():
            self._submit(request, reader)

    def _send(self, message: Submit | Finish | IngressBeat) -> None:
        if self._socket is not None:
            self._socket.send(encode(message))

    def _collect(self, readers: "dict[int, _Reader]", use_tqdm: bool) -> None:
        bar = tqdm(total=len(readers), disable=not use_tqdm, unit="prompt")
        socket = self._open_line()
        self._submit_all(readers)
        with bar:
            while readers:
                if not socket.poll(self._beat_ms):
                    self._send(IngressBeat())
                    continue
                message = decode_to_ingress(socket.recv())
                if isinstance(message, Tokens):
                    bar.update(self._on_tokens(message, readers))
                elif isinstance(message, Refused) and message.request in readers:
                    raise ValueError(message.message)
                elif isinstance(message, RequestFailed):
                    bar.update(_end_failed(message, readers))
                elif isinstance(message, DriverBeat):
                    self._send(IngressBeat())
                    self._follow(message, readers)
                elif isinstance(message, Forgotten):  # this thread was held up for too long
                    socket = self._open_line()
                    self._submit_all(readers)

    def _follow(self, beat: DriverBeat, readers: "dict[int, _Reader]") -> None:
        """Send everything again when the engine serves under a new epoch."""
        if beat.ready and beat.epoch != self._epoch:
            self._epoch = beat.epoch
            self._submit_all(readers)
        health = self._engine.health()
        if health.hopeless:
            raise EngineLost(health.reason)

    def _on_tokens(self, message: Tokens, readers: "dict[int, _Reader]") -> int:
        if message.epoch != self._epoch:
            return 0
        for request, num_cached, _ in message.begun:
            if request in readers:
                readers[request].answer.num_cached = num_cached
        for request, _, values in message.logprobs:
            if request in readers:
                readers[request].answer.logprobs.append(values)
        for request, first, found in message.prompt_logprobs:
            if request in readers:
                readers[request].answer.prompt_logprobs.update(enumerate(found, start=first))
        num_before = len(readers)
        for request, token in zip(message.requests, message.tokens, strict=True):
            reader = readers.get(request)
            if reader is not None and reader.feed(token):
                self._send(Finish(request, len(reader.answer.ids)))
                del readers[request]
        for request, reason in message.finished:
            reader = readers.pop(request, None)
            if reader is not None:
                reader.end(reason)
        return num_before - len(readers)


def _end_failed(failed: RequestFailed, readers: "dict[int, _Reader]") -> int:
    """That request has ended with what it had; the others go on."""
    reader = readers.pop(failed.request, None)
    if reader is None:
        return 0
    reader.end("error")
    return 1


class _Reader:
    """Turns one answer's ids into text as they come."""

    def __init__(
        self,
        answer: Answer,
        params: SamplingParams,
        sampling: Sampling,
        token_bytes: TokenBytes | None,
    ) -> None:
        self.answer = answer
        self.sampling = sampling
        self.max_tokens, self.grammar = params.max_tokens, params.grammar
        self._detokenizer = Detokenizer(token_bytes) if token_bytes else None
        self._matcher = StopMatcher(params.stop)

    def feed(self, token: int) -> bool:
        """True if a stop string has just been completed."""
        self.answer.ids.append(token)
        if self._detokenizer is not None:
            self.answer.text += self._matcher.feed(self._detokenizer.feed(token))
            if self._matcher.stopped:
                self.answer.finish_reason = "stop"
                return True
        return False

    def end(self, reason: str) -> None:
        if self._detokenizer is not None:
            self.answer.text += self._matcher.feed(self._detokenizer.finish())
            self.answer.text += self._matcher.finish()
        self.answer.finish_reason = "stop" if self._matcher.stopped else reason


def generate_lines(config: ServiceConfig, questions: Sequence[str], max_tokens: int) -> int:
    """`lockstep generate`: one answer a line."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    check_fit(config.engine)
    check_tokenizer(config.engine)
    settings = {name: getattr(config.engine, name) for name in config.engine.__struct_fields__}
    with LLM(**settings) as llm:
        for answer in llm.chat(questions, params):
            print(answer.text)
    return 0
