"""Generations' tokens to OpenAI's answers, as events of a stream or all at once.

Pure: no HTTP, no sockets, no clock. A `Choice` is the text of one generation as it grows; an
`Answer` is fed the events of a plan's generations and gives stream events, and the whole answer at
the end. Both read the same text, token by token, so a stream says exactly what the whole answer
says.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec import UNSET, Struct

from deployments.answer_logprobs import (
    add_completion_logprob,
    chat_logprobs,
    logprobs_of_prompt,
    no_completion_logprobs,
)
from deployments.generations import Event
from deployments.messages import FINISH_LENGTH, FINISH_STOP
from deployments.request_plan import Plan
from deployments.schemas import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    PromptLogprobs,
    PromptTokensDetails,
    Usage,
)
from deployments.tokenizer import ChatTokenizer, Detokenizer, StopMatcher
from workers.protocol import TokenLogprobs


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
        return chat_logprobs(piece.texts, piece.logprobs, self._plan.num_logprobs, self._tokenizer)

    def _new_logprobs(self) -> CompletionLogprobs | None:
        num_top = self._plan.num_logprobs
        return None if num_top < 0 else no_completion_logprobs(num_top)

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
        self._offsets[choice] = add_completion_logprob(
            logprobs,
            token,
            found,
            offset=self._offsets[choice],
            num_top=self._plan.num_logprobs,
            tokenizer=self._tokenizer,
        )

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
        return logprobs_of_prompt(len(prompt), found, self._tokenizer)


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        "".join(piece.text for piece in pieces),
        [found for piece in pieces for found in piece.logprobs],
        [text for piece in pieces for text in piece.texts],
        pieces[-1].finish_reason if pieces else None,
    )
