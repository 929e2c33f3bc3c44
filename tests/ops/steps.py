"""Random row tables and steps over them, for the tests of the ops around a step."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

BLOCK, BLOCKS = 4, 9


@dataclass(frozen=True)
class Step:
    """Arguments of `prepare_step_`."""

    computed: Tensor
    tokens: Tensor
    blocks: Tensor
    rows: Tensor
    first: Tensor
    cu_seqlens_q: Tensor
    num_tokens: int
    block_size: int = BLOCK
    max_blocks: int = BLOCKS

    @property
    def arguments(self) -> list[object]:
        return [getattr(self, field.name) for field in fields(self)]

    def to(self, device: str) -> Step:
        """A copy, with the row table in one tensor, a row after the other, as the engine has it."""
        table = torch.cat([self.tokens, self.blocks, self.computed[:, None]], 1).to(device)
        cut = self.tokens.shape[1]
        own = {
            "tokens": table[:, :cut],
            "blocks": table[:, cut : cut + BLOCKS],
            "computed": table[:, -1],
        }
        own |= {name: getattr(self, name).to(device) for name in ("rows", "first", "cu_seqlens_q")}
        return replace(self, **own)  # type: ignore[arg-type]


def random_step(num_rows: int = 12) -> Step:
    """Padding and decoding rows, then chunks, some without tokens, then padding tokens; row 0 is scratch."""
    tokens = torch.randint(1, 1000, (num_rows, BLOCK * BLOCKS), dtype=torch.int32)
    blocks = torch.randint(1, 500, (num_rows, BLOCKS), dtype=torch.int32)
    computed = torch.randint(0, BLOCK * BLOCKS, (num_rows,), dtype=torch.int32)
    tokens[0], blocks[0], computed[0] = 0, 0, 0
    rows = random.sample(range(1, num_rows), random.randint(0, num_rows - 1))
    decodes = random.randint(0, len(rows))
    all_rows, first, counts = [0] * random.randint(0, 3), [], []
    first, counts = [-1] * len(all_rows), [1] * len(all_rows)
    for i, row in enumerate(rows):
        start = random.randint(0, BLOCK * BLOCKS - 1)
        all_rows.append(row)
        first.append(-1 if i < decodes else start)
        counts.append(1 if i < decodes else random.randint(1, BLOCK * BLOCKS - start))
    padding = random.randint(0 if all_rows else 1, 3)
    all_rows, first, counts = (
        all_rows + [0] * padding,
        first + [0] * padding,
        counts + [0] * padding,
    )
    cu_seqlens_q = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Step(
        computed,
        tokens,
        blocks,
        torch.tensor(all_rows, dtype=torch.int32),
        torch.tensor(first, dtype=torch.int32),
        cu_seqlens_q,
        int(cu_seqlens_q[-1]) + random.randint(0, 5),
    )


def by_hand(step: Step) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """(ids, positions and slot_mapping; the used part of each table; computed afterwards), one token at a time."""
    ids, positions, slot_mapping, block_tables = [], [], [], []
    computed = step.computed.tolist()
    for s, (row, first) in enumerate(zip(step.rows.tolist(), step.first.tolist(), strict=True)):
        at = computed[row] if first < 0 else first
        for _ in range(int(step.cu_seqlens_q[s + 1] - step.cu_seqlens_q[s])):
            ids.append(int(step.tokens[row, at]))
            positions.append(at)
            slot_mapping.append(int(step.blocks[row, at // BLOCK]) * BLOCK + at % BLOCK)
            at += 1
        block_tables.append(step.blocks[row, : -(-at // BLOCK)].tolist())
        computed[row] = at if row else 0
    padding = [0] * (step.num_tokens - len(ids))
    return [ids + padding, positions + padding, slot_mapping + padding], block_tables, computed


def used(block_tables: Tensor, context_lens: Tensor) -> list[list[int]]:
    """The part of each table that is defined."""
    blocks = [-(-length // BLOCK) for length in context_lens.tolist()]
    return [table[:n] for table, n in zip(block_tables.tolist(), blocks, strict=True)]
