"""All requests that the engine has, from an ingress's Submit to their end.

A request is refused with a sentence, or waits until its grammar is compiled, or goes to a replica's
scheduler; from there its tokens come out of steps. Whoever ends it (its last token, the client, a
fault of its own, a lost ingress) ends it here, and it is counted once.

An epoch's end empties the book: the ingresses keep what they asked for and submit it again.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from deployments.counters import Counters
from deployments.gang import Gang, MaskDue, Model
from deployments.grammar import GrammarRefused, Matcher, Vocabulary
from deployments.grammars import Grammars, Masks, Opened
from deployments.messages import Grammar, Refused, RequestFailed, Submit, ToIngress
from deployments.outbox import Outbox
from deployments.pages import page_names
from deployments.requests import GRAMMAR_ERROR, NUMERICAL_ERROR, Finish, Request
from deployments.scheduler import RequestTooLarge, Scheduler, route
from workers import bundled
from workers.config import EngineConfig
from workers.protocol import unpack

log = logging.getLogger("lockstep.engine")

Key = tuple[bytes, int]
"""Identity of the ingress, number of the request there."""


class RequestBook:
    def __init__(
        self,
        config: EngineConfig,
        counters: Counters,
        send: Callable[[bytes, ToIngress], None],
    ) -> None:
        self._config = config
        self._counters = counters
        self._send = send
        self._running: dict[Key, tuple[Request, Scheduler]] = {}
        """Those that a scheduler has, waiting ones too."""
        self._opening: dict[Key, tuple[Request, Grammar]] = {}
        """Those whose grammar is being compiled."""
        self._grammars = Grammars(self._load_vocabulary)
        self._model: Model | None = None
        self._num_arrivals = 0

    @property
    def wake(self) -> int:
        """Readable when grammars or masks are ready; for the loop's poller."""
        return self._grammars.wake

    def close(self) -> None:
        self._grammars.close()

    def forget(self) -> None:
        """The epoch is over."""
        self._running.clear()
        self._opening.clear()
        self._grammars.forget_tickets()

    # Begin and end

    def submit(self, identity: bytes, submit: Submit, gang: Gang, model: Model) -> None:
        self._model = model
        key = (identity, submit.request)
        request = Request(
            key=key,
            tokens=unpack(submit.tokens).tolist(),
            num_prompt=submit.num_prompt,
            max_tokens=submit.max_tokens,
            stop_token_ids=frozenset(submit.stop_token_ids),
            sampling=submit.sampling,
            salt=submit.salt,
            queued_at=time.monotonic(),
        )
        refusal = self._refusal(request, gang, model)
        if refusal is not None:
            self._send(identity, refusal)
        elif submit.grammar is None:
            self._add(request, gang)
        else:
            self._opening[key] = request, submit.grammar
            opened = self._grammars.open(key, submit.grammar)
            if opened is not None:
                self._on_opened(opened, gang)

    def end(self, identity: bytes, number: int, finish: Finish) -> None:
        """The client is gone, or has all it wants: no later plan names the request."""
        self._opening.pop((identity, number), None)
        found = self._running.pop((identity, number), None)
        if found is None:
            return
        request, scheduler = found
        scheduler.cancel(request, finish)
        self._count(request)

    def cancel_all_of(self, identity: bytes) -> int:
        """The ingress is gone; how many requests it had."""
        asked = [key for key in (*self._running, *self._opening) if key[0] == identity]
        for owner, number in asked:
            self.end(owner, number, Finish.CANCELLED)
        return len(asked)

    def on_outbox(self, outbox: Outbox) -> None:
        """Note what a step has begun and ended."""
        self._counters.num_output_tokens += outbox.num_tokens
        for request in outbox.begun:
            self._counters.first_token(request.num_prompt, max(0, request.num_cached))
        for request in outbox.finished:
            self._running.pop(request.key, None)
            self._count(request)

    def tell_failed(self, gang: Gang) -> None:
        """Requests that ended for a fault of ours, each alone."""
        for scheduler in gang.schedulers:
            failed, scheduler.failed = scheduler.failed, []
            for request in failed:
                identity, number = request.key
                known = {"epoch": gang.epoch}
                log.warning("request %d ended: %s", number, request.failure, extra=known)
                self._running.pop(request.key, None)
                self._count(request)
                self._counters.num_poisoned += request.failure == NUMERICAL_ERROR
                self._send(identity, RequestFailed(number, request.failure))

    def _add(self, request: Request, gang: Gang) -> None:
        """Give a request to a replica."""
        identity, number = request.key
        schedulers = gang.schedulers
        page_size = self._config.page_size
        chosen = route(
            schedulers,
            len(request.tokens),
            lambda: page_names(request.tokens, page_size=page_size, salt=request.salt),
        )
        request.arrival = self._num_arrivals
        try:
            schedulers[chosen].add(request)
        except RequestTooLarge as error:
            self._send(
                identity, Refused(number, 400, str(error), "max_tokens", "context_length_exceeded")
            )
            return
        self._num_arrivals += 1
        self._running[request.key] = (request, schedulers[chosen])

    def _refusal(self, request: Request, gang: Gang, model: Model) -> Refused | None:
        """The driver's own guard, whatever the ingress has checked already."""
        number = request.key[1]
        if request.key in self._running or request.key in self._opening:
            return Refused(number, 400, "this request is already running", "request")
        if request.num_prompt > len(request.tokens):
            return Refused(number, 400, "the prompt is longer than the tokens sent", "prompt")
        if request.num_output >= request.max_tokens:
            return Refused(number, 400, "nothing is left to generate", "max_tokens")
        if any(not 0 <= token < model.vocab_size for token in request.tokens):
            sentence = f"token ids must be from 0 to {model.vocab_size - 1}"
            return Refused(number, 400, sentence, "prompt")
        if request.num_prompt + request.max_tokens > model.max_model_len:
            sentence = (
                f"{request.num_prompt} prompt tokens and {request.max_tokens} output tokens are "
                f"more than the model's {model.max_model_len}"
            )
            return Refused(number, 400, sentence, "max_tokens", "context_length_exceeded")
        num_waiting = sum(len(scheduler.waiting) for scheduler in gang.schedulers)
        if num_waiting >= self._config.max_queued_requests:
            sentence = f"{num_waiting} requests are waiting already; try again later"
            return Refused(number, 429, sentence, None, "rate_limit_exceeded")
        return None

    def _count(self, request: Request) -> None:
        if request.finish is not None:
            outcomes = self._counters.outcomes
            outcomes[request.finish] = outcomes.get(request.finish, 0) + 1

    # Grammars

    def take_grammars(self, gang: Gang) -> None:
        """What the grammars' threads have done: requests that can begin, masks that can go."""
        all_opened, all_masks = self._grammars.results()
        for opened in all_opened:
            self._on_opened(opened, gang)
        for masks in all_masks:
            due = masks.ticket
            if isinstance(due, MaskDue) and due.epoch == gang.epoch:
                self._on_masks(due, masks, gang)

    def ask_masks(self, gang: Gang) -> None:
        """Have the masks of planned rows computed."""
        model = gang.model
        if model is None:
            return
        for due in gang.masks_due():
            sampled = due.plan.sampled
            rows = [_matcher_of(sampled[row], model) for row in due.plan.masked_rows]
            self._grammars.ask(Masks(due, model.vocab_size, rows))

    def _load_vocabulary(self) -> Vocabulary:
        """Of the served model; called in another thread."""
        folder = Path(self._config.model) if self._config.model else bundled.path()
        model = self._model
        if model is None:
            raise GrammarRefused("the model is not there yet")
        return Vocabulary.load(folder, model.vocab_size, model.stop_token_ids)

    def _on_opened(self, opened: Opened, gang: Gang) -> None:
        found = self._opening.pop(opened.ticket, None)
        if found is None:
            return
        request, grammar = found
        identity, number = request.key
        if opened.matcher is None:
            field = grammar.field or "grammar"
            sentence = f"'{field}' cannot be used: {opened.reason}."
            self._send(identity, Refused(number, 400, sentence, field, "invalid_grammar"))
        elif not opened.matcher.accept_all(request.tokens[request.num_prompt :]):
            self._send(identity, RequestFailed(number, GRAMMAR_ERROR))
        else:
            request.matcher = opened.matcher
            self._add(request, gang)

    def _on_masks(self, due: MaskDue, masks: Masks, gang: Gang) -> None:
        gang.send_mask(due, b"".join(masks.bits))
        sampled = due.plan.sampled
        domain = gang.domains[due.domain]
        for place in masks.failed:
            request = sampled[due.plan.masked_rows[place]]
            domain.schedulers[due.replica].fail(request, GRAMMAR_ERROR)


def _matcher_of(request: Request, model: Model) -> tuple[Matcher, frozenset[int]] | None:
    """With the ids that must not end it yet; None once it has ended and its token is lost."""
    if request.matcher is None or request.finish is not None:
        return None
    ends = frozenset(model.stop_token_ids)
    if request.num_output >= request.sampling.min_tokens:
        ends -= request.stop_token_ids
    return request.matcher, ends
