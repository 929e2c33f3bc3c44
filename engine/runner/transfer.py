"""Small data between host and device, never waiting for the device.

Inputs of a step go up from pinned memory; results come down into it, so that the next step can be launched before they
have arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class ReadBack(Protocol):
    """Where the results of steps are read: `fetch` starts a copy, `mark` ends a step's, `Mark.wait` waits for them."""

    def fetch(self, tensor: Tensor) -> Tensor: ...

    def mark(self) -> Mark: ...


class Mark(Protocol):
    def synchronize(self) -> None: ...


class HostReadBack:
    """Results that are in host memory already."""

    def fetch(self, tensor: Tensor) -> Tensor:
        return tensor

    def mark(self) -> Mark:
        return self

    def synchronize(self) -> None:
        """There is nothing to wait for."""


class CudaReadBack:
    """Results on a GPU: copied into pinned memory behind the step's own work."""

    def fetch(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def mark(self) -> Mark:
        return torch.cuda.current_stream().record_event()


def read_back(device: torch.device) -> ReadBack:
    """The way from `device` to the host."""
    return CudaReadBack() if device.type == "cuda" else HostReadBack()


def upload(values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` (a list or a numpy array) as a tensor on `device`; the copy is ordered with the device's own work."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host
    return host.pin_memory().to(device, non_blocking=True)
