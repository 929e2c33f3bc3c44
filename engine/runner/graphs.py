"""Steps as CUDA graphs: captured once at start, replayed for any rows, adapters, ranks and targets.

A graph reads the inputs of its step from words at fixed addresses, gathers the state of the rows from the row table,
runs the model and writes the logits to one buffer that all graphs share. Sampling is launched after it. There is a
graph for every shape and for each of NO_LORA, IN_LAYERS, EVERYWHERE and EVERYTHING. An attention backend's plan is
copied to the device before a replay. Steps that fit no shape are launched kernel by kernel: they keep the GPU busy for
longer than the host needs to launch them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from itertools import chain, product, repeat

import torch
from torch import Tensor

from engine.ops.layout import PAIRS, REPLACES, RESCALES
from engine.runner.batch import (
    EVERYTHING,
    EVERYWHERE,
    IN_LAYERS,
    NO_LORA,
    BatchBuilder,
    Model,
    Reach,
    Step,
)
from engine.runner.inputs import Description
from engine.runner.shapes import Shape, decode_shapes, mixed_shapes

logger = logging.getLogger(__name__)

NOTHING = Description([], [], [], [])  # a step of padding


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, and its results at fixed addresses."""

    graph: torch.cuda.CUDAGraph
    shape: Shape
    rows: Tensor  # as in `Step`
    lengths: Tensor
    vocab: int  # columns of the logits


class StepGraphs:
    """The graphs of every shape, with and without adapters."""

    def __init__(
        self, model: Model, builder: BatchBuilder, stacked_rank: int, max_tokens: int
    ) -> None:
        """`stacked_rank`: the largest stacked rank that an adapter may have; `max_tokens`: of a step."""
        self.model, self.builder = model, builder
        max_rows = len(builder.rows.num_computed) - 1
        self.decode_shapes = decode_shapes(max_rows)
        attention = builder.attention
        self.mixed_shapes = mixed_shapes(max_rows, max_tokens) if attention.captures_chunks else []
        self.attention = {shape: attention.captured(shape.decodes) for shape in self.shapes}
        layers, groups = builder.adapters.records.shape[1:3]
        self.reaches: dict[int, Reach | None] = {NO_LORA: None}
        if builder.adapters.arena.numel():
            for kind, inside, ends in (
                (IN_LAYERS, PAIRS, 0),
                (EVERYWHERE, PAIRS, PAIRS),
                (EVERYTHING, PAIRS | RESCALES, PAIRS | RESCALES | REPLACES),
            ):
                touched = [[inside] * groups] * (layers - 1) + [[ends] * groups]
                self.reaches[kind] = Reach(stacked_rank, touched)
        self.captured: dict[tuple[Shape, int], Captured] = {}
        self.logits: Tensor | None = None  # [largest O, largest vocab], of the graph that ran last
        self._found: tuple[Description, Captured | None] | None = None

    @property
    def shapes(self) -> list[Shape]:
        """The largest shape first: the graphs of all others fit into its memory."""
        return sorted([*self.decode_shapes, *self.mixed_shapes], key=lambda shape: -shape.tokens)

    @torch.inference_mode()
    def capture(self) -> None:
        """Captures every graph; takes seconds."""
        started, free = time.perf_counter(), torch.cuda.mem_get_info()[0]
        pool, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self._warm_up(side, [self.decode_shapes[-1], self.shapes[0]])
        for shape in self.shapes:
            self._plan(shape, NOTHING)
            for kind in self.reaches:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=side):
                    step, vocab = self._run(shape, kind)
                self.captured[shape, kind] = Captured(graph, shape, step.rows, step.lengths, vocab)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        mib = (free - torch.cuda.mem_get_info()[0]) >> 20
        logger.info("captured %d graphs in %.1f s, %d MiB", len(self.captured), seconds, mib)

    def _warm_up(self, side: torch.cuda.Stream, shapes: list[Shape]) -> None:
        """Runs steps of padding on the stream of the captures, so that libraries allocate their buffers before."""
        outputs = max(shape.outputs or shape.tokens for shape in self.shapes)
        for shape, kind in product(shapes, reversed(self.reaches)):  # the widest logits first
            self.builder.write(NOTHING, shape)
            self.builder.rows.words.send()
            self._plan(shape, NOTHING)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                if self.logits is None:
                    logits = self._logits(shape, kind)[1]
                    self.logits = torch.empty(
                        outputs, logits.shape[1], dtype=logits.dtype, device=logits.device
                    )
                self._run(shape, kind)
            torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

    def _logits(self, shape: Shape, kind: int) -> tuple[Step, Tensor]:
        table = self.builder.rows
        most = table.blocks.shape[1] * self.builder.block_size
        prepare = self.attention[shape].attend
        step = self.builder.expand(shape, most, self.reaches[kind], prepare)
        return step, self.model(step.batch)

    def _plan(self, shape: Shape, description: Description) -> None:
        """Plans the attention of the shape's graphs for the lengths of the decoding rows. Padding has one position."""
        num_computed = self.builder.rows.num_computed
        padding = shape.decodes - len(description.decode)
        context_lens = (num_computed[row] + 1 for row in description.decode)
        self.attention[shape].plan(chain(repeat(1, padding), context_lens))

    def _run(self, shape: Shape, kind: int) -> tuple[Step, int]:
        """One step on the current stream. Returns it, and the columns of its logits."""
        step, logits = self._logits(shape, kind)
        assert self.logits is not None
        outputs, vocab = logits.shape
        self.logits[:outputs, :vocab].copy_(logits)
        return step, vocab

    def find(self, description: Description) -> Captured | None:
        """The graph that the step is padded to; None if it fits no graph."""
        if self._found is None or self._found[0] is not description:
            self._found = (description, self._fitting(description))
        return self._found[1]

    def _fitting(self, description: Description) -> Captured | None:
        if description.scored or description.pooled:
            return None
        needed = description.shape
        shapes = self.mixed_shapes if description.chunks else self.decode_shapes
        shape = next((shape for shape in shapes if shape.holds(needed)), None)
        return None if shape is None else self.captured[shape, self._kind(description)]

    def _kind(self, description: Description) -> int:
        kinds = self.builder.adapters.kinds
        return max((kinds[slot] for slot in description.slots), default=NO_LORA)

    def replay(self, captured: Captured, description: Description) -> tuple[Tensor, Tensor, Tensor]:
        """Starts the step. Returns rows, lengths and logits of the sampled tokens, valid until the next replay."""
        self.builder.write(description, captured.shape)
        self.builder.rows.words.send()
        self._plan(captured.shape, description)
        captured.graph.replay()
        assert self.logits is not None
        shape, count = captured.shape, len(description.sampled)
        first = 0 if shape.chunks else shape.decodes - count  # after the padding
        part = slice(first, first + count)
        logits = self.logits[part, : captured.vocab]
        return captured.rows[part], captured.lengths[part], logits
