"""The flat image of one adapter: byte for byte what lies in the arena, as `engine.ops.layout` describes.

    records   int32 [layers + 1, groups, 8], offsets relative to the data
    zeros     to the next multiple of DATA_ALIGN bytes
    data      group after group, layer after layer, the ends last: A of all targets, then each target's B, transposed

The digest is BLAKE2b (16 bytes) over records and data: adapters that act alike on this base model share it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import AdapterIncompatible, AdapterTooLarge
from engine.lora.weights import LoraWeights, Matrix, Pair, Place
from engine.ops.layout import (
    ALIGN,
    MAX_TARGETS,
    RECORD_WORDS,
    AdapterLayout,
    Group,
    padded,
    row_stride,
)

DATA_ALIGN = 256  # bytes
CHUNK_BYTES = 1 << 20  # the most that is read, converted or hashed in one piece
_RECORD = struct.Struct("=IIIHHHHfff")  # a, b, extra, three ranks, flags, three scales
assert _RECORD.size == RECORD_WORDS * 4


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Bytes of an image and its parts."""

    record_bytes: int
    data_bytes: int
    max_rank: int  # largest stacked rank of any group

    @property
    def data_start(self) -> int:
        return data_start(self.record_bytes)

    @property
    def total(self) -> int:
        return self.data_start + self.data_bytes


def data_start(record_bytes: int) -> int:
    """Where the data of an image starts, in bytes."""
    return (record_bytes + DATA_ALIGN - 1) // DATA_ALIGN * DATA_ALIGN


@dataclass(frozen=True, slots=True)
class _Block:
    """One group of one layer in the image."""

    layer: int
    number: int
    group: Group
    pairs: tuple[Pair | None, ...]  # by target
    a: int  # bytes from the start of the data
    b: int
    end: int

    @property
    def ranks(self) -> list[int]:
        return [pair.rank if pair else 0 for pair in self.pairs]


def _blocks(weights: LoraWeights, layout: AdapterLayout) -> Iterator[_Block]:
    """Every group that the adapter touches, in the order of the image."""
    size = _dtype(layout).itemsize
    start = 0
    for layer, number, group in layout.places():
        pairs = tuple(
            weights.pairs.get((layer, number, index)) for index in range(len(group.targets))
        )
        ranks = [pair.rank if pair else 0 for pair in pairs]
        if not any(ranks):
            continue
        rows, length = sum(ranks), group.in_features
        if group.embedding:
            rows, length = length, rows
        b = start + rows * padded(length * size)
        end = b + sum(
            rank * padded(target.out_features * size)
            for rank, target in zip(ranks, group.targets, strict=True)
        )
        yield _Block(layer, number, group, pairs, start, b, end)
        start = end


def image_size(weights: LoraWeights, layout: AdapterLayout) -> ImageSize:
    """How large the image will be. Raises AdapterTooLarge beyond what a record can address (64 GiB)."""
    data_bytes = max_rank = 0
    for block in _blocks(weights, layout):
        data_bytes = block.end
        max_rank = max(max_rank, sum(block.ranks))
    if data_bytes >= ALIGN << 32:
        raise AdapterTooLarge(f"the adapter takes {data_bytes} bytes, more than can be addressed")
    return ImageSize(layout.record_bytes, data_bytes, max_rank)


def write_image(
    weights: LoraWeights,
    layout: AdapterLayout,
    out: memoryview,
    pause: Callable[[], None] = lambda: None,
) -> bytes:
    """Writes the image into `out` (writable, `image_size().total` bytes) and returns its digest.

    Works in pieces of CHUNK_BYTES, calling `pause` after each, and allocates no more than a few of them. Values are
    rounded to the layout's dtype. Raises AdapterIncompatible for values that are not finite in it, and
    AdapterLoadFailed where the files fail.
    """
    size = image_size(weights, layout)
    if len(out) != size.total:
        raise ValueError(f"the image has {size.total} bytes, not {len(out)}")
    write_records(weights, layout, out[: size.data_start])
    data = torch.frombuffer(out, dtype=torch.uint8)[size.data_start :]
    for block in _blocks(weights, layout):
        writer = _Writer(data, _dtype(layout), pause)
        offset = block.a
        for pair in block.pairs:
            if pair is None:
                continue
            if block.group.embedding:
                writer.transposed(pair.a, offset, pair)
            else:
                offset = writer.straight(pair.a, offset, pair)
        offset = block.b
        for pair in block.pairs:
            if pair is not None:
                offset = writer.transposed(pair.b, offset, pair)
        assert offset == block.end
    weights.verify()
    return _digest(out, size, pause)


def write_records(weights: LoraWeights, layout: AdapterLayout, out: memoryview) -> None:
    """Writes what stands before the data into `out` (writable, `image_size().data_start` bytes)."""
    torch.frombuffer(out, dtype=torch.uint8).zero_()
    for block in _blocks(weights, layout):
        _write_record(block, layout, out)


def _dtype(layout: AdapterLayout) -> torch.dtype:
    dtype = getattr(torch, layout.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _write_record(block: _Block, layout: AdapterLayout, out: memoryview) -> None:
    empty = [0] * (MAX_TARGETS - len(block.pairs))
    scales = [pair.scale if pair else 0.0 for pair in block.pairs]
    _RECORD.pack_into(
        out,
        (block.layer * layout.num_groups + block.number) * _RECORD.size,
        *(block.a // ALIGN, block.b // ALIGN, 0),
        *(block.ranks + empty),
        0,
        *(scales + empty),
    )


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes matrices into the data of an image, in pieces."""

    data: Tensor  # [bytes] uint8
    dtype: torch.dtype
    pause: Callable[[], None]

    def _view(self, offset: int, rows: int, length: int) -> Tensor:
        """[rows, length] at `offset`, with zeros behind each row."""
        stride = row_stride(length, self.dtype.itemsize)
        count = rows * stride * self.dtype.itemsize
        view = self.data[offset : offset + count].view(self.dtype).view(rows, stride)
        view[:, length:].zero_()
        return view[:, :length]

    def _pieces(self, matrix: Matrix, pair: Pair) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, last row + 1, rows in the image's dtype), each at most CHUNK_BYTES in memory."""
        rows, columns = matrix.shape
        widest = max(matrix.dtype.itemsize, self.dtype.itemsize)
        step = max(1, CHUNK_BYTES // (columns * widest))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            piece = matrix.rows(start, stop).to(self.dtype)
            low, high = (float(bound) for bound in torch.aminmax(piece))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise AdapterIncompatible(
                    f"{pair.module} holds values that are not finite in {self.dtype}".replace(
                        "torch.", ""
                    ),
                    field=pair.module,
                    hint="the training diverged, or the values need a wider --dtype",
                )
            yield start, stop, piece
            self.pause()

    def straight(self, matrix: Matrix, offset: int, pair: Pair) -> int:
        """Writes the rows as they are. Returns the offset behind them."""
        rows, columns = matrix.shape
        view = self._view(offset, rows, columns)
        for start, stop, piece in self._pieces(matrix, pair):
            view[start:stop].copy_(piece)
        return offset + rows * padded(columns * self.dtype.itemsize)

    def transposed(self, matrix: Matrix, offset: int, pair: Pair) -> int:
        """Writes the columns as rows. Returns the offset behind them."""
        rows, columns = matrix.shape
        view = self._view(offset, columns, rows)
        for start, stop, piece in self._pieces(matrix, pair):
            view[:, start:stop].copy_(piece.T)
        return offset + columns * padded(rows * self.dtype.itemsize)


def _digest(out: memoryview, size: ImageSize, pause: Callable[[], None]) -> bytes:
    state = hashlib.blake2b(out[: size.record_bytes], digest_size=16)
    for start in range(size.data_start, size.total, CHUNK_BYTES):
        state.update(out[start : start + CHUNK_BYTES])
        pause()
    return state.digest()


def read_image(
    image: memoryview, layout: AdapterLayout
) -> dict[Place, tuple[Tensor, Tensor, float]]:
    """The inverse of `write_image`: place -> A `[r, K]`, B `[N, r]`, scale, as PEFT stores them."""
    dtype, found = _dtype(layout), {}
    start = data_start(layout.record_bytes)
    data = torch.frombuffer(bytearray(image[start:]), dtype=torch.uint8)

    def matrix(offset: int, rows: int, length: int) -> Tensor:
        stride = row_stride(length, dtype.itemsize)
        end = offset + rows * stride * dtype.itemsize
        return data[offset:end].view(dtype).view(rows, stride)[:, :length]

    for layer, number, group in layout.places():
        at = (layer * layout.num_groups + number) * _RECORD.size
        a, b, _, *rest = _RECORD.unpack_from(image, at)
        ranks, scales = rest[:MAX_TARGETS], rest[MAX_TARGETS + 1 :]
        row, offset = 0, b * ALIGN
        for index, target in enumerate(group.targets):
            rank = ranks[index]
            if not rank:
                continue
            if group.embedding:
                factor = matrix(a * ALIGN, group.in_features, rank).T
            else:
                factor = matrix(a * ALIGN, sum(ranks), group.in_features)[row : row + rank]
            other = matrix(offset, rank, target.out_features).T
            found[layer, number, index] = (factor, other, scales[index])
            row += rank
            offset += rank * padded(target.out_features * dtype.itemsize)
    return found
