"""Decode steps as CUDA graphs: captured once at start, replayed for any rows, adapters, ranks and targets.

A graph reads the rows of the step and their adapters from tensors at fixed addresses, gathers their state from the row
table, runs the model and counts each row one position on. It ends at the logits; sampling is launched behind it. Rows
that fill a bucket up are row 0, the scratch row, with the base model.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.layers.batch import Batch, KVView, LoraBatch
from engine.ops.layout import SEGMENT_TOKENS
from engine.runner.batch import Adapters, Model, Step, Touched, runs
from engine.runner.rows import RowTable
from engine.runner.transfer import upload

logger = logging.getLogger(__name__)

# What a captured step does for adapters: nothing, linears of the layers, or embedding and head too.
NO_LORA, IN_LAYERS, EVERYWHERE = range(3)


def buckets(max_rows: int) -> list[int]:
    """Batch sizes to capture, rising to `max_rows`."""
    sizes = [1, 2, 4, *range(8, min(max_rows, 128), 8), *range(128, max_rows, 32)]
    return sorted({size for size in sizes if size < max_rows} | {max_rows})


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    step: Step
    logits: Tensor  # [bucket, vocab] float32


class DecodeGraphs:
    """The graphs of every bucket, with and without adapters."""

    def __init__(
        self, model: Model, rows: RowTable, cache: Tensor, adapters: Adapters, width: int
    ) -> None:
        """`width`: the largest stacked rank that an adapter may have."""
        self.model, self.table, self.cache, self.adapters = model, rows, cache, adapters
        self.width = width
        device, max_rows = rows.device, len(rows.known) - 1
        self.sizes = buckets(max_rows)
        self.rows = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.slots = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.starts = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        self.kv_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self.captured: dict[tuple[int, int], _Captured] = {}
        self.kind = NO_LORA
        self.size = 0
        self.count = 0

    @torch.inference_mode()
    def capture(self) -> None:
        """Captures every graph; takes seconds."""
        started = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        kinds = (NO_LORA, IN_LAYERS, EVERYWHERE) if self.adapters.arena.numel() else (NO_LORA,)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate what they need before a capture
            for kind in kinds:
                self._run(self.sizes[-1], kind)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        for size in reversed(self.sizes):  # the largest first: the others fit into its memory
            for kind in kinds:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    step, logits = self._run(size, kind)
                self.captured[size, kind] = _Captured(graph, step, logits)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        logger.info("captured %d decode graphs in %.1f s", len(self.captured), seconds)

    def _run(self, size: int, kind: int) -> tuple[Step, Tensor]:
        """One decode step over the first `size` of `rows`, on the current stream."""
        table, block = self.table, self.cache.shape[3]
        rows = self.rows[:size]
        positions = table.computed[rows]
        lengths = positions + 1
        tables = table.blocks[rows]
        at = tables.gather(1, (positions // block)[:, None]).squeeze(1).long()
        kv = KVView(
            self.cache,
            tables,
            self.kv_starts[: size + 1],
            lengths.to(torch.int32),
            at * block + positions % block,
        )
        lora = self._lora(size, kind)
        ids = table.tokens[rows, positions].long()
        logits = self.model(Batch(ids, positions, kv, lora, None, lora))
        table.computed[rows] = lengths
        table.computed[:1].zero_()
        return Step(Batch(ids, positions, kv, lora, None, lora), rows, lengths), logits

    def _lora(self, size: int, kind: int) -> LoraBatch | None:
        if kind == NO_LORA:
            return None
        layers, groups = self.adapters.records.shape[1:3]
        touched = [[True] * groups] * (layers - 1) + [[kind == EVERYWHERE] * groups]
        arena, records = self.adapters.arena, self.adapters.records
        starts = self.starts[: size + 1]
        slots = self.slots[:size]
        return LoraBatch(arena, records, slots, starts, self.width, touched)

    def set_decode(self, decode: list[int], slots: list[int]) -> None:
        """The rows of the next steps, sorted by slot."""
        self.count = len(decode)
        if not decode:
            return
        self.size = self.sizes[bisect_left(self.sizes, self.count)]
        padding = self.size - self.count
        rows = [0] * padding + decode
        device = self.table.device
        self.rows[: self.size].copy_(upload(rows, torch.int64, device))
        used = {slot for slot in slots if slot}
        self.kind = self._kind([self.adapters.touched[slot] for slot in used])
        if used:
            of_runs, starts = runs([0] * padding + slots, [1] * self.size, SEGMENT_TOKENS["cuda"])
            missing = self.size - len(of_runs)
            self.slots[: self.size].copy_(upload(of_runs + [0] * missing, torch.int32, device))
            ends = starts + [self.size] * missing
            self.starts[: self.size + 1].copy_(upload(ends, torch.int32, device))

    @staticmethod
    def _kind(touched: list[Touched]) -> int:
        if not touched:
            return NO_LORA
        return EVERYWHERE if any(any(one[-1]) for one in touched) else IN_LAYERS

    def replay(self, decode: list[int]) -> tuple[Step, Tensor]:
        """Starts the step; returns it with the logits of its rows, which the next replay overwrites."""
        captured = self.captured[self.size, self.kind]
        captured.graph.replay()
        for row in decode:
            self.table.known[row] += 1
        first, step = self.size - self.count, captured.step
        return step._replace(rows=step.rows[first:], lengths=step.lengths[first:]), captured.logits[
            first:
        ]
