"""The flat image of one adapter: the same bytes as in the arena, in the format of `engine.ops.layout`.

    records   int32 [layers + 1, groups, 8], offsets relative to the data
    zeros     to the next multiple of IMAGE_ALIGN bytes
    data      group by group, layer by layer, the ends last: A of all targets, then each target's B, transposed

The digest is the first DIGEST_BYTES of SHA-256 (which processors compute in hardware) over records and data. Adapters
with the same effect on this base model have the same digest.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import AdapterIncompatible, AdapterTooLarge
from engine.lora.weights import LoraWeights, Matrix, Pair, TargetIndex
from engine.ops.layout import (
    ALIGN,
    MAX_TARGETS,
    RECORD_WORDS,
    AdapterLayout,
    Group,
    data_start,
    padded,
    row_stride,
)
from engine.ops.matrices import ELEMENTS, Piece, write_matrices

DIGEST_BYTES = 16
CHUNK_BYTES = 1 << 20  # largest piece that is read, converted or hashed at once
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


@dataclass(frozen=True, slots=True)
class _Section:
    """The part of an image that belongs to one group of one layer."""

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


def _sections(weights: LoraWeights, layout: AdapterLayout) -> Iterator[_Section]:
    """Every group that the adapter adapts, in the order of the image."""
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
        yield _Section(layer, number, group, pairs, a=start, b=b, end=end)
        start = end


def image_size(weights: LoraWeights, layout: AdapterLayout) -> ImageSize:
    """The size of the image. Raises AdapterTooLarge above 64 GiB, the limit of a record's offsets."""
    data_bytes = max_rank = 0
    for section in _sections(weights, layout):
        data_bytes = section.end
        max_rank = max(max_rank, sum(section.ranks))
    if data_bytes >= ALIGN << 32:
        raise AdapterTooLarge(
            f"the adapter takes {data_bytes} bytes; the limit is {ALIGN << 32} bytes (64 GiB)"
        )
    return ImageSize(layout.record_bytes, data_bytes, max_rank)


def write_image(
    weights: LoraWeights,
    layout: AdapterLayout,
    out: memoryview,
    pause: Callable[[], None] = lambda: None,
) -> bytes:
    """Writes the image into `out` (writable, `image_size().total` bytes) and returns its digest.

    Works in batches of CHUNK_BYTES, allocates one of them, and calls `pause` after each. Values are rounded to the
    layout's dtype. Raises AdapterIncompatible for values that are not finite in that dtype, and AdapterLoadFailed if
    the files cannot be read.
    """
    size = image_size(weights, layout)
    if len(out) != size.total:
        raise ValueError(f"the image has {size.total} bytes, not {len(out)}")
    write_records(weights, layout, out[: size.data_start])
    data = torch.frombuffer(out, dtype=torch.uint8)[size.data_start :]
    writer = _Writer(data, _dtype(layout), pause)
    for section in _sections(weights, layout):
        offset = section.a
        for pair in filter(None, section.pairs):
            if section.group.embedding:
                writer.transposed(pair.a, offset, pair.module)
            else:
                offset = writer.straight(pair.a, offset, pair.module)
        offset = section.b
        for pair in filter(None, section.pairs):
            offset = writer.transposed(pair.b, offset, pair.module)
        assert offset == section.end
    writer.flush()
    weights.verify()
    return _digest(out, size, pause)


def write_records(weights: LoraWeights, layout: AdapterLayout, out: memoryview) -> None:
    """Writes the records and their padding into `out` (writable, `image_size().data_start` bytes)."""
    torch.frombuffer(out, dtype=torch.uint8).zero_()
    for section in _sections(weights, layout):
        _write_record(section, layout, out)


def _dtype(layout: AdapterLayout) -> torch.dtype:
    dtype = getattr(torch, layout.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _write_record(section: _Section, layout: AdapterLayout, out: memoryview) -> None:
    empty = [0] * (MAX_TARGETS - len(section.pairs))
    scales = [pair.scale if pair else 0.0 for pair in section.pairs]
    _RECORD.pack_into(
        out,
        (section.layer * layout.num_groups + section.number) * _RECORD.size,
        *(section.a // ALIGN, section.b // ALIGN, 0),
        *(section.ranks + empty),
        0,
        *(scales + empty),
    )


class _Writer:
    """Writes matrices into the data of an image, in batches."""

    def __init__(self, data: Tensor, dtype: torch.dtype, pause: Callable[[], None]) -> None:
        """`data` [bytes] uint8."""
        self._data, self._dtype, self._pause = data, dtype, pause
        self._read = bytearray(CHUNK_BYTES)
        self._used = 0  # bytes of `_read`
        self._pieces: list[Piece] = []
        self._modules: list[str] = []  # module of each piece, for messages

    def straight(self, matrix: Matrix, offset: int, module: str) -> int:
        """Writes the rows of a matrix. Returns the offset after them."""
        rows, columns = matrix.shape
        return self._write(matrix, offset, (rows, columns), module, transposed=False)

    def transposed(self, matrix: Matrix, offset: int, module: str) -> int:
        """Writes the columns of a matrix as rows. Returns the offset after them."""
        rows, columns = matrix.shape
        return self._write(matrix, offset, (columns, rows), module, transposed=True)

    def _write(
        self,
        matrix: Matrix,
        offset: int,
        shape: tuple[int, int],
        module: str,
        transposed: bool,
    ) -> int:
        """`shape`: number of rows in the image and their length. Rows are padded with zeros."""
        size, stride = self._dtype.itemsize, row_stride(shape[1], self._dtype.itemsize)
        end = offset + shape[0] * stride * size
        if stride > shape[1]:
            values = self._data[offset:end].view(self._dtype).view(shape[0], stride)
            values[:, shape[1] :].zero_()
        rows, columns = matrix.shape
        element = ELEMENTS.index(matrix.dtype)
        num_bytes = columns * matrix.dtype.itemsize  # per row in the file
        done = 0
        while done < rows:
            count = min((len(self._read) - self._used) // num_bytes, rows - done)
            if not count:
                self._reserve(num_bytes)
                continue
            stop = self._used + count * num_bytes
            matrix.read(done, done + count, memoryview(self._read)[self._used : stop])
            target = offset + done * size * (1 if transposed else stride)
            piece = Piece(
                self._used,
                count,
                columns,
                element=element,
                target=target,
                stride=stride,
                transposed=transposed,
            )
            self._pieces.append(piece)
            self._modules.append(module)
            self._used = padded(stop)
            done += count
        return end

    def _reserve(self, num_bytes: int) -> None:
        """Writes the batch, so that `num_bytes` more can be read."""
        self.flush()
        if num_bytes > len(self._read):
            self._read = bytearray(num_bytes)

    def flush(self) -> None:
        """Writes the batch."""
        if not self._pieces:
            return
        source = torch.frombuffer(self._read, dtype=torch.uint8)
        bad = write_matrices(source, self._data, self._pieces, self._dtype)
        if bad is not None:
            module, dtype = self._modules[bad], str(self._dtype).removeprefix("torch.")
            raise AdapterIncompatible(
                f"{module} has values that are not finite in {dtype}",
                field=module,
                hint="check whether the training diverged, or serve with a wider --dtype",
            )
        self._pieces, self._modules, self._used = [], [], 0
        self._pause()


def _digest(out: memoryview, size: ImageSize, pause: Callable[[], None]) -> bytes:
    state = hashlib.sha256(out[: size.record_bytes])
    for start in range(size.data_start, size.total, CHUNK_BYTES):
        state.update(out[start : start + CHUNK_BYTES])
        pause()
    return state.digest()[:DIGEST_BYTES]


def read_image(
    image: memoryview, layout: AdapterLayout
) -> dict[TargetIndex, tuple[Tensor, Tensor, float]]:
    """The inverse of `write_image`: target -> A `[r, K]`, B `[N, r]` and scale, as PEFT stores them."""
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
