"""One adapter as matrices that are read in pieces. Formats are parsed into it; images are written from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.files import Closable
from engine.ops.targets import Span


class TargetIndex(NamedTuple):
    """The position of a target module in a `ModelTargets`."""

    layer: int
    group: int  # in the layer
    target: int  # in the group
    expert: int = 0


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
class Slice:
    """Some rows and columns of a matrix: one shard's part."""

    matrix: Matrix
    rows: tuple[Span, ...]
    columns: Span

    @property
    def shape(self) -> tuple[int, int]:
        return sum(span.size for span in self.rows), self.columns.size

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def read(self, start: int, stop: int, out: memoryview) -> None:
        row_bytes = self.columns.size * self.dtype.itemsize
        first = written = 0  # row of the slice that the span starts with; bytes of `out`
        for span in self.rows:
            skipped = max(start - first, 0)
            count = min(stop - first, span.size) - skipped
            if count > 0:
                end = written + count * row_bytes
                self._read(span.start + skipped, count, out[written:end])
                written = end
            first += span.size

    def _read(self, start: int, count: int, out: memoryview) -> None:
        """Reads `count` rows of the matrix."""
        width = self.matrix.shape[1]
        if self.columns == (0, width):
            self.matrix.read(start, start + count, out)
            return
        whole = torch.empty(count, width, dtype=self.dtype)
        self.matrix.read(start, start + count, _bytes(whole))
        part = whole[:, self.columns.start : self.columns.stop]
        torch.frombuffer(out, dtype=self.dtype).view(part.shape).copy_(part)


def sliced(
    matrix: Matrix, rows: tuple[Span, ...] | None = None, columns: Span | None = None
) -> Matrix:
    """The given rows and columns of a matrix; None: all. Returns the matrix itself if they are all of it."""
    whole = (Span(0, matrix.shape[0]),), Span(0, matrix.shape[1])
    cut = rows or whole[0], columns or whole[1]
    return matrix if cut == whole else Slice(matrix, *cut)


@dataclass(frozen=True, slots=True)
class Picked:
    """Some rows of a matrix, in any order."""

    matrix: Matrix
    rows: Tensor  # [n] int64

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def read(self, start: int, stop: int, out: memoryview) -> None:
        row_bytes = self.shape[1] * self.dtype.itemsize
        wanted = self.rows[start:stop]
        breaks = (wanted.diff() != 1).nonzero().flatten() + 1
        at = 0
        for run in wanted.tensor_split(breaks):
            first, count = int(run[0]), len(run)
            self.matrix.read(first, first + count, out[at * row_bytes : (at + count) * row_bytes])
            at += count


@dataclass(frozen=True, slots=True)
class Joined:
    """The rows of two matrices, one below the other."""

    top: Matrix
    bottom: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.top.shape[0] + self.bottom.shape[0], self.top.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.top.dtype, self.bottom.dtype)

    def read(self, start: int, stop: int, out: memoryview) -> None:
        found = torch.frombuffer(out, dtype=self.dtype).view(stop - start, self.shape[1])
        first = self.top.shape[0]
        for matrix, begin in ((self.top, 0), (self.bottom, first)):
            low, high = max(start, begin), min(stop, begin + matrix.shape[0])
            if low < high:
                part = torch.empty(high - low, matrix.shape[1], dtype=matrix.dtype)
                matrix.read(low - begin, high - begin, _bytes(part))
                found[low - start : high - start].copy_(part)


@dataclass(frozen=True, slots=True)
class Resized:
    """A matrix cut to, or filled with zeros up to, another shape."""

    matrix: Matrix
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def read(self, start: int, stop: int, out: memoryview) -> None:
        rows, columns = self.matrix.shape
        count = max(min(stop, rows) - start, 0)
        whole = torch.zeros(stop - start, max(columns, self.shape[1]), dtype=self.dtype)
        if count:
            part = torch.empty(count, columns, dtype=self.dtype)
            self.matrix.read(start, start + count, _bytes(part))
            whole[:count, :columns] = part
        cut = whole[:, : self.shape[1]]
        torch.frombuffer(out, dtype=self.dtype).view(cut.shape).copy_(cut)


def read_all(matrix: Matrix) -> Tensor:
    """The whole matrix in memory."""
    out = torch.empty(matrix.shape, dtype=matrix.dtype)
    if out.numel():
        matrix.read(0, matrix.shape[0], _bytes(out))
    return out


def _bytes(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.view(torch.uint8).numpy().reshape(-1).data
    return view


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


@dataclass(frozen=True, slots=True)
class Extras:
    """What an adapter does to the outputs of one target module besides its pair; each [1, N]."""

    module: str  # its path, for messages
    magnitude: Matrix | None = None  # DoRA's, of each row of the weight
    shift: Matrix | None = None  # the bias of lora_B
    shift_scale: float = 1.0
    bias: Matrix | None = None  # replaces that of the base


@dataclass(frozen=True, slots=True)
class OwnRows:
    """Rows of embedding or head that replace the base's, or add tokens behind its vocabulary."""

    module: str  # its path, for messages
    ids: Tensor  # [n] int32 tokens, rising
    rows: Matrix  # [n, hidden]
    vocab: int  # the adapter's vocabulary


@dataclass(slots=True)
class LoraWeights(Closable):
    """An adapter that fits its base model. A context manager; closing it closes the weight file."""

    pairs: Mapping[TargetIndex, Pair]
    extras: Mapping[TargetIndex, Extras] = field(default_factory=dict)
    own: Mapping[TargetIndex, OwnRows] = field(default_factory=dict)
    base_model: str | None = None  # the adapter's name for it
    notes: list[str] = field(default_factory=list)  # hints for the user, not errors
    verify: Callable[[], None] = lambda: None  # raises AdapterLoadFailed if the files changed
    close: Callable[[], None] = lambda: None
