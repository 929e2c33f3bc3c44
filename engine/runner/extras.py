"""Makes the extras of a placed image final: they depend on the base weights, which only the runner has.

DoRA (Liu et al. 2024, arXiv 2402.09353) scales each output by `magnitude / |W + s B A|`, the norm over the inputs. A
quantised base counts with its dequantised weights, in float32. The base's bias is not scaled, so with the scale m and
the base's bias c, y = x W.T + c + s x A.T B.T becomes `m y + (c - m c)`; a trained bias replaces the first c.
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

PIECE_WEIGHTS = 4 << 20  # base weights that are read at once; they take four times as many bytes
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
        self._kept: OrderedDict[bytes, list[Tensor]] = OrderedDict()
        self._kept_bytes = 0

    @torch.inference_mode()
    def finish(self, records: Tensor, digest: bytes) -> Iterator[int]:
        """Makes all extras of an image final, where `records` [layers + 1, groups, 8] (on the host) say that they lie.

        Yields the number of base weights that were read after every piece of work.
        """
        groups = list(self._groups(records))
        rows = [row for group in groups for row in self._rows(group) if row is not None]
        kept = self._kept.get(digest)
        if kept is not None:
            self._kept.move_to_end(digest)
            for row, final in zip(rows, kept, strict=True):
                row.copy_(final, non_blocking=True)
            yield 0
            return
        for group in groups:
            yield from self._finish(group)
        self._keep(digest, rows)

    def _groups(self, records: Tensor) -> Iterator[_Group]:
        flags = records[..., WORD_RANK2] & (EXTRAS << FLAGS_SHIFT)
        for layer, number in flags.nonzero().tolist():
            record = records[layer, number].contiguous()
            yield _Group(
                self._bases[layer, number],
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
                step = max(1, PIECE_WEIGHTS // a.shape[1])
                for first in range(0, n, step):
                    part = slice(column + first, min(column + first + step, end))
                    # a copy in any dtype: the sum is written into it
                    weight = group.base.weight_rows(part).to(torch.float32, copy=True)
                    of_part = b[:, first : first + step].float()
                    weight.addmm_(of_part.T, a, alpha=group.scales[target])
                    norm = torch.linalg.vector_norm(weight, dim=1)
                    scale[part] /= norm.clamp_(min=torch.finfo(torch.float32).tiny)
                    yield weight.numel()
            b_offset += rank * padded(n * self._dtype.itemsize) // ALIGN
            row, column = row + rank, end

    def _pair(
        self, group: _Group, row: int, rank: int, n: int, b_offset: int
    ) -> tuple[Tensor, Tensor]:
        """A [r, K] float32 and B [r, n] of a target; `row`: its first rank in A."""
        b = matrix(self._arena, b_offset, rank, n, self._dtype)
        k = group.base.weight_rows(slice(0, 1)).shape[1]
        if group.embedding:
            return matrix(self._arena, group.words[WORD_A], k, rank, self._dtype).T.float(), b
        a = matrix(self._arena, group.words[WORD_A], sum(group.ranks), k, self._dtype)
        return a[row : row + rank].float(), b

    def _keep(self, digest: bytes, rows: Sequence[Tensor]) -> None:
        pin = self._arena.is_cuda
        kept = [torch.empty(row.shape, dtype=row.dtype, pin_memory=pin) for row in rows]
        for final, row in zip(kept, rows, strict=True):
            final.copy_(row, non_blocking=True)
        self._kept[digest] = kept
        self._kept_bytes += sum(row.nbytes for row in kept)
        while self._kept_bytes > KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= sum(row.nbytes for row in oldest)
