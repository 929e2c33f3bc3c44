"""From a plan to a `Batch`: the tokens of the step, where their KV goes, and which adapters they use.

The host describes the step (`engine.runner.inputs`) and the device expands the description: `prepare_step_` gathers
what the layers need from the row table. A CUDA graph starts with `prepare_step_`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial, reduce
from operator import or_
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.layers.batch import Batch, KVView, LoraBatch
from engine.messages import Chunk
from engine.ops.attention import AttentionBackend, Prepare, StepLengths
from engine.ops.layout import PAIRS
from engine.runner.inputs import Description, Inputs
from engine.runner.rows import RowTable
from engine.runner.shapes import Shape, decode_words

ops = torch.ops.lorax

Touched = list[list[int]]  # [layers + 1][groups]: PAIRS, RESCALES and REPLACES, combined

# Where a step runs the ops of pairs: nowhere, in the linears of the layers, or in embedding and head too.
# EVERYTHING runs the ops of extras and own rows as well.
NO_LORA, IN_LAYERS, EVERYWHERE, EVERYTHING = range(4)


class Reach(NamedTuple):
    """What the adapters of a step can do."""

    stacked_rank: int  # the largest stacked rank
    touched: Touched  # by any of the adapters


class Adapters:
    """The adapters in the arena, as the layers see them: the arena, its records, and what each slot touches."""

    def __init__(self, arena: Tensor, records: Tensor) -> None:
        self.arena, self.records = arena, records
        self.stacked_ranks = [0] * records.shape[0]  # largest stacked rank of each slot
        self.touched: list[Touched] = [[] for _ in range(records.shape[0])]
        self.kinds = [NO_LORA] * records.shape[0]

    def placed(self, slot: int, stacked_rank: int, touched: Touched) -> None:
        self.stacked_ranks[slot], self.touched[slot] = stacked_rank, touched
        if any(does & ~PAIRS for layer in touched for does in layer):
            self.kinds[slot] = EVERYTHING
        else:
            self.kinds[slot] = EVERYWHERE if any(touched[-1]) else IN_LAYERS

    def reach(self, slots: Iterable[int]) -> Reach | None:
        """What all adapters in `slots` can do together. None: all slots are the base model."""
        used = {slot for slot in slots if slot}
        if not used:
            return None
        layers = zip(*(self.touched[slot] for slot in used), strict=True)
        touched = [[reduce(or_, group) for group in zip(*layer, strict=True)] for layer in layers]
        return Reach(max(self.stacked_ranks[slot] for slot in used), touched)

    def batch(self, slots: Tensor, segment_starts: Tensor, reach: Reach | None) -> LoraBatch | None:
        """The layers' view of the segments `slots` [G], `segment_starts` [G + 1]."""
        if reach is None:
            return None
        return LoraBatch(self.arena, self.records, slots, segment_starts, *reach)


class Model(Protocol):
    """What the runner asks of a decoder: logits, or, where vectors are wanted too, its parts."""

    @property
    def heads(self) -> Mapping[str, Callable[[Tensor], Tensor]]: ...

    def __call__(self, batch: Batch) -> Tensor: ...

    def body(self, batch: Batch) -> Tensor: ...

    def logits(self, hidden: Tensor, batch: Batch) -> Tensor: ...


class Step(NamedTuple):
    """A batch, and the rows that are sampled after it. More rows may follow for padding and scored tokens."""

    batch: Batch
    rows: Tensor  # [n] int32
    lengths: Tensor  # [n] int32: known tokens of each row, which is the position of the new token


class BatchBuilder:
    """Describes steps and expands their descriptions. The decoding rows are described only when they change."""

    def __init__(
        self, rows: RowTable, cache: Tensor, adapters: Adapters, attention: AttentionBackend
    ) -> None:
        self.rows, self.cache, self.adapters = rows, cache, adapters
        self.attention = attention
        self.block_size = cache.shape[3]
        # where in the spare words the inputs of steps with chunks start
        self.mixed_at = decode_words(len(rows.num_computed) - 1)
        self.decode = Description([], [], [], [])
        # of the last step that was built
        self._reached: tuple[Description, Reach | None] = (self.decode, None)
        # of the last step that only decodes
        self._written: tuple[Description, Shape] | None = None

    def set_decode(self, rows: list[int]) -> None:
        """Sets the rows that advance by one token in every step until the next call."""
        self.decode = Description(rows, [], [self.rows.slots[row] for row in rows], [])

    def describe(self, chunks: list[Chunk]) -> Description:
        """Describes the next step."""
        if not chunks:
            return self.decode
        decode = self.decode.decode
        slots = self.decode.slots + [self.rows.slots[chunk.row] for chunk in chunks]
        return Description(
            decode, chunks, slots, [self.rows.num_computed[row] + 1 for row in decode]
        )

    def advance(self, description: Description) -> None:
        """Adds the positions that the step computes to the host's count."""
        num_computed = self.rows.num_computed
        for row in description.decode:
            num_computed[row] += 1
        for chunk in description.chunks:
            num_computed[chunk.row] = chunk.start + chunk.count

    def inputs(self, shape: Shape) -> Inputs:
        """The inputs of a step of this shape on the device. Their address depends on the shape only."""
        return Inputs.of(self.rows.spare[self.mixed_at if shape.chunks else 0 :], shape)

    def write(self, description: Description, shape: Shape) -> None:
        """Writes the inputs of the step, for the next `send`, unless they are already there."""
        if shape.chunks:
            at = self.rows.spare_at + self.mixed_at
            self.rows.words.write(at, description.words(shape))
        elif not self._is_written(description, shape):
            self.rows.words.write(self.rows.spare_at, description.words(shape))
            self._written = (description, shape)

    def _is_written(self, description: Description, shape: Shape) -> bool:
        written = self._written
        return written is not None and written[0] is description and written[1] == shape

    def build(self, description: Description) -> Step:
        """The step without padding. Sends its inputs."""
        shape = description.shape
        self.write(description, shape)
        self.rows.words.send()
        if self._reached[0] is not description:
            self._reached = (description, self.adapters.reach(description.slots))
        context_lens = self._context_lens(description)
        prepare = partial(self.attention.step, StepLengths(description.counts, context_lens))
        return self.expand(shape, max(context_lens), self._reached[1], prepare)

    def _context_lens(self, description: Description) -> list[int]:
        """Positions of each sequence after the step."""
        num_computed = self.rows.num_computed
        of_decodes = [num_computed[row] + 1 for row in description.decode]
        return of_decodes + [chunk.start + chunk.count for chunk in description.chunks]

    def expand(self, shape: Shape, longest: int, reach: Reach | None, prepare: Prepare) -> Step:
        """The step whose inputs were sent. Adds its tokens to `computed`. `longest`: no sequence has more positions."""
        table, inputs = self.rows, self.inputs(shape)
        ids, positions, slot_mapping, block_tables, context_lens = ops.prepare_step_(
            table.computed,
            table.tokens,
            table.blocks,
            inputs.rows,
            inputs.first,
            inputs.cu_seqlens_q,
            shape.tokens,
            self.block_size,
            -(-longest // self.block_size),
        )
        kv = KVView(
            cache=self.cache,
            block_tables=block_tables,
            cu_seqlens_q=inputs.cu_seqlens_q,
            context_lens=context_lens,
            slot_mapping=slot_mapping,
            num_decodes=shape.decodes,
            attend=prepare(block_tables, context_lens),
        )
        lora = self.adapters.batch(inputs.slots, inputs.segment_starts, reach)
        outputs, lora_outputs = None, lora
        rows, lengths = inputs.rows, context_lens
        if shape.chunks:
            outputs = inputs.outputs
            lora_outputs = self.adapters.batch(
                inputs.output_slots, inputs.output_segment_starts, reach
            )
            rows, lengths = inputs.sampled_rows, inputs.sampled_lengths
        batch = Batch(
            ids=ids,
            positions=positions,
            kv=kv,
            lora=lora,
            outputs=outputs,
            lora_outputs=lora_outputs,
        )
        return Step(batch, rows, lengths)
