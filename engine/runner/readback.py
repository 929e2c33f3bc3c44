"""What a step computed on its way to the host, so that the next step can be launched before it has arrived."""

from __future__ import annotations

from typing import Protocol

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
