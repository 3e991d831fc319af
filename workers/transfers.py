"""Between a rank's host and its device, without waiting: a step's rows go up, its results down."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Transfers:
    """On a CPU nothing moves and all is done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def upload(self, array: NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def fetch(self, tensor: Tensor) -> Tensor:
        """The tensor on the host: complete once the step's `mark` is."""
        if tensor.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def mark(self) -> torch.cuda.Event | None:
        """Done when all that was queued before is; None on a CPU, where it is done already."""
        if self.device.type == "cpu":
            return None
        event = torch.cuda.Event()
        event.record()
        return event
