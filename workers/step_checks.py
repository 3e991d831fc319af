"""Whether this rank can obey a step: what the driver tells is compared with what it counts itself.

Anything else is a `ProtocolError`, before the step has changed more than the slots.
"""

from parallel.padding import chunks_in_bucket
from workers.batch import ProtocolError, StepRows
from workers.protocol import Header, Mask, mask_bytes, unpack


def check_header(header: Header, rows: StepRows, replica: int) -> None:
    if not replica < len(header.num_rows) == len(header.num_logit_rows):
        raise ProtocolError(
            f"step {header.step} counts {len(header.num_rows)} replicas' rows and "
            f"{len(header.num_logit_rows)} replicas' logit rows, and this is replica {replica}"
        )
    if len(header.padded_rows) != len(header.num_rows) or any(
        padded < real for padded, real in zip(header.padded_rows, header.num_rows, strict=False)
    ):
        raise ProtocolError(
            f"step {header.step} pads {header.num_rows} rows to {header.padded_rows}, which is less"
        )
    counted = (rows.num_rows, rows.num_logit_rows)
    told = (header.num_rows[replica], header.num_logit_rows[replica])
    if counted != told:
        raise ProtocolError(
            f"step {header.step} should have {told[0]} rows and {told[1]} logit rows in replica "
            f"{replica}, and this rank counts {counted[0]} and {counted[1]}"
        )


def check_bucket(header: Header, rows: StepRows, buckets: tuple[int, ...]) -> None:
    """Of a step that is to be replayed by a graph; `buckets` are what graphs were captured for."""
    if header.bucket not in buckets or rows.chunks or rows.num_rows > header.bucket:
        raise ProtocolError(
            f"step {header.step} of {rows.num_rows} rows, {len(rows.chunks)} chunks among them, "
            f"wants a graph of {header.bucket} rows; there are graphs of {buckets}"
        )
    _check_padded_to_bucket(header)


def check_prompt_bucket(header: Header, rows: StepRows, buckets: tuple[int, ...]) -> None:
    """The same of a step with prompts, if not in this replica."""
    most_chunks = chunks_in_bucket(header.bucket)
    fits = rows.num_rows <= header.bucket and len(rows.chunks) <= most_chunks
    if header.bucket not in buckets or not fits:
        raise ProtocolError(
            f"step {header.step} of {rows.num_rows} rows, {len(rows.chunks)} chunks among them, "
            f"wants a graph with prompts of {header.bucket} rows and at most {most_chunks} chunks; "
            f"there are such graphs of {buckets}"
        )
    _check_padded_to_bucket(header)


def _check_padded_to_bucket(header: Header) -> None:
    if set(header.padded_rows) != {header.bucket}:
        raise ProtocolError(
            f"step {header.step} wants a graph of {header.bucket} rows of every replica and pads "
            f"them to {header.padded_rows}"
        )


def check_mask(
    mask: Mask, *, is_awaited: bool, num_masked: int, num_logit_rows: int, vocab_size: int
) -> None:
    """Of a step that has announced the mask of `num_masked` rows, and may still wait for it."""
    rows = unpack(mask.rows)
    num_bytes = len(rows) * mask_bytes(vocab_size)
    if not is_awaited or len(rows) != num_masked:
        raise ProtocolError(
            f"step {mask.step} waits for the mask of {num_masked} rows and got {len(rows)}"
        )
    if len(mask.bits) != num_bytes or not ((rows >= 0) & (rows < num_logit_rows)).all():
        raise ProtocolError(
            f"the mask of step {mask.step} has {len(mask.bits)} bytes for {len(rows)} of "
            f"{num_logit_rows} logit rows, and this rank counts {num_bytes}"
        )
