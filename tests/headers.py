"""Steps' headers for tests, which say what they are about and no more."""

from workers.protocol import Header, Mode, Padding


def header_of(
    num_rows: tuple[int, ...],
    num_logit_rows: tuple[int, ...] | None = None,
    *,
    padded_rows: tuple[int, ...] | None = None,
    bucket: int = 0,
    epoch: int = 1,
    step: int = 0,
    mode: int | None = None,
    padding: int = Padding.NONE,
    bodies: tuple[bytes, ...] = (),
    previous: bytes = b"",
    num_prompt_rows: tuple[int, ...] = (),
) -> Header:
    """Rows of each replica: all of them sample, and none are padded, if nothing else is said.

    With a bucket all replicas are padded to it, and a step of no other mode is one of decodes.
    """
    if mode is None:
        mode = Mode.DECODE if bucket else Mode.MIXED
    if padded_rows is None:
        padded_rows = (bucket,) * len(num_rows) if bucket else num_rows
    return Header(
        epoch=epoch,
        step=step,
        mode=mode,
        num_rows=num_rows,
        num_logit_rows=num_rows if num_logit_rows is None else num_logit_rows,
        padding=padding,
        padded_rows=padded_rows,
        bucket=bucket,
        bodies=bodies,
        previous=previous,
        num_prompt_rows=num_prompt_rows,
    )
