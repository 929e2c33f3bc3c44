"""The flat image of one adapter: the same bytes as in the arena, in the format of `engine.ops.layout`.

    records   int32 [layers + 1, groups, 8], offsets relative to the data
    zeros     to the next multiple of IMAGE_ALIGN bytes
    data      group by group, layer by layer, the ends last: A of all targets, then each target's B, transposed, then
              the extras, then the own rows; for a group of experts: the expert records, then the same for each
              adapted expert

An image belongs to one shard: it holds the parts of the matrices that the shard's linears need.

The digest is the first DIGEST_BYTES of SHA-256 (which processors compute in hardware) over records and data. Adapters
with the same effect on this base model have the same digest.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import AdapterTooLarge
from engine.lora.extras import extras_bytes, flags_of, write_extras
from engine.lora.own import own_bytes, vocab_of, write_own
from engine.lora.weights import (
    Extras,
    LoraWeights,
    Matrix,
    OwnRows,
    Pair,
    Resized,
    TargetIndex,
    sliced,
)
from engine.lora.writer import CHUNK_BYTES, Writer
from engine.ops.layout import (
    ALIGN,
    EXTRAS,
    FLAG_EXPERTS,
    FLAG_OWN_ROWS,
    RECORD_BYTES,
    GroupPart,
    ShardLayout,
    data_start,
    padded,
    row_stride,
)
from engine.ops.targets import MAX_TARGETS, Span

DIGEST_BYTES = 16
_RECORD = struct.Struct("=IIIHHHHfff")  # a, b, extra, three ranks, flags, three scales
assert _RECORD.size == RECORD_BYTES


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Bytes of an image and its parts."""

    record_bytes: int
    data_bytes: int
    stacked_rank: int  # largest stacked rank of any group
    vocab: int = 0  # the adapter's vocabulary, if it is not the base's

    @property
    def data_start(self) -> int:
        return data_start(self.record_bytes)

    @property
    def total(self) -> int:
        return self.data_start + self.data_bytes


@dataclass(frozen=True, slots=True)
class _Section:
    """The matrices of one linear, at these bytes from the start of the data."""

    group: GroupPart
    pairs: tuple[Pair | None, ...]  # by target
    extras: tuple[Extras | None, ...]
    own: OwnRows | None
    a: int
    b: int
    extra: int
    rows: int  # own ones
    end: int

    @property
    def ranks(self) -> list[int]:
        return _ranks(self.pairs)

    def record(self) -> bytes:
        scales = [pair.scale if pair else 0.0 for pair in self.pairs]
        flags = flags_of(self.group, self.extras)
        if self.own is not None:
            flags |= FLAG_OWN_ROWS
        record = _record(self.a, self.b, self.ranks, flags, scales, self.extra)
        if self.own is None:
            return record
        return record[:-4] + (self.rows // ALIGN).to_bytes(4, sys.byteorder)


@dataclass(frozen=True, slots=True)
class _GroupData:
    """The part of an image that belongs to one group of one layer."""

    layer: int
    number: int
    table: int | None  # bytes from the start of the data to the expert records; None: no experts
    sections: tuple[_Section | None, ...]  # one, or one per expert; None: not adapted
    end: int

    def record(self) -> bytes:
        """The record of the slot."""
        if self.table is None:
            assert self.sections[0] is not None
            return self.sections[0].record()
        expert_ranks = [section.ranks for section in self.sections if section is not None]
        largest = [max(ranks) for ranks in zip(*expert_ranks, strict=True)]
        return _record(self.table, 0, largest, FLAG_EXPERTS, [])

    def expert_records(self) -> bytes:
        return b"".join(s.record() if s else bytes(RECORD_BYTES) for s in self.sections)


def _record(
    a: int, b: int, ranks: list[int], flags: int, scales: list[float], extra: int = 0
) -> bytes:
    filled = [*ranks, 0, 0, 0][:MAX_TARGETS], [*scales, 0.0, 0.0, 0.0][:MAX_TARGETS]
    extra = extra // ALIGN if flags & EXTRAS else 0
    return _RECORD.pack(a // ALIGN, b // ALIGN, extra, *filled[0], flags, *filled[1])


def _ranks(pairs: tuple[Pair | None, ...]) -> list[int]:
    return [pair.rank if pair else 0 for pair in pairs]


def _groups(weights: LoraWeights, layout: ShardLayout) -> Iterator[_GroupData]:
    """Every group that the adapter adapts, in the order of the image."""
    start = 0
    for layer, number, group in layout.each_group():
        experts = group.whole.experts
        by_expert = [
            [TargetIndex(layer, number, index, expert) for index in range(len(group.targets))]
            for expert in range(experts or 1)
        ]
        parts = (weights.pairs, weights.extras, weights.own)
        if not any(at in part for part in parts for one in by_expert for at in one):
            continue
        table = start if experts else None
        start += experts * RECORD_BYTES
        sections: list[_Section | None] = []
        for places in by_expert:
            pairs = tuple(weights.pairs.get(at) for at in places)
            extras = tuple(weights.extras.get(at) for at in places)
            own = weights.own.get(places[0])
            section = _section(group, pairs, extras, own, start, _dtype(layout).itemsize)
            sections.append(section)
            start = section.end if section else start
        yield _GroupData(layer, number, table, tuple(sections), start)


def _section(
    group: GroupPart,
    pairs: tuple[Pair | None, ...],
    extras: tuple[Extras | None, ...],
    own: OwnRows | None,
    start: int,
    itemsize: int,
) -> _Section | None:
    if not any(pairs) and not any(extras) and own is None:
        return None
    ranks = _ranks(pairs)
    rows, length = sum(ranks), group.in_features
    if group.whole.embedding:
        rows, length = _table_rows(group, own), rows
    b = start + rows * padded(length * itemsize)
    at = b + sum(
        rank * padded(target.out_features * itemsize)
        for rank, target in zip(ranks, group.targets, strict=True)
    )
    rows_at = at + extras_bytes(group, flags_of(group, extras))
    end = rows_at + (own_bytes(own, itemsize) if own else 0)
    return _Section(group, pairs, extras, own, a=start, b=b, extra=at, rows=rows_at, end=end)


def _table_rows(group: GroupPart, own: OwnRows | None) -> int:
    """Rows of the A of an embedding: one for each token that the adapter may be asked for."""
    added = max(own.vocab - group.whole.in_features, 0) if own else 0
    return group.in_features + added


def image_size(weights: LoraWeights, layout: ShardLayout) -> ImageSize:
    """The size of the image. Raises AdapterTooLarge above 64 GiB, the limit of a record's offsets."""
    return _size_of(list(_groups(weights, layout)), weights, layout)


def _size_of(groups: Sequence[_GroupData], weights: LoraWeights, layout: ShardLayout) -> ImageSize:
    data_bytes = stacked_rank = 0
    for group in groups:
        data_bytes = group.end
        stacked_rank = max(
            stacked_rank, *(sum(section.ranks) for section in group.sections if section)
        )
    if data_bytes >= ALIGN << 32:
        raise AdapterTooLarge(
            f"the adapter takes {data_bytes} bytes; the limit is {ALIGN << 32} bytes (64 GiB)",
            hint="use an adapter of lower rank",
        )
    return ImageSize(
        layout.record_bytes, data_bytes, stacked_rank, vocab_of(weights.own, layout.targets)
    )


def write_image(
    weights: LoraWeights,
    layout: ShardLayout,
    out: memoryview,
    pause: Callable[[], None] = lambda: None,
) -> bytes:
    """Writes the image into `out` (writable, `image_size().total` bytes) and returns its digest.

    Works in batches of CHUNK_BYTES, allocates one of them, and calls `pause` after each. Values are rounded to the
    layout's dtype. Raises AdapterIncompatible for values that are not finite in that dtype, and AdapterLoadFailed if
    the files cannot be read.
    """
    groups = list(_groups(weights, layout))
    size = _size_of(groups, weights, layout)
    if len(out) != size.total:
        raise ValueError(f"the image has {size.total} bytes, not {len(out)}")
    _write_records(groups, layout, out[: size.data_start])
    data = torch.frombuffer(out, dtype=torch.uint8)[size.data_start :]
    writer = Writer(data, _dtype(layout), pause)
    for group in groups:
        if group.table is not None:
            records, at = group.expert_records(), size.data_start + group.table
            out[at : at + len(records)] = records
        for section in filter(None, group.sections):
            _write_section(writer, section)
            write_extras(data, section.extra, section.group, section.extras)
            if section.own is not None:
                write_own(writer, data, section.rows, section.own)
    writer.flush()
    weights.verify()
    return _digest(out, size, pause)


def _write_section(writer: Writer, section: _Section) -> None:
    group, offset = section.group, section.a
    for pair in filter(None, section.pairs):
        if group.whole.embedding:
            a = _table(pair, group, section.own)
            writer.transposed(a, offset, pair.module)
        else:
            a = sliced(pair.a, columns=group.inputs)
            offset = writer.straight(a, offset, pair.module)
    offset = section.b
    for target, adapted in zip(group.targets, section.pairs, strict=True):
        if adapted is not None:
            b = adapted.b
            if section.own is not None and not group.whole.embedding:
                b = Resized(b, (target.whole.out_features, adapted.rank))
            b = sliced(b, rows=target.outputs)
            offset = writer.transposed(b, offset, adapted.module)
    assert offset == section.extra


def _table(pair: Pair, group: GroupPart, own: OwnRows | None) -> Matrix:
    """The A of an embedding, [r, tokens]."""
    if own is None or own.vocab == group.whole.in_features:
        return sliced(pair.a, columns=group.inputs)
    end = group.inputs.start + _table_rows(group, own)
    return sliced(Resized(pair.a, (pair.rank, end)), columns=Span(group.inputs.start, end))


def write_records(weights: LoraWeights, layout: ShardLayout, out: memoryview) -> None:
    """Writes the slot's records and their padding into `out` (writable, `image_size().data_start` bytes)."""
    _write_records(list(_groups(weights, layout)), layout, out)


def _write_records(groups: Sequence[_GroupData], layout: ShardLayout, out: memoryview) -> None:
    torch.frombuffer(out, dtype=torch.uint8).zero_()
    for group in groups:
        at = (group.layer * layout.num_groups + group.number) * RECORD_BYTES
        out[at : at + RECORD_BYTES] = group.record()


def _dtype(layout: ShardLayout) -> torch.dtype:
    dtype = getattr(torch, layout.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _digest(out: memoryview, size: ImageSize, pause: Callable[[], None]) -> bytes:
    state = hashlib.sha256(out[: size.record_bytes])
    for start in range(size.data_start, size.total, CHUNK_BYTES):
        state.update(out[start : start + CHUNK_BYTES])
        pause()
    return state.digest()[:DIGEST_BYTES]


def read_image(
    image: memoryview, layout: ShardLayout
) -> dict[TargetIndex, tuple[Tensor, Tensor, float]]:
    """The inverse of `write_image`: target -> the shard's A `[r, K]`, B `[N, r]` and scale, as PEFT stores them."""
    found = {}
    start = data_start(layout.record_bytes)
    data = torch.frombuffer(bytearray(image[start:]), dtype=torch.uint8)
    for layer, number, group in layout.each_group():
        at = (layer * layout.num_groups + number) * RECORD_BYTES
        records = [bytes(image[at : at + RECORD_BYTES])]
        if group.whole.experts:
            table, _, _, *ranks = _RECORD.unpack(records[0])
            if not any(ranks[:MAX_TARGETS]):
                continue
            first = start + table * ALIGN
            ends = range(first, first + group.whole.experts * RECORD_BYTES, RECORD_BYTES)
            records = [bytes(image[at : at + RECORD_BYTES]) for at in ends]
        for expert, record in enumerate(records):
            for target, matrices in _matrices(record, data, group, _dtype(layout)):
                found[TargetIndex(layer, number, target, expert)] = matrices
    return found


def _matrices(
    record: bytes, data: Tensor, group: GroupPart, dtype: torch.dtype
) -> Iterator[tuple[int, tuple[Tensor, Tensor, float]]]:
    """(position in the group, A, B and scale) of every target that the record says is adapted."""

    def matrix(offset: int, rows: int, length: int) -> Tensor:
        stride = row_stride(length, dtype.itemsize)
        end = offset + rows * stride * dtype.itemsize
        return data[offset:end].view(dtype).view(rows, stride)[:, :length]

    a, b, _, *rest = _RECORD.unpack(record)
    ranks, scales = rest[:MAX_TARGETS], rest[MAX_TARGETS + 1 :]
    row, offset = 0, b * ALIGN
    for index, target in enumerate(group.targets):
        rank = ranks[index]
        if not rank:
            continue
        if group.whole.embedding:
            factor = matrix(a * ALIGN, group.in_features, rank).T
        else:
            factor = matrix(a * ALIGN, sum(ranks), group.in_features)[row : row + rank]
        yield index, (factor, matrix(offset, rank, target.out_features).T, scales[index])
        row += rank
        offset += rank * padded(target.out_features * dtype.itemsize)
