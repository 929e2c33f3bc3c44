"""Makes the extras of a placed image final: they depend on the base weights, which only the runner has.

DoRA (Liu et al. 2024, arXiv 2402.09353) scales each output by `magnitude / |W + s B A|`, the norm over the inputs. For
each row of W and B,

    |W + s B A|^2 = |W|^2 + 2 s (W A.T) . B + s^2 (B A A.T) . B

so that W is read once, without a copy; |W| is kept. Sums are in float32. A quantised base counts with its dequantised
weights. The base's bias is not scaled, so with the scale m and the base's bias c, y = x W.T + c + s x A.T B.T becomes
`m y + (c - m c)`; a trained bias replaces the first c.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.ops.layout import (
    ALIGN,
    EXTRAS,
    FLAG_OWN_BIAS,
    FLAG_SCALED,
    FLAGS_SHIFT,
    WORD_A,
    WORD_B,
    WORD_EXTRA,
    WORD_RANK2,
    WORD_RANKS,
    WORD_SCALE,
    padded,
)
from engine.ops.reference import extras, matrix
from engine.ops.targets import MAX_TARGETS
from engine.runner.transfer import Mark, read_back

PIECE_WEIGHTS = {"cpu": 4 << 20, "cuda": 16 << 20}  # that are read at once, dequantised if need be
KEPT_BYTES = 256 << 20  # of final extras that are kept in host memory


class Base(Protocol):
    """A linear or an embedding of the base model: [N, K], of an embedding [hidden, vocab]."""

    splits: list[int]  # outputs of each target

    @property
    def base_bias(self) -> Tensor | None: ...

    def weight_rows(self, rows: slice) -> Tensor: ...


class _Group(NamedTuple):
    """The record of one group, decoded."""

    base: Base
    place: tuple[int, int]  # layer, group number
    words: list[int]
    ranks: list[int]
    scales: list[float]
    embedding: bool

    @property
    def flags(self) -> int:
        return self.words[WORD_RANK2] >> FLAGS_SHIFT


class Finisher:
    """Finishes images in the arena; keeps the newest results by digest, up to KEPT_BYTES."""

    def __init__(
        self,
        arena: Tensor,
        bases: Mapping[tuple[int, int], Base],
        dtype: torch.dtype,
        embeddings: Sequence[tuple[int, int]],
    ) -> None:
        """`arena` [bytes] uint8. `bases` by (layer, group number); `embeddings` lists those that are embeddings."""
        self._arena, self._bases, self._dtype = arena, bases, dtype
        self._embeddings = frozenset(embeddings)
        # |W|^2 of each row, by place and first row of the piece
        self._squares: dict[tuple[int, int, int], Tensor] = {}
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()  # [bytes] float32: all rows
        self._staging = torch.empty(
            0
        )  # float32, pinned for a GPU: the newest rows on their way to `_kept`
        self._staged: tuple[bytes, int, Mark] | None = (
            None  # digest, values, reached when they have arrived
        )
        self._readback = read_back(arena.device)

    @torch.inference_mode()
    def finish(self, records: Tensor, digest: bytes) -> Iterator[int]:
        """Makes all extras of an image final, where `records` [layers + 1, groups, 8] (on the host) say that they lie.

        Yields the number of base weights that were read after every piece of work.
        """
        self._keep()
        groups = list(self._groups(records))
        sizes = [2 * sum(group.base.splits) for group in groups]
        kept = self._kept.get(digest)
        if kept is not None:
            self._kept.move_to_end(digest)
            for group, part in zip(groups, kept.split(sizes), strict=True):
                self._copy(group, part, back=True)
            yield 0
            return
        total = sum(sizes)
        if len(self._staging) < total:
            self._staging = torch.empty(total, pin_memory=self._arena.is_cuda)
        for group, part in zip(groups, self._staging[:total].split(sizes), strict=True):
            yield from self._finish(group)
            self._copy(group, part)
        self._staged = digest, total, self._readback.mark()

    def _copy(self, group: _Group, kept: Tensor, back: bool = False) -> None:
        """Copies the rows of a group to `kept` [2 N] on the host, or from there."""
        for row, part in zip(self._rows(group), kept.chunk(2), strict=True):
            if row is not None:
                target, source = (row, part) if back else (part, row)
                target.copy_(source, non_blocking=True)

    def _groups(self, records: Tensor) -> Iterator[_Group]:
        flags = records[..., WORD_RANK2] & (EXTRAS << FLAGS_SHIFT)
        for layer, number in flags.nonzero().tolist():
            record = records[layer, number].contiguous()
            yield _Group(
                self._bases[layer, number],
                (layer, number),
                record.view(torch.uint32).tolist(),
                record[WORD_RANKS : WORD_RANK2 + 1].view(torch.uint16).tolist()[:MAX_TARGETS],
                record[WORD_SCALE : WORD_SCALE + MAX_TARGETS].view(torch.float32).tolist(),
                (layer, number) in self._embeddings,
            )

    def _rows(self, group: _Group) -> tuple[Tensor | None, Tensor | None]:
        return extras(self._arena, group.words[WORD_EXTRA], group.flags, sum(group.base.splits))

    def _finish(self, group: _Group) -> Iterator[int]:
        scale, shift = self._rows(group)
        if scale is not None:
            yield from self._divide(group, scale)
        if shift is not None and (bias := group.base.base_bias) is not None:
            column = 0
            for target, n in enumerate(group.base.splits):
                part = slice(column, column + n)
                kept = 0.0 if group.flags & FLAG_OWN_BIAS << target else 1.0
                scaled = 1.0 if scale is None else scale[part]
                shift[part] += bias[part].float() * (kept - scaled)
                column += n
            yield bias.numel()

    def _divide(self, group: _Group, scale: Tensor) -> Iterator[int]:
        """Divides the magnitudes in `scale` [N] by the norms, a piece of the base weight at a time."""
        b_offset, row, column = group.words[WORD_B], 0, 0
        for target, n in enumerate(group.base.splits):
            rank, end = group.ranks[target], column + n
            if group.flags & FLAG_SCALED << target:
                a, b = self._pair(group, row, rank, n, b_offset)
                s, gram = group.scales[target], _product(a, a)
                step = max(1, PIECE_WEIGHTS[a.device.type] // a.shape[1])
                for first in range(0, n, step):
                    part = slice(column + first, min(column + first + step, end))
                    weight = group.base.weight_rows(part)
                    of_part = b[:, first : first + step].T.float()
                    cross = torch.addmm(_product(weight, a), of_part, gram, beta=2 * s, alpha=s * s)
                    square = torch.linalg.vecdot(cross, of_part) + self._square(group, part, weight)
                    scale[part] *= square.clamp_(min=torch.finfo(torch.float32).tiny).rsqrt_()
                    yield weight.numel()
            b_offset += rank * padded(n * self._dtype.itemsize) // ALIGN
            row, column = row + rank, end

    def _pair(
        self, group: _Group, row: int, rank: int, n: int, b_offset: int
    ) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [r, n] of a target; `row`: its first rank in A."""
        b = matrix(self._arena, b_offset, rank, n, self._dtype)
        k = group.base.weight_rows(slice(0, 1)).shape[1]
        if group.embedding:
            return matrix(self._arena, group.words[WORD_A], k, rank, self._dtype).T, b
        a = matrix(self._arena, group.words[WORD_A], sum(group.ranks), k, self._dtype)
        return a[row : row + rank], b

    def _square(self, group: _Group, part: slice, weight: Tensor) -> Tensor:
        """|W|^2 of rows of the base, [n] float32."""
        key = (*group.place, part.start)
        found = self._squares.get(key)
        if found is None or len(found) != len(weight):
            found = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_()
            self._squares[key] = found
        return found

    def _keep(self) -> None:
        """Keeps the staged rows, and drops the oldest ones beyond KEPT_BYTES."""
        if self._staged is None:
            return
        (digest, total, mark), self._staged = self._staged, None
        mark.synchronize()
        self._kept[digest] = self._staging[:total].clone()
        while sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)


def _product(weight: Tensor, a: Tensor) -> Tensor:
    """weight[n, K] @ a[r, K].T, in float32."""
    if weight.is_cuda and weight.dtype != torch.float32:
        return torch.mm(weight, a.T, out_dtype=torch.float32)
    return weight.float() @ a.float().T
