"""What a finished step gives each ingress: its requests' tokens, in one message.

Called once a step with up to every running request in it, on the engine's thread: one pass over the
tokens, and a look at the few that carry more.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from deployments.domain import StepDone
from deployments.messages import Tokens
from deployments.requests import Request
from parallel.layout import Layout
from workers.protocol import TokenLogprobs


@dataclass(slots=True)
class Outbox:
    epoch: int
    boxes: dict[bytes, Tokens] = field(default_factory=dict)
    """The message of each ingress, by its identity."""
    num_tokens: int = 0
    begun: list[Request] = field(default_factory=list)
    """Requests whose first token this is."""
    finished: list[Request] = field(default_factory=list)

    def box(self, identity: bytes) -> Tokens:
        found = self.boxes.get(identity)
        if found is None:
            found = self.boxes[identity] = Tokens(self.epoch, [], [], [], [])
        return found


def outbox_of(step: StepDone, *, epoch: int, layout: Layout) -> Outbox:
    """Tokens in the order of the plan, with log-probabilities and prefix hits of those that have
    some."""
    outbox = Outbox(epoch)
    owner: bytes | None = None
    box = Tokens(epoch, [], [], [], [])
    for accepted in step.accepted:
        for entry in accepted:
            if entry is None:
                continue
            request, index, token = entry
            identity, number = request.key
            if identity is not owner:  # neighbours mostly have one owner
                owner = identity
                box = outbox.box(identity)
            box.requests.append(number)
            box.indexes.append(index)
            box.tokens.append(token)
            outbox.num_tokens += 1
            if request.finish is not None:
                box.finished.append((number, request.finish))
                outbox.finished.append(request)
    _add_first_tokens(step, outbox)
    for ack in step.acks.values():
        if ack.logprobs or ack.prompt_logprobs:
            replica = layout.coordinates(ack.rank).attn_dp
            _add_logprobs(step, replica, ack.logprobs, outbox)
            _add_prompt_logprobs(step, replica, ack.prompt_logprobs, outbox)
    return outbox


def _add_first_tokens(step: StepDone, outbox: Outbox) -> None:
    for plan, accepted in zip(step.plans, step.accepted, strict=True):
        for entry in accepted[len(plan.decodes) :]:
            if entry is not None and entry[1] == 0:
                request = entry[0]
                identity, number = request.key
                told = (number, max(0, request.num_cached), request.queue_s)
                outbox.box(identity).begun.append(told)
                outbox.begun.append(request)


def _add_logprobs(
    step: StepDone, replica: int, logprobs: Iterable[tuple[int, TokenLogprobs]], outbox: Outbox
) -> None:
    accepted = step.accepted[replica]
    for row, values in logprobs:
        entry = accepted[row]
        if entry is not None:
            identity, number = entry[0].key
            outbox.box(identity).logprobs.append((number, entry[1], values))


def _add_prompt_logprobs(
    step: StepDone,
    replica: int,
    prompt_logprobs: Iterable[tuple[int, int, tuple[TokenLogprobs, ...]]],
    outbox: Outbox,
) -> None:
    owners = {chunk.slot: chunk.request for chunk in step.plans[replica].chunks}
    for slot, position, values in prompt_logprobs:
        request = owners[slot]
        if request.finish is None or request.num_output > 0:
            identity, number = request.key
            outbox.box(identity).prompt_logprobs.append((number, position, values))
