"""From a plan to a `Batch`: which token of which row, where its KV goes, and which adapter it uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.layers.batch import Batch, KVView, LoraBatch
from engine.messages import Chunk
from engine.runner.rows import RowTable


class Adapters:
    """What is in the arena, as the layers see it: the arena, its records, and what each slot touches."""

    def __init__(self, arena: Tensor, records: Tensor) -> None:
        self.arena, self.records = arena, records
        self.widths = [0] * records.shape[0]  # largest stacked rank of each slot

    def placed(self, slot: int, width: int) -> None:
        self.widths[slot] = width

    def batch(self, slots: Sequence[int], counts: Sequence[int]) -> LoraBatch | None:
        """Segments of consecutive sequences with equal slots; `counts` are their tokens. None: all base."""
        if not any(slots):
            return None
        runs: list[list[int]] = []
        for slot, count in zip(slots, counts, strict=True):
            if runs and runs[-1][0] == slot:
                runs[-1][1] += count
            else:
                runs.append([slot, count])
        device = self.records.device
        starts = [0]
        for _, count in runs:
            starts.append(starts[-1] + count)
        of_runs = torch.tensor([slot for slot, _ in runs], dtype=torch.int32, device=device)
        used = sorted({slot for slot, _ in runs if slot})
        ranks = self.records[used, :, :, 3:5]
        return LoraBatch(
            self.arena,
            self.records,
            of_runs,
            torch.tensor(starts, dtype=torch.int32, device=device),
            max(self.widths[slot] for slot in used),
            (ranks != 0).any(-1).any(0).tolist(),
        )


class BatchBuilder:
    """Builds the batch of every step; parts that depend on membership alone are kept while it lasts."""

    def __init__(self, rows: RowTable, cache: Tensor, adapters: Adapters) -> None:
        self.rows, self.cache, self.adapters = rows, cache, adapters
        self.block = cache.shape[3]
        self.decode: list[int] = []
        self.decode_lora: LoraBatch | None = None

    def set_decode(self, decode: list[int]) -> None:
        """The rows that advance by one token every step until the next call."""
        self.decode = decode
        slots = [self.rows.slots[row] for row in decode]
        self.decode_lora = self.adapters.batch(slots, [1] * len(decode))

    def build(self, chunks: list[Chunk]) -> tuple[Batch, Tensor]:
        """The batch, and the row of each sequence [S] int64."""
        table, device = self.rows, self.rows.device
        decode = self.decode
        row_list = decode + [chunk.row for chunk in chunks]
        rows = torch.tensor(row_list, dtype=torch.int64, device=device)
        counts_list = [1] * len(decode) + [chunk.count for chunk in chunks]
        first = table.computed[rows]
        if chunks:
            planned = [chunk.start for chunk in chunks]
            first[len(decode) :] = torch.tensor(planned, dtype=torch.int64, device=device)
        counts = torch.tensor(counts_list, dtype=torch.int64, device=device)
        ends = counts.cumsum(0)
        starts = torch.zeros(len(row_list) + 1, dtype=torch.int64, device=device)
        starts[1:] = ends
        of_token = torch.repeat_interleave(counts)
        positions = (
            torch.arange(of_token.shape[0], device=device) - starts[of_token] + first[of_token]
        )
        token_rows = rows[of_token]
        lengths = first + counts
        places = table.blocks[token_rows, positions // self.block] * self.block
        kv = KVView(
            self.cache,
            table.blocks[rows, : (int(lengths.max()) + self.block - 1) // self.block],
            starts.to(torch.int32),
            lengths.to(torch.int32),
            places.long() + positions % self.block,
        )
        table.computed[rows] = lengths
        lora, lora_outputs, outputs = self._adapters(chunks, row_list, counts_list, ends)
        ids = table.tokens[token_rows, positions].long()
        return Batch(ids, positions, kv, lora, outputs, lora_outputs), rows

    def _adapters(
        self, chunks: list[Chunk], rows: list[int], counts: list[int], ends: Tensor
    ) -> tuple[LoraBatch | None, LoraBatch | None, Tensor | None]:
        """LoRA over all tokens and over the wanted ones: the sampled first, then whole prompt chunks."""
        if not chunks:
            return self.decode_lora, self.decode_lora, None
        slots = [self.rows.slots[row] for row in rows]
        lora = self.adapters.batch(slots, counts)
        num_decode = len(self.decode)
        sampled = [*range(num_decode)]
        sampled += [num_decode + i for i, chunk in enumerate(chunks) if chunk.sample]
        wanted = [ends[sampled] - 1]
        out_slots, out_counts = [slots[i] for i in sampled], [1] * len(sampled)
        for i, chunk in enumerate(chunks, num_decode):
            if chunk.prompt_logprobs:
                end = int(ends[i])
                wanted.append(torch.arange(end - chunk.count, end, device=ends.device))
                out_slots.append(slots[i])
                out_counts.append(chunk.count)
        return lora, self.adapters.batch(out_slots, out_counts), torch.cat(wanted)
