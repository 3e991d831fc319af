"""What a trace says about a request: pure, and without a word of what was asked or answered.

A request's spans are made when it is over, out of what is known then; until then a trace costs
nothing. All times are seconds of one clock, the ingress's: of the driver only a duration is used,
so no two machines' clocks meet.

    POST /v1/chat/completions        the ingress, from the first byte to the last
      queue      until the first plan that names the generation was sent
      prefill    until its first token was here
      decode     until its last token was here, or it was given up

Names are OpenTelemetry's for HTTP servers and for generative models where it has one
(https://opentelemetry.io/docs/specs/semconv/gen-ai/), else those of vLLM's traces
(`gen_ai.latency.*`, `gen_ai.request.id`), else they begin with `lockstep.`. An error's sentence may
quote the request, so only its type is told.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from msgspec import Struct

from deployments.counting import Outcome
from deployments.generations import Course
from deployments.request_plan import Plan
from deployments.schemas import Usage

Value: TypeAlias = str | bool | int | float | Sequence[str]

MAX_TRACED = 16
"""Generations of one request that have spans; the request's own counts all of them."""


class Happening(Struct, frozen=True):
    """Something at one moment of a span."""

    name: str
    at: float
    attributes: Mapping[str, Value]


class Span(Struct, frozen=True, kw_only=True):
    name: str
    start: float
    end: float
    attributes: Mapping[str, Value]
    events: tuple[Happening, ...] = ()
    error: str = ""
    """What kind of error it ended by, if that was the service's fault."""
    children: "tuple[Span, ...]" = ()


class Work(Struct, frozen=True, kw_only=True):
    """What the engine was asked for, and did, for one request."""

    plan: Plan
    answer_id: str
    usage: Usage
    finish_reasons: Sequence[str]
    courses: Sequence[Course]


class Exchanged(Struct, frozen=True, kw_only=True):
    """One request that is over."""

    method: str
    route: str
    scheme: str
    request_id: str
    model: str
    start: float
    end: float
    status: int
    """Of the response; 0 if it never began."""
    outcome: Outcome
    error: str = ""
    """Its kind, if there was one."""
    work: Work | None = None
    """None if it was turned away."""


METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")


def request_span(over: Exchanged) -> Span:
    """The span of a request, its children inside it."""
    is_chat = over.route.endswith("/chat/completions")
    is_known = over.method in METHODS
    attributes: dict[str, Value] = {
        "http.request.method": over.method if is_known else "_OTHER",
        "http.route": over.route,
        "url.path": over.route,
        "url.scheme": over.scheme,
        "gen_ai.operation.name": "chat" if is_chat else "text_completion",
        "gen_ai.provider.name": "lockstep",
        "gen_ai.request.model": over.model,
        "gen_ai.latency.e2e": over.end - over.start,
        "lockstep.outcome": str(over.outcome),
    }
    if over.request_id:
        attributes["gen_ai.request.id"] = over.request_id
    if over.status:
        attributes["http.response.status_code"] = over.status
    if over.error:
        attributes["error.type"] = over.error
    events: tuple[Happening, ...] = ()
    children: tuple[Span, ...] = ()
    if over.work is not None:
        attributes |= _work(over, over.work)
        traced = over.work.courses[:MAX_TRACED]
        events = tuple(
            sorted((one for course in traced for one in _resumed(course)), key=lambda one: one.at)
        )
        children = tuple(
            span
            for choice, course in enumerate(traced)
            for span in phases(course, choice, over.start, over.end)
        )
    is_ours = over.outcome is Outcome.FAILED or over.status >= 500
    return Span(
        name=f"{over.method if is_known else 'HTTP'} {over.route}",
        start=over.start,
        end=over.end,
        attributes=attributes,
        events=events,
        error=over.error if is_ours else "",
        children=children,
    )


def phases(course: Course, choice: int, start: float, end: float) -> tuple[Span, ...]:
    """Queue, prefill and decode of one generation, each beginning where the one before ended.

    All three are known once there is a first token; without one there are none. They are inside
    `start` to `end` whatever the clocks said.
    """
    if course.first_token_at is None:
        return ()
    first_token_at = min(max(course.first_token_at, start), end)
    queued_at = min(max(course.accepted_at, start), first_token_at)
    planned_at = min(max(course.sent_at + course.queue_s, queued_at), first_token_at)
    ended_at = min(max(course.ended_at, first_token_at), end)
    of: dict[str, Value] = {"lockstep.choice": choice}
    return (
        Span(name="queue", start=queued_at, end=planned_at, attributes=of),
        Span(name="prefill", start=planned_at, end=first_token_at, attributes=of),
        Span(
            name="decode",
            start=first_token_at,
            end=ended_at,
            attributes={**of, "gen_ai.usage.output_tokens": course.num_tokens},
        ),
    )


def _work(over: Exchanged, work: Work) -> dict[str, Value]:
    spec, usage = work.plan.specs[0], work.usage
    sampling = spec.sampling
    found: dict[str, Value] = {
        "gen_ai.request.max_tokens": spec.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.stream": work.plan.stream,
        "gen_ai.response.id": work.answer_id,
        "gen_ai.response.model": over.model,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.prompt_tokens_details.cached_tokens,
        "gen_ai.usage.num_sequences": len(work.plan.specs),
    }
    if sampling.top_k:
        found["gen_ai.request.top_k"] = sampling.top_k
    if work.plan.num_samples > 1:
        found["gen_ai.request.choice.count"] = work.plan.num_samples
    if work.finish_reasons:
        found["gen_ai.response.finish_reasons"] = tuple(work.finish_reasons)
    firsts = [one.first_token_at for one in work.courses if one.first_token_at is not None]
    if firsts:
        found["gen_ai.latency.time_to_first_token"] = max(0.0, min(firsts) - over.start)
    if len(work.courses) == 1:
        for span in phases(work.courses[0], 0, over.start, over.end):
            found[_LATENCIES[span.name]] = span.end - span.start
    return found


_LATENCIES = {
    "queue": "gen_ai.latency.time_in_queue",
    "prefill": "gen_ai.latency.time_in_model_prefill",
    "decode": "gen_ai.latency.time_in_model_decode",
}


def _resumed(course: Course) -> list[Happening]:
    """A rank or the driver was lost, and the generation went on elsewhere."""
    return [
        Happening("resumed", at, {"lockstep.epoch": epoch, "lockstep.num_tokens": num_tokens})
        for at, epoch, num_tokens in course.resumed
    ]
