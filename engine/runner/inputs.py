"""The host's description of a step: a few int32 words per sequence, in a layout that depends on the shape only.

Where a shape has more room than the step needs, the rest is padding: sequences of row 0 (scratch) before the rows that
decode; sequences of row 0 without tokens after the chunks; tokens of no sequence at the end; outputs that point to
token 0; empty segments of the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from torch import Tensor

from engine.messages import Chunk
from engine.runner.shapes import Shape

IN_TABLE = -1  # instead of a first position: the device reads it from its table
OFFSETS = {"cu_seqlens_q", "segment_starts", "output_segment_starts"}  # fields of rising offsets


class Inputs(NamedTuple):
    """The words of a step on the device, int32. S sequences, O outputs, G segments, H segments of the outputs."""

    rows: Tensor  # [S]
    first: Tensor  # [S]: position of the first new token, or IN_TABLE
    cu_seqlens_q: Tensor  # [S + 1]: first new token of each sequence
    outputs: Tensor  # [O]: tokens that are sampled, then those that are scored, then those that are pooled
    sampled_rows: Tensor  # [O]: the row of each output that is sampled
    sampled_lengths: Tensor  # [O]: its tokens so far, which is the position of the new one
    slots: Tensor  # [G]
    segment_starts: Tensor  # [G + 1]: first token of each
    output_slots: Tensor  # [H]
    output_segment_starts: Tensor  # [H + 1]: first output of each

    @classmethod
    def of(cls, words: Tensor, shape: Shape) -> Inputs:
        """The fields of a step of this shape, at the start of `words`."""
        sizes = shape.sizes
        fields = words[: shape.words].split(list(sizes.values()))
        return cls(**dict(zip(sizes, fields, strict=True)))


def runs(slots: Sequence[int], counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """(slots [G], starts [G + 1]) of the runs of consecutive sequences with equal slots."""
    run_slots: list[int] = []
    starts = [0]
    at = 0
    for index, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        at += count
        if index + 1 < len(slots) and slots[index + 1] == slot:
            continue
        run_slots.append(slot)
        starts.append(at)
    return run_slots, starts


class Description(NamedTuple):
    """A step in plain numbers: the rows that decode, sorted by slot, then chunks, sorted by slot."""

    decode: list[int]
    chunks: list[Chunk]
    slots: list[int]  # of each sequence
    decode_lengths: list[int]  # tokens of each decoding row after the step; []: the device knows

    @property
    def sampled(self) -> list[int]:
        """Sequences that sample their next token."""
        first = len(self.decode)
        chosen = [first + i for i, chunk in enumerate(self.chunks) if chunk.sample]
        return [*range(first), *chosen]

    @property
    def scored(self) -> list[int]:
        """Sequences that need logits for every token."""
        first = len(self.decode)
        return [first + i for i, chunk in enumerate(self.chunks) if chunk.scores]

    @property
    def pooled(self) -> list[int]:
        """Sequences that need the hidden state of every token."""
        first = len(self.decode)
        return [first + i for i, chunk in enumerate(self.chunks) if chunk.pooled]

    @property
    def num_logits(self) -> int:
        """Outputs that need logits: the sampled ones, then every token of the scored ones."""
        return sum(self._with_logits(self.slots, self.counts)[1])

    @property
    def counts(self) -> list[int]:
        """New tokens of each sequence."""
        return [1] * len(self.decode) + [chunk.count for chunk in self.chunks]

    @property
    def shape(self) -> Shape:
        """The shape of the step without padding."""
        decodes, chunks, counts = len(self.decode), len(self.chunks), self.counts
        outputs = 0
        if chunks:
            outputs = sum(self._with_logits(self.slots, counts)[1])
            outputs += sum(counts[s] for s in self.pooled)
        return Shape(decodes, chunks, sum(counts), outputs)

    def _with_logits(self, slots: list[int], counts: list[int]) -> tuple[list[int], list[int]]:
        """(slot, number of logits) of every sampled sequence, then of every scored one."""
        sampled, scored = self.sampled, self.scored
        out_counts = [1] * len(sampled) + [counts[s] for s in scored]
        return [slots[s] for s in (*sampled, *scored)], out_counts

    def words(self, shape: Shape) -> np.ndarray:
        """The fields of `Inputs` one after the other, int32, in the order of `Shape.sizes`."""
        front = [0] * (shape.decodes - len(self.decode))  # padding before the rows that decode
        back = [0] * (shape.chunks - len(self.chunks))  # padding after the chunks
        counts = [1] * len(front) + self.counts
        starts = [0, *accumulate(counts)]
        slots, segment_starts = runs(front + self.slots, counts)
        with_logits = self._with_logits(self.slots, self.counts) if shape.chunks else ([], [])
        output_slots, output_segment_starts = runs(*with_logits)
        outputs, sampled_rows, sampled_lengths = self._outputs(shape, starts[len(front) :])
        fields = {
            "rows": [*front, *self.decode, *(chunk.row for chunk in self.chunks), *back],
            "first": [IN_TABLE] * shape.decodes + [chunk.start for chunk in self.chunks] + back,
            "cu_seqlens_q": starts,
            "outputs": outputs,
            "sampled_rows": sampled_rows,
            "sampled_lengths": sampled_lengths,
            "slots": slots,
            "segment_starts": segment_starts,
            "output_slots": output_slots,
            "output_segment_starts": output_segment_starts,
        }
        words: list[int] = []
        for name, size in shape.sizes.items():
            field = fields[name]
            words += field
            padding = field[-1] if name in OFFSETS else 0  # empty sequences and segments
            words += [padding] * (size - len(field))
        return np.array(words, dtype=np.int32)

    def _outputs(self, shape: Shape, starts: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Outputs, and rows and lengths of the sampled ones; `starts`: first token of each sequence."""
        if not shape.chunks:
            return [], [], []
        outputs = [starts[s + 1] - 1 for s in self.sampled]
        for s in (*self.scored, *self.pooled):
            outputs += range(starts[s], starts[s + 1])
        new = [chunk for chunk in self.chunks if chunk.sample]
        rows = self.decode + [chunk.row for chunk in new]
        lengths = self.decode_lengths + [chunk.start + chunk.count for chunk in new]
        return outputs, rows, lengths
