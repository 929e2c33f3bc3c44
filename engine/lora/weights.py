"""One adapter as matrices that are read in pieces. Every format is parsed into it; every image is written from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from engine.files import Closable

# Which target module of an AdapterLayout: its layer, its group in the layer, its position in the group.
TargetIndex = tuple[int, int, int]


class Matrix(Protocol):
    """A matrix, in memory or in a file."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, start: int, stop: int, out: memoryview) -> None:
        """Writes the rows start .. stop - 1 into `out` (writable bytes)."""
        ...


@dataclass(frozen=True, slots=True)
class TensorMatrix:
    """A matrix in memory."""

    tensor: Tensor  # [rows, columns]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.tensor.shape
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, start: int, stop: int, out: memoryview) -> None:
        rows = self.tensor[start:stop]
        torch.frombuffer(out, dtype=self.dtype).view(rows.shape).copy_(rows)


@dataclass(frozen=True, slots=True)
class Pair:
    """The update of one target module: `scale * (x @ a.T) @ b.T`; of an embedding: `scale * a.T[ids] @ b.T`."""

    a: Matrix  # [r, K]; of an embedding [r, vocab]
    b: Matrix  # [N, r]; of an embedding [hidden, r]
    scale: float
    module: str  # its path, for messages

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(slots=True)
class LoraWeights(Closable):
    """An adapter that fits its base model. A context manager; closing it closes the weight file."""

    pairs: Mapping[TargetIndex, Pair]
    base_model: str | None = None  # the adapter's name for it
    notes: list[str] = field(default_factory=list)  # hints for the user; no errors
    verify: Callable[[], None] = lambda: None  # raises AdapterLoadFailed if the files changed
    close: Callable[[], None] = lambda: None
