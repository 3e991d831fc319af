"""A worker's runner that computes nothing: what is left of a step is the driver's own cost."""

from typing import NamedTuple

import numpy as np

from workers.protocol import Body, Header, Mask


class Result(NamedTuple):
    ids: np.ndarray
    logprobs: tuple = ()
    prompt_logprobs: tuple = ()
    ledger: bytes = b""
    poisoned_rows: tuple = ()
    expert_rows: tuple = ()


class InstantRunner:
    """Every logit row samples token 7."""

    max_pages = 100_000
    max_model_len = 8192
    vocab_size = 1000
    stop_token_ids = (2,)
    buckets = prompt_buckets = ()
    captured = b""
    padding_curves = None

    def __init__(self, config, layout, rank, groups, device, progress):
        self._replica = layout.coordinates(rank).attn_dp

    def allocate(self, num_pages: int) -> None:
        return None

    def launch(self, header: Header, body: Body, replica: int) -> Result:
        return Result(np.full(header.num_logit_rows[replica], 7, np.int32))

    def mask(self, pending: Result, mask: Mask) -> None:
        return None

    def is_done(self, pending: Result) -> bool:
        return True

    def finish(self, pending: Result) -> Result:
        return pending
