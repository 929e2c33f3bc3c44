"""One adapter as matrices, read piece by piece: what every format becomes and what every image is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

TargetIndex = tuple[int, int, int]  # layer, group number, number of the target in its group


class Matrix(Protocol):
    """A matrix that need not be in memory."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, start: int, stop: int, out: memoryview) -> None:
        """Fills `out`, writable bytes, with the rows start .. stop - 1."""
        ...


@dataclass(frozen=True, slots=True)
class TensorMatrix:
    """A matrix that is in memory, or mapped."""

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
    """What an adapter adds to one target: `scale * (x @ a.T) @ b.T`; for an embedding `scale * a.T[ids] @ b.T`."""

    a: Matrix  # [r, K]; of an embedding [r, vocab]
    b: Matrix  # [N, r]; of an embedding [hidden, r]
    scale: float
    module: str  # for messages

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(slots=True)
class LoraWeights:
    """An adapter that fits its base model. A context manager: closing it closes its weight file."""

    pairs: Mapping[TargetIndex, Pair]
    base_model: str | None = None  # as the adapter names it
    notes: list[str] = field(
        default_factory=list
    )  # what a user may want to know; nothing that is wrong
    verify: Callable[[], None] = lambda: None  # raises AdapterLoadFailed if the files changed since
    close: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
