"""The masks of grammars on their way to the device: the host writes them while the forward pass runs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.runner.sampler import Masks

DEPTH = 2  # buffers: a step is launched while the copy of the one before may be under way


class MaskBuffers:
    """Pinned buffers for `rows` masks of `vocab` tokens. They are allocated for the first mask."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self._shape = (rows, -(-vocab // 32))
        self._device = device
        self._buffers: list[Tensor] = []
        self._read: list[torch.cuda.Event] = []  # recorded after the copy of a buffer
        self._at = 0

    def take(self, count: int) -> np.ndarray:
        """[count, words] int32 to be written and uploaded. Waits for the copy that reads the same memory."""
        on_gpu = self._device.type == "cuda"
        if not self._buffers:
            self._buffers = [
                torch.zeros(self._shape, dtype=torch.int32, pin_memory=on_gpu) for _ in range(DEPTH)
            ]
            self._read = [torch.cuda.Event() for _ in range(DEPTH)] if on_gpu else []
        self._at = (self._at + 1) % DEPTH
        if self._read:
            self._read[self._at].synchronize()
        return self._buffers[self._at][:count].numpy()

    def upload(self, at: list[int]) -> Masks:
        """The masks that were taken last, of the rows at these places among those that are sampled."""
        bits = self._buffers[self._at][: len(at)].to(self._device, non_blocking=True)
        places = torch.tensor(at, dtype=torch.int64, pin_memory=bool(self._read))
        there = places.to(self._device, non_blocking=True)
        if self._read:
            self._read[self._at].record()
        return Masks(there, bits)
