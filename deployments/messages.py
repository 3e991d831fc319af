"""What crosses the wire between an ingress and the driver: msgpack structs, never pickle.

An ingress names its requests by numbers of its own; the driver tells ingresses apart by the
identity of their socket. A token reaches a client only as (request, index, live epoch): the
ingress drops what names another epoch or an index that it already has, so a token is delivered
exactly once, whatever died in between.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from workers.protocol import Message, Natural, Sampling, TokenLogprobs

FINISH_STOP, FINISH_LENGTH, FINISH_CANCELLED, FINISH_ERROR = "stop", "length", "cancelled", "error"


MAX_GRAMMAR_CHARS = 2**16


class Grammar(Message, frozen=True):
    """What the output must look like."""

    kind: Literal["json", "regex", "lark"]
    """A JSON schema, a regular expression for the whole text, or a Lark grammar."""
    text: Annotated[str, Meta(max_length=MAX_GRAMMAR_CHARS)]
    field: Annotated[str, Meta(max_length=64)] = ""
    """What the client called it; for the sentence that refuses it."""


class Submit(Message, frozen=True, tag="submit"):
    """Generate. After a restart the same request is sent again with what was already emitted."""

    epoch: Natural
    """The epoch the ingress believes in; a request for another one is ignored."""
    request: Natural
    tokens: bytes
    """Prompt and what has been emitted (int32)."""
    num_prompt: Annotated[int, Meta(ge=1)]
    """How many of `tokens` are the prompt; the rest are output tokens 0, 1, ..."""
    max_tokens: Annotated[int, Meta(ge=1)]
    """Output tokens in all, those already in `tokens` included."""
    stop_token_ids: tuple[int, ...]
    """Ids that end the request once `sampling.min_tokens` are out; empty with ignore_eos."""
    sampling: Sampling
    salt: str = ""
    """Requests share cached prefixes only under the same salt."""
    grammar: Grammar | None = None
    """Followed from the first output token on, those already in `tokens` included."""


class Cancel(Message, frozen=True, tag="cancel"):
    """The client is gone."""

    request: Natural


class Finish(Message, frozen=True, tag="finish"):
    """A stop string was found: output tokens from `index` on are not wanted."""

    request: Natural
    index: Natural


class Distribution(Message, frozen=True):
    """How often values fell into the buckets of `deployments.counting`, and their sum."""

    counts: tuple[Natural, ...] = ()
    total: Annotated[float, Meta(ge=0.0)] = 0.0


class IngressBeat(Message, frozen=True, tag="beat"):
    """Every `beat_ms`; carries what the ingress has counted since it started, for /metrics.

    Generations are counted, not HTTP requests. In every beat `received` is the sum of the four
    outcomes and `in_flight`.
    """

    ingress: str = ""
    """Stays the same when the ingress comes back on another socket."""
    received: Natural = 0
    rejected: Natural = 0
    finished: Natural = 0
    failed: Natural = 0
    cancelled: Natural = 0
    in_flight: Natural = 0
    resumed: Natural = 0
    ttft: Distribution = Distribution()
    itl: Distribution = Distribution()
    e2e: Distribution = Distribution()
    opens: bool = False
    """The first word on its line: nothing has been asked for on it. A driver that hears anything
    else from a line that it does not know says `Forgotten`."""

    @property
    def is_balanced(self) -> bool:
        ended = self.rejected + self.finished + self.failed + self.cancelled
        return self.received == ended + self.in_flight


class Watch(Message, frozen=True, tag="watch"):
    """Somebody looks at the live page: send an `EngineView` with every beat of the next seconds."""

    since: Annotated[int, Meta(ge=-1)] = -1
    """Number of the last `Sample` that this ingress has, -1 for none."""


class Tokens(Message, frozen=True, tag="tokens"):
    """What a step gave this ingress's requests. The three lists are parallel."""

    epoch: Natural
    requests: list[int]
    indexes: list[int]
    """Place of the token among the request's output, from 0."""
    tokens: list[int]
    finished: list[tuple[int, str]]
    """(request, finish reason) of requests that end with this message."""
    logprobs: list[tuple[int, int, TokenLogprobs]] = msgspec.field(default_factory=list)
    """(request, index, log-probabilities)."""
    prompt_logprobs: list[tuple[int, int, tuple[TokenLogprobs, ...]]] = msgspec.field(
        default_factory=list
    )
    """(request, position of the first, log-probabilities of prompt tokens); position 0 has none."""
    begun: list[tuple[int, int, float]] = msgspec.field(default_factory=list)
    """(request, prompt tokens found in the prefix cache, seconds from its arrival at the driver to
    its first plan), once a request, with its first token."""


class Refused(Message, frozen=True, tag="refused"):
    """The request was not taken; nothing of it remains at the driver."""

    request: Natural
    status: Natural
    """HTTP status."""
    message: str
    param: str | None = None
    code: str | None = None


class RequestFailed(Message, frozen=True, tag="failed"):
    """A request that ran has ended for a fault that is not its own; it is not tried again."""

    request: Natural
    code: str
    """`numerical_error` or `grammar_error`."""


class DriverBeat(Message, frozen=True, tag="beat"):
    """Every `beat_ms`, and at once when anything in it changes."""

    epoch: Natural
    ready: bool
    """All ranks of this epoch are serving."""
    num_waiting: Natural = 0
    num_running: Natural = 0
    draining: bool = False
    """The driver was told to stop: what runs may end, and nothing new is wanted."""
    over: bool = False
    """Its last word: what has not ended by now will not."""


class Forgotten(Message, frozen=True, tag="forgotten"):
    """The ingress was silent for so long, or read so little, that what it had asked for on this
    line was cancelled; nothing that it says here counts. It asks again on another."""


class Sample(Message, frozen=True):
    """What a second of the engine's life was like; all ingresses together."""

    number: Natural
    """Counts up by one from 0."""
    seconds: float
    """How long it was."""
    num_steps: Natural
    num_output_tokens: Natural
    num_prompt_tokens: Natural
    num_first_tokens: Natural
    mean_ttft_s: float
    """0 without first tokens, like the next."""
    p95_ttft_s: float
    """Estimated from a histogram's buckets."""
    num_running: Natural
    num_waiting: Natural


class StepState(Message, frozen=True):
    """A step that all ranks of a domain agreed on; the two lists are by replica."""

    domain: Natural
    number: Natural
    num_rows: tuple[int, ...]
    padded_rows: tuple[int, ...]
    seconds: float
    """Of its slowest rank."""


class RankState(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rank: int
    device: str
    """`cpu` or the GPU's UUID; empty before the rank has said Hello."""
    step: int = -1
    """The last one all ranks of its domain agreed on; -1 for none that was seen."""
    seconds: float = 0.0


class ReplicaState(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    domain: int
    replica: int
    ranks: tuple[int, ...]
    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_free_pages: int = 0
    num_cached_pages: int = 0
    """Of the free ones, those that a prompt may still find."""


class EngineState(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the live page shows: counts and times, never what anybody asked or was told."""

    epoch: int
    ready: bool
    reason: str
    """Why it is not ready."""
    num_recoveries: int
    last_recovery_s: float
    last_failure: str
    """Why the last epoch was lost; empty if none was."""
    num_steps: int
    num_output_tokens: int
    num_preemptions: int
    replicas: tuple[ReplicaState, ...]
    ranks: tuple[RankState, ...]
    steps: tuple[StepState, ...]
    """The latest ones since the last view."""
    enable_symm_mem: bool
    collectives: tuple[tuple[str, str, str, str, int], ...]
    """(group, op, path, reason, how many since the start)."""


class EngineView(Message, frozen=True, tag="view"):
    """How the engine is, for ingresses that somebody looks through."""

    state: EngineState
    samples: tuple[Sample, ...] = ()
    """Those that this ingress does not have, oldest first."""


FromIngress = Submit | Cancel | Finish | IngressBeat | Watch
ToIngress = Tokens | Refused | RequestFailed | DriverBeat | EngineView | Forgotten

decode_from_ingress = msgspec.msgpack.Decoder(FromIngress).decode
decode_to_ingress = msgspec.msgpack.Decoder(ToIngress).decode


def unreadable_submit(data: bytes) -> int | None:
    """The request's number in what was meant as a `Submit` but does not decode as one.

    None if it is no Submit or has no such number. Ingresses of another version, and settings that
    nobody has checked, send such.

        >>> unreadable_submit(msgspec.msgpack.encode(["submit", 1, 7, "no tokens"]))
        7
        >>> unreadable_submit(msgspec.msgpack.encode(["cancel", 7])), unreadable_submit(b"")
        (None, None)
    """
    try:
        fields = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(fields, list) or len(fields) < 3 or fields[0] != "submit":
        return None
    request = fields[2]
    is_number = isinstance(request, int) and not isinstance(request, bool) and request >= 0
    return request if is_number else None


class EngineInfo(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `Driver.endpoint()` tells an ingress: where the driver listens and what it serves."""

    epoch: int
    node_id: str
    """Ray node of the driver: an ingress on the same node takes `ipc_address`."""
    ipc_address: str
    tcp_address: str
    server_key: str
    """CURVE public key of the driver (Z85), fresh each start; used over tcp."""
    client_public_key: str
    client_secret_key: str
    """CURVE key pair that the driver accepts from ingresses."""
    max_model_len: int
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    """End-of-sequence ids of the model."""
    beat_ms: int
