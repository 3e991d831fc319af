"""How many rows each replica is given in a step, so that rows of unequal replicas can meet.

The driver decides from the counts of all replicas and writes the result into the step's header; no
rank asks another. MAX_LEN pads all replicas to the longest, which makes every collective one of
equal parts. SUM_LEN leaves them unequal: fewer rows are computed, and they are exchanged either
through slots of the longest share (`sum_slots`) or by summing one buffer (`sum_buffer`); `sum_len`
alone is whichever of the two moves less (`parallel.dp_attention`).

Here is the rule, which knows counts alone. `parallel.padding_cost` chooses by what ranks measured.

    >>> pad_rows((8, 8, 8, 8, 0, 0, 0, 0), has_prompts=False, row_multiple=1).mode
    'max_len'
    >>> pad_rows((8, 8, 8, 7, 0, 0, 0, 0), has_prompts=False, row_multiple=1)
    Padded(mode='sum_len', rows=(8, 8, 8, 7, 0, 0, 0, 0))

Steps of decodes alone are replayed from CUDA graphs, one for each bucket of rows. The bucket is
chosen before anything else: every replica is padded to it, idle ones too.

    >>> buckets_up_to(20), choose_bucket((3, 0), buckets_up_to(20))
    ((1, 2, 3, 4, 5, 6, 7, 8, 16, 20), 3)

So may be steps with a few rows of prompts (`prefill_graph_max_tokens`), from graphs of their own. A
larger bucket holds more chunks of prompts, too.

    >>> prompt_buckets_up_to(200), prompt_buckets_up_to(400)
    ((16, 32, 64, 96, 128, 160, 192, 200), (16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 400))
    >>> choose_prompt_bucket((40, 3), (4, 0), (16, 32, 64, 128))
    64
    >>> choose_prompt_bucket((40, 3), (5, 0), (16, 32, 64, 128))
    128
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

PaddingMode = Literal["max_len", "sum_len", "sum_slots", "sum_buffer"]

SMALL_BUCKETS = range(1, 9)
"""Few rows are never padded: at batch 1 to 8 kernels, and their tuning, see the true number."""
BUCKET_STEP = 16
SMALLEST_PROMPT_BUCKET, PROMPT_BUCKET_STEP = 16, 32
"""Of steps with prompts: few up to 128 rows, for which a product takes hardly longer than for 16;
from there on four to an octave."""
ROWS_A_CHUNK = 16
MIN_CHUNKS = 4
"""For each `ROWS_A_CHUNK` rows of a bucket there is room for a chunk, and for so many in any."""


class Padded(NamedTuple):
    mode: PaddingMode
    rows: tuple[int, ...]
    """Of each replica, as the model sees them."""


def choose_padding(num_rows: Sequence[int], *, has_prompts: bool) -> PaddingMode:
    """SUM_LEN for prompts, else what moves fewer rows; a tie goes to MAX_LEN.

    Gathering equal parts moves the longest count times the replicas; summing one buffer of all
    rows moves each of them twice.
    """
    if has_prompts and len(num_rows) > 1:
        return "sum_len"
    return "max_len" if 2 * sum(num_rows) >= max(num_rows) * len(num_rows) else "sum_len"


def pad_rows(
    num_rows: Sequence[int],
    *,
    has_prompts: bool,
    row_multiple: int,
    mode: PaddingMode | None = None,
) -> Padded:
    """Every replica's rows, padded to the plan's `row_multiple`, in a chosen or a given mode."""
    aligned = align_rows(num_rows, row_multiple)
    if mode is None:
        mode = choose_padding(aligned, has_prompts=has_prompts)
    if mode == "max_len":
        aligned = (max(aligned),) * len(aligned)
    return Padded(mode, aligned)


def slots_move_less(num_ranks: int, longest: int, total: int) -> bool:
    """Whether slots of the longest share move no more than all rows summed in one buffer."""
    return num_ranks * longest <= 2 * total


def align_rows(num_rows: Sequence[int], row_multiple: int) -> tuple[int, ...]:
    """Every count up to the next multiple."""
    if row_multiple == 1:
        return tuple(num_rows)
    return tuple(-(-count // row_multiple) * row_multiple for count in num_rows)


def buckets_up_to(max_num_seqs: int, row_multiple: int = 1) -> tuple[int, ...]:
    """Rows of a replica for which a decode is captured; the last hold `max_num_seqs`."""
    sizes = [*SMALL_BUCKETS, *range(BUCKET_STEP, max_num_seqs, BUCKET_STEP)]
    sizes = [*(size for size in sizes if size < max_num_seqs), max_num_seqs]
    return tuple(dict.fromkeys(align_rows(sizes, row_multiple)))


def prompt_buckets_up_to(max_rows: int, row_multiple: int = 1) -> tuple[int, ...]:
    """Rows of a replica for which a step with prompts is captured; the last hold `max_rows`.

    None for `max_rows` of 0.
    """
    if not max_rows:
        return ()
    sizes, size = [SMALLEST_PROMPT_BUCKET], PROMPT_BUCKET_STEP
    while size < max_rows:
        sizes.append(size)
        power = 1 << (size.bit_length() - 1)
        size += max(PROMPT_BUCKET_STEP, power // 4)
    sizes = [*(each for each in sizes if each < max_rows), max_rows]
    return tuple(dict.fromkeys(align_rows(sizes, row_multiple)))


def choose_bucket(num_rows: Sequence[int], buckets: Sequence[int]) -> int:
    """The smallest bucket that holds every replica's rows; 0 if none does, or nobody has any."""
    most = max(num_rows)
    return next((bucket for bucket in buckets if 0 < most <= bucket), 0)


def chunks_in_bucket(bucket: int) -> int:
    """How many chunks a replica may have in a replayed step: their attention is launched for all.

    >>> chunks_in_bucket(16), chunks_in_bucket(512)
    (4, 32)
    """
    return max(MIN_CHUNKS, bucket // ROWS_A_CHUNK)


def choose_prompt_bucket(
    num_rows: Sequence[int], num_chunks: Sequence[int], buckets: Sequence[int]
) -> int:
    """The smallest bucket that holds every replica's rows and chunks; 0 if none does."""
    chunks = max(num_chunks)
    return choose_bucket(num_rows, [each for each in buckets if chunks <= chunks_in_bucket(each)])
