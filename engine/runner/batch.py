"""From a plan to a `Batch`: which token of which row, where its KV goes, and which adapter it uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.layers.batch import Batch, KVView, LoraBatch
from engine.messages import Chunk
from engine.ops.attention import Backend, StepLengths
from engine.ops.layout import SEGMENT_TOKENS
from engine.runner.rows import RowTable
from engine.runner.transfer import upload

Touched = list[list[bool]]  # [layers + 1][groups]


def runs(slots: Sequence[int], counts: Sequence[int], most: int) -> tuple[list[int], list[int]]:
    """Segments (slots [S], starts [S + 1]) of consecutive sequences with equal slots, of at most `most` tokens."""
    of_runs: list[int] = []
    starts = [0]
    at = begin = 0
    for index, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        at += count
        if index + 1 < len(slots) and slots[index + 1] == slot:
            continue
        cuts = range(begin + most, at, most) if slot else ()
        for end in (*cuts, at):
            of_runs.append(slot)
            starts.append(end)
        begin = at
    return of_runs, starts


class Adapters:
    """What is in the arena, as the layers see it: the arena, its records, and what each slot touches."""

    def __init__(self, arena: Tensor, records: Tensor) -> None:
        self.arena, self.records = arena, records
        self.widths = [0] * records.shape[0]  # largest stacked rank of each slot
        self.touched: list[Touched] = [[] for _ in range(records.shape[0])]

    def placed(self, slot: int, width: int, touched: Touched) -> None:
        self.widths[slot], self.touched[slot] = width, touched

    def batch(self, slots: Sequence[int], counts: Sequence[int]) -> LoraBatch | None:
        """Segments of consecutive sequences with equal slots; `counts` are their tokens. None: all base."""
        used = {slot for slot in slots if slot}
        if not used:
            return None
        device = self.records.device
        of_runs, starts = runs(slots, counts, SEGMENT_TOKENS[device.type])
        layers = zip(*(self.touched[slot] for slot in used), strict=True)
        return LoraBatch(
            self.arena,
            self.records,
            upload(of_runs, torch.int32, device),
            upload(starts, torch.int32, device),
            max(self.widths[slot] for slot in used),
            [[any(group) for group in zip(*layer, strict=True)] for layer in layers],
        )


class Model(Protocol):
    def __call__(self, batch: Batch) -> Tensor: ...


class Step(NamedTuple):
    """A batch and the rows that are sampled after it."""

    batch: Batch
    rows: Tensor  # [n] int64
    lengths: Tensor  # [n] int64: known tokens of each, which is the position of the new one


class BatchBuilder:
    """Builds the batch of every step; parts that depend on membership alone are kept while it lasts."""

    def __init__(
        self, rows: RowTable, cache: Tensor, adapters: Adapters, attention: Backend
    ) -> None:
        self.rows, self.cache, self.adapters = rows, cache, adapters
        self.attention = attention
        self.block = cache.shape[3]
        self.decode: list[int] = []
        self.decode_lora: LoraBatch | None = None

    def set_decode(self, decode: list[int]) -> None:
        """The rows that advance by one token every step until the next call."""
        self.decode = decode
        slots = [self.rows.slots[row] for row in decode]
        self.decode_lora = self.adapters.batch(slots, [1] * len(decode))

    def build(self, chunks: list[Chunk]) -> Step:
        table, known = self.rows, self.rows.known
        num_decode = len(self.decode)
        row_list = self.decode + [chunk.row for chunk in chunks]
        count_list = [1] * num_decode + [chunk.count for chunk in chunks]
        first_list = [known[row] for row in self.decode] + [chunk.start for chunk in chunks]
        rows, first, counts = np.array(row_list), np.array(first_list), np.array(count_list)
        starts = np.concatenate([[0], counts.cumsum()])
        lengths = first + counts
        of_token = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(len(of_token)) - starts[of_token] + first[of_token]
        length_list = lengths.tolist()
        for row, length in zip(row_list, length_list, strict=True):
            known[row] = length
        sampled = [*range(num_decode)]
        sampled += [num_decode + i for i, chunk in enumerate(chunks) if chunk.sample]
        lora, lora_outputs, wanted = self._adapters(chunks, row_list, count_list, starts, sampled)
        parts = [rows[of_token], positions, rows, lengths, starts, rows[sampled], lengths[sampled]]
        packed = upload(np.concatenate([*parts, wanted]), torch.int64, table.device)
        split = packed.split([*map(len, parts), len(wanted)])
        token_rows, at, all_rows, all_lengths, all_starts, out_rows, out_lengths, outputs = split
        table.computed[all_rows] = all_lengths
        places = table.blocks[token_rows, at // self.block].long() * self.block + at % self.block
        tables = table.blocks[all_rows, : -(-max(length_list) // self.block)]
        in_cache = all_lengths.to(torch.int32)
        attend = self.attention.step(StepLengths(count_list, length_list), tables, in_cache)
        kv = KVView(self.cache, tables, all_starts.to(torch.int32), in_cache, places, attend)
        ids = table.tokens[token_rows, at].long()
        batch = Batch(ids, at, kv, lora, outputs if chunks else None, lora_outputs)
        return Step(batch, out_rows, out_lengths)

    def _adapters(
        self,
        chunks: list[Chunk],
        rows: list[int],
        counts: list[int],
        starts: np.ndarray,
        sampled: list[int],
    ) -> tuple[LoraBatch | None, LoraBatch | None, np.ndarray]:
        """LoRA over all tokens and over the wanted ones: the sampled first, then whole prompt chunks."""
        if not chunks:
            return self.decode_lora, self.decode_lora, np.empty(0, dtype=np.int64)
        slots = [self.rows.slots[row] for row in rows]
        wanted = [starts[1:][sampled] - 1]
        out_slots, out_counts = [slots[i] for i in sampled], [1] * len(sampled)
        for i, chunk in enumerate(chunks, len(self.decode)):
            if chunk.prompt_logprobs:
                wanted.append(np.arange(starts[i], starts[i + 1]))
                out_slots.append(slots[i])
                out_counts.append(chunk.count)
        lora = self.adapters.batch(slots, counts)
        return lora, self.adapters.batch(out_slots, out_counts), np.concatenate(wanted)
