"""Small copies between host and device that never wait for the device.

The host's edits for a step are one launch that reads them from pinned (page-locked) memory. Results are copied into
pinned memory, so that the next step can be launched before they arrive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

ops = torch.ops.lorax


class ReadBack(Protocol):
    """Copies results to the host. `fetch` starts a copy; `mark` comes after the last copy of a step, to wait for."""

    def fetch(self, tensor: Tensor) -> Tensor: ...

    def mark(self) -> Mark: ...


class Mark(Protocol):
    def synchronize(self) -> None: ...


class HostReadBack:
    """For results that are already in host memory."""

    def fetch(self, tensor: Tensor) -> Tensor:
        return tensor

    def mark(self) -> Mark:
        return self

    def synchronize(self) -> None:
        """Returns at once: the results are there."""


class CudaReadBack:
    """For results on a GPU: copies them into pinned memory after the step's own work."""

    def fetch(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def mark(self) -> Mark:
        return torch.cuda.current_stream().record_event()


def read_back(device: torch.device) -> ReadBack:
    """The readback of results from `device`."""
    return CudaReadBack() if device.type == "cuda" else HostReadBack()


class Words(Protocol):
    """int32 words on the device that the host edits: `write` collects an edit, `send` applies the collected edits.

    They are applied after all work launched before `send` and before all work launched later, in any order among
    themselves.
    """

    words: Tensor  # [size] int32

    def write(self, at: int, values: Sequence[int] | np.ndarray) -> None: ...

    def send(self) -> None: ...


class HostWords:
    """Words in host memory: `write` applies an edit at once."""

    def __init__(self, size: int) -> None:
        self.words = torch.zeros(size, dtype=torch.int32)
        self._host = self.words.numpy()

    def write(self, at: int, values: Sequence[int] | np.ndarray) -> None:
        self._host[at : at + len(values)] = values

    def send(self) -> None:
        """Does nothing: the edits are applied."""


@dataclass(slots=True)
class _Patch:
    """Collected edits: values from the front of a pinned buffer, (destination, count, source) from its end."""

    pinned: Tensor  # [size] int32
    host: np.ndarray  # the same memory
    read: torch.cuda.Event  # recorded after the last launch that reads the buffer
    used: int = 0
    runs: int = 0


def _pinned(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, pin_memory=True)


class CudaWords:
    """Words on a GPU. A kernel reads the edits from a ring of pinned buffers, so they do not wait for copies."""

    DEPTH = 4  # buffers: the host waits only for the launch that read the oldest one
    PATCH = 1 << 17  # words of edits in one launch; more edits take several launches

    def __init__(self, size: int, device: torch.device, patch: int = PATCH) -> None:
        self.words = torch.zeros(size, dtype=torch.int32, device=device)
        self._ring: deque[_Patch] = deque()
        for _ in range(self.DEPTH):
            pinned = _pinned(patch)
            self._ring.append(_Patch(pinned, pinned.numpy(), torch.cuda.Event()))

    def write(self, at: int, values: Sequence[int] | np.ndarray) -> None:
        done = 0
        while done < len(values):
            patch = self._ring[0]
            if patch.runs == 0:
                patch.read.synchronize()
            room = len(patch.host) - patch.used - 3 * (patch.runs + 1)
            if room <= 0:
                self.send()
                continue
            part = values[done : done + room]
            first, end = patch.used, len(patch.host) - 3 * patch.runs
            patch.host[first : first + len(part)] = part
            patch.host[end - 3 : end] = (at + done, len(part), first)
            patch.used, patch.runs, done = first + len(part), patch.runs + 1, done + len(part)

    def send(self) -> None:
        patch = self._ring[0]
        if patch.runs:
            ops.write_runs_(self.words, patch.pinned, patch.runs)
            patch.read.record()
            patch.used = patch.runs = 0
            self._ring.rotate(-1)


def device_words(size: int, device: torch.device) -> Words:
    """`size` words of zero on `device`."""
    return CudaWords(size, device) if device.type == "cuda" else HostWords(size)


def upload_all(
    integers: list[list[int]], floats: list[list[float]], device: torch.device
) -> list[Tensor]:
    """The lists as tensors on `device`, int64 then float32, by one copy on the current stream."""
    sizes = [len(values) for values in integers], [len(values) for values in floats]
    ends = sum(sizes[0]) * 8
    size = ends + sum(sizes[1]) * 4
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda" and size > 0)
    packed = host.numpy()
    packed[:ends].view(np.int64)[:] = [value for values in integers for value in values]
    packed[ends:].view(np.float32)[:] = [value for values in floats for value in values]
    there = host.to(device, non_blocking=True)
    return [
        *there[:ends].view(torch.int64).split(sizes[0]),
        *there[ends:].view(torch.float32).split(sizes[1]),
    ]
