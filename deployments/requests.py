"""One request's life at the driver: waiting, running in a slot, ended.

A `Request` is plain data that the scheduler moves along. Counts come in two kinds, because plans
run ahead of results: `num_planned` tokens will have keys and values once all plans sent are done;
`num_computed` have them for certain. `num_inflight` tokens are being sampled right now, so a
request's length at the end of all plans is `len(tokens) + num_inflight`.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from deployments.grammar import Matcher
from workers.protocol import Sampling

NUMERICAL_ERROR, GRAMMAR_ERROR = "numerical_error", "grammar_error"
"""What a request may end of that is no fault of its own."""


class Finish(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    key: tuple[bytes, int]
    """Whose it is: (identity of the ingress, number there)."""
    tokens: list[int]
    """Prompt, then output as it is accepted."""
    num_prompt: int
    max_tokens: int
    """Output tokens in all."""
    stop_token_ids: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    salt: str = ""
    arrival: int = 0
    """Order of arrival: the earlier is never preempted for the later."""
    queued_at: float | None = None
    """When it began to wait, until its first step is done; for metrics."""
    queue_s: float = 0.0
    """How long it waited for its first plan; set when that step is done."""

    matcher: Matcher | None = None
    """Where it is in its grammar, if it has one: after all of its output tokens."""

    finish: Finish | None = None
    failure: str = ""
    """What went wrong, with `Finish.ERROR`."""
    slot: int = -1
    """-1 while waiting."""
    pages: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    """Names of the full pages of computed tokens, as far as known."""
    num_planned: int = 0
    num_computed: int = 0
    num_inflight: int = 0
    last_step: int = -1
    """The last step whose plan names it."""
    num_cached: int = -1
    """Prompt tokens found in the prefix cache when it first ran; -1 before."""
    num_left: int = 0
    """Output tokens still to plan; set when it enters a slot."""
    num_preemptions: int = 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def is_running(self) -> bool:
        return self.slot >= 0
