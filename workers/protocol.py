"""What crosses the wire between the driver and its workers: plain, frozen, free of torch.

Every message is msgpack of one of the structs below; nothing is pickled. Integer arrays travel as
little-endian int32 bytes (`pack` and `unpack`), because a list of integers costs ten times as much.

A driver's message to a rank begins with its kind: `STEP` with a header, a body and the header's
`digest`; `MASK` with a `Mask`; `MESSAGE` with one of the structs for the rest; `ECHO` alone answers
a beat, so that a rank knows that its driver lives. A rank's message is one frame, the struct.

Driver to worker:  `Start`, `Serve`, then one `Header` + `Body` a step, at last `Stop`.
                   A step whose body has `num_masked` > 0 is followed, later, by one `Mask`.
Worker to driver:  `Hello`, `Progress`, `Ready`, `Started`, then one `Ack` a step; `Beat` every
250 ms from a thread of its own; `Failed` if it cannot go on.

Of a step, the header is the same for every rank of a lockstep domain; the body holds
one replica's changes only. What goes on decoding is not named:

- `leaves` go first, then `admits` enter, then `grow` gives slots their next page;
- a slot decodes in this step if it had all its tokens computed before it (its last chunk, or a
  decode, was in the previous step) and it does not leave;
- rows are the decodes in ascending slot order, then the chunks in the order of the body;
- every decode and every chunk that reaches the end of its slot's tokens samples one token, in
  row order: these are the step's logit rows and the tokens of its ack.

Some requests may only say what a grammar allows. What it allows at token n depends on token n-1,
and a step is planned before that is known: so its forward pass runs at once, and its sampling
waits for the `Mask`, which leaves the driver when the step before has been acknowledged. Ranks of
replicas whose bodies have `num_masked` = 0 wait for nothing, and get no `Mask`.

    >>> unpack(pack([3, 1, 2])).tolist()
    [3, 1, 2]
"""

import hashlib
from collections.abc import Iterable
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from parallel.padding_cost import PaddingCurves

PROTOCOL_VERSION = 11
"""Raised whenever a struct changes; a worker of another version is refused at `Hello`."""

MAX_MESSAGE_BYTES = 64 * 2**20
"""Largest frame either side accepts; a prompt of a million tokens is 4 MB."""

STEP, MESSAGE, ECHO, MASK = b"s", b"m", b"b", b"k"
"""First frame of what a driver sends."""

MAX_LOGPROBS = 20

LEDGER_HALF = 16
"""Bytes of a ledger's digest that all ranks of a domain share; the rest is the replica's own."""

Natural = Annotated[int, Meta(ge=0)]
Unsigned64 = Annotated[int, Meta(ge=0, le=2**63 - 1)]


def pack(values: Iterable[int] | NDArray[np.integer]) -> bytes:
    """Integers as little-endian int32 bytes."""
    array = values if isinstance(values, np.ndarray) else np.fromiter(values, dtype=np.int64)
    return array.astype("<i4").tobytes()


def unpack(data: bytes) -> NDArray[np.int32]:
    """The integers behind `pack`; a length that is not a multiple of four is a `ValueError`."""
    return np.frombuffer(data, dtype="<i4")


def mask_bytes(vocab_size: int) -> int:
    """Bytes of one row of a `Mask`: a bit for each id, filled up to whole 32-bit words.

    >>> mask_bytes(259)
    36
    """
    return -(-vocab_size // 32) * 4


def digest(data: bytes) -> bytes:
    """16 bytes that stand for `data` in headers and acks (BLAKE2b)."""
    return hashlib.blake2b(data, digest_size=16).digest()


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A struct on the wire: an array of its fields, in order."""


class Sampling(Message, frozen=True):
    """How to choose a request's tokens. `seed` and `nonce` with a token's position key its draw."""

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Natural = 0
    """0 keeps all."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: Natural = 0
    """Until so many tokens are out, no id of `stop_token_ids` is sampled."""
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: Annotated[int, Meta(ge=-1, le=MAX_LOGPROBS)] = -1
    """-1 none; k the chosen token's log-probability and those of the k likeliest."""
    num_prompt_logprobs: Annotated[int, Meta(ge=-1, le=MAX_LOGPROBS)] = -1
    seed: Unsigned64 = 0
    nonce: Unsigned64 = 0


class Admit(Message, frozen=True):
    """A request enters a slot. Sent once; also after a preemption or a restart, with all tokens."""

    slot: Natural
    tokens: bytes
    """Prompt and what has been generated so far (int32)."""
    num_prompt: Natural
    """How many of `tokens` are the user's; penalties count the rest as output."""
    num_cached: Natural
    """How many of `tokens` already have their keys and values in `pages`."""
    pages: bytes
    sampling: Sampling


class Body(Message, frozen=True):
    """One replica's changes in a step."""

    leaves: bytes = b""
    """Slots that end (int32)."""
    admits: tuple[Admit, ...] = ()
    grow_slots: bytes = b""
    grow_pages: bytes = b""
    """`grow_pages[i]` is appended to the page list of `grow_slots[i]`."""
    chunk_slots: bytes = b""
    chunk_lengths: bytes = b""
    """Slot `chunk_slots[i]` computes its next `chunk_lengths[i]` tokens."""
    num_masked: Natural = 0
    """Logit rows whose ids a `Mask` will limit; if there are any, sampling waits for it."""


class Mask(Message, frozen=True):
    """Which ids some logit rows of a step may sample; sent to all ranks of one replica."""

    epoch: Natural
    step: Natural
    rows: bytes
    """Indexes of the logit rows, ascending (int32); as many as the body's `num_masked`."""
    bits: bytes
    """A bit for each id, `mask_bytes(vocab_size)` bytes a row: id i is bit i % 8 of byte i // 8."""


class Mode:
    """What kind of rows a step has, over all replicas of the domain."""

    IDLE, DECODE, EXTEND, MIXED = range(4)


class Padding:
    """How rows of unequal replicas are gathered (SGLang's `DpPaddingMode`).

    SUM_LEN takes whichever of its two ways moves fewer rows; the last two say which it is.
    """

    NONE, MAX_LEN, SUM_LEN, SUM_SLOTS, SUM_BUFFER = range(5)


class Header(Message, frozen=True):
    """What every rank of a lockstep domain must know of a step, the same bytes for all."""

    epoch: Natural
    step: Natural
    mode: Annotated[int, Meta(ge=0, le=3)]
    num_rows: tuple[int, ...]
    """Rows of each replica, before padding."""
    num_logit_rows: tuple[int, ...]
    padding: Annotated[int, Meta(ge=0, le=4)]
    padded_rows: tuple[int, ...]
    """Rows of each replica as the model sees them."""
    bucket: Natural
    """Rows of the captured graph that every rank replays, idle ones too; 0 runs eagerly.

    By `mode` it is a graph of decodes alone, or one of steps with prompts.
    """
    bodies: tuple[bytes, ...]
    """`digest` of every replica's body."""
    previous: bytes
    """`digest` of the header before; empty at an epoch's first step."""
    num_prompt_rows: tuple[int, ...] = ()
    """Rows of each replica whose prompt tokens' log-probabilities are wanted; empty for none."""


class Start(Message, frozen=True, tag="start"):
    """Rendezvous: where the domain's TCPStore listens. Everyone has said `Hello`."""

    epoch: Natural
    store_host: str
    store_port: Natural


class Serve(Message, frozen=True, tag="serve"):
    """The number of pages that all ranks of the engine can hold: allocate them and go."""

    epoch: Natural
    num_pages: Natural


class Stop(Message, frozen=True, tag="stop"):
    """Leave in good order."""

    epoch: Natural


class Hello(Message, frozen=True, tag="hello"):
    version: Natural
    epoch: Natural
    rank: Natural
    node_ip: str
    pid: Natural
    device: str
    """`cpu`, or the GPU's UUID."""
    store_port: Natural = 0
    """Set by the first rank of each domain, which holds the listening socket."""


class Progress(Message, frozen=True, tag="progress"):
    epoch: Natural
    rank: Natural
    stage: str
    done: Natural
    total: Natural


class Ready(Message, frozen=True, tag="ready"):
    """Groups are joined and weights are loaded."""

    epoch: Natural
    rank: Natural
    max_pages: Natural
    """Pages this rank has memory for."""
    max_model_len: Natural
    vocab_size: Natural
    stop_token_ids: tuple[int, ...]
    buckets: tuple[int, ...] = ()
    """Rows of the decode graphs that it will capture; none where steps are not captured."""
    padding: PaddingCurves | None = None
    """What padding costs, as this rank measured it; None if it is not asked."""
    plan: bytes = b""
    """Digest of the collective plan that it compiled, from the config.json that it reads."""
    prompt_buckets: tuple[int, ...] = ()
    """Rows of the graphs that it will capture of steps with prompts; none unless it is asked to."""


class Started(Message, frozen=True, tag="started"):
    """The cache is allocated and everything is warm: the next message is a step."""

    epoch: Natural
    rank: Natural
    captured: bytes = b""
    """Digests of all graphs' collectives, like a step's ledger; empty if nothing is captured."""


class TokenLogprobs(Message, frozen=True):
    """Log-probabilities of one row: the token's own, then the likeliest, best first."""

    token: int
    logprob: float
    rank: Natural
    """1 if the token was the likeliest."""
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class Ack(Message, frozen=True, tag="ack"):
    """A rank has done a step. Tokens are released only when all ranks' acks agree."""

    epoch: Natural
    rank: Natural
    step: Natural
    header: bytes
    """`digest` of the header it obeyed."""
    ids: bytes
    """`digest` of the tokens it sampled (int32 bytes); the same on all ranks of a replica."""
    ledger: bytes
    """Digests of the collectives it took part in: (op, group, shape, path, slots) in order.

    The first `LEDGER_HALF` bytes are of those that all ranks of the domain take part in.
    """
    seconds: float
    """From the first look at the step to its tokens."""
    tokens: bytes = b""
    """Sampled tokens in row order; from the first rank of a replica only."""
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()
    """(index of the logit row, its log-probabilities) for those that asked."""
    prompt_logprobs: tuple[tuple[int, int, tuple[TokenLogprobs, ...]], ...] = ()
    """(slot, position of the first, log-probabilities of the prompt tokens this step read)."""
    poisoned: tuple[int, ...] = ()
    """Logit rows whose logits are not numbers: their tokens mean nothing. From the first rank."""
    collectives: tuple[tuple[str, str, str, str, int], ...] = ()
    """Now and then, with symmetric memory: (group, op, path, reason, how many since the start)."""
    expert_rows: tuple[int, ...] = ()
    """Now and then: rows for the experts of each moe_ep rank, as this rank routed them."""


class Beat(Message, frozen=True, tag="beat"):
    """The process lives, whatever its main thread is doing."""

    epoch: Natural
    rank: Natural
    step: Natural
    collective: Natural = 0
    """Which of the step's collectives the main thread waits for its peers in; 0 if in none."""
    op: str = ""
    group: str = ""
    """What that one is."""


class Failed(Message, frozen=True, tag="failed"):
    """The rank cannot go on; `reason` is a sentence for the operator."""

    epoch: Natural
    rank: Natural
    reason: str


ToWorker = Start | Serve | Stop
FromWorker = Hello | Progress | Ready | Started | Ack | Beat | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
decode_header = msgspec.msgpack.Decoder(Header).decode
decode_mask = msgspec.msgpack.Decoder(Mask).decode
decode_body = msgspec.msgpack.Decoder(Body).decode
