"""Block tables in compressed rows, as FlashInfer reads them: indptr, indices and last page lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pages(NamedTuple):
    """Sequence s owns the pages `indices[indptr[s] : indptr[s + 1]]`. Its last page holds `last[s]` positions."""

    indptr: Tensor  # [S + 1] int32
    indices: Tensor  # [S * blocks of the longest sequence + 1] int32; the end is not defined
    last: Tensor  # [S] int32, 1 to block_size

    @classmethod
    def empty(cls, rows: int, blocks: int, device: torch.device) -> Pages:
        """Room for `rows` sequences of up to `blocks` pages."""
        return cls(
            torch.zeros(rows + 1, dtype=torch.int32, device=device),
            torch.zeros(rows * blocks + 1, dtype=torch.int32, device=device),
            torch.ones(rows, dtype=torch.int32, device=device),
        )

    def first(self, rows: int) -> Pages:
        """The same memory for fewer sequences."""
        return Pages(self.indptr[: rows + 1], self.indices, self.last[:rows])

    def fill(self, block_tables: Tensor, context_lens: Tensor, block_size: int) -> None:
        """Fills the arrays from `block_tables` [S, blocks] and `context_lens` [S], int32 and above 0.

        It runs on the device, so a graph may hold it.
        """
        counts = (context_lens + (block_size - 1)) // block_size
        torch.cumsum(counts, 0, dtype=torch.int32, out=self.indptr[1:])
        column = torch.arange(block_tables.shape[1], dtype=torch.int32, device=block_tables.device)
        target = self.indptr[:-1, None] + column
        # entries past a sequence's end go to the last element, which nothing reads
        target = target.masked_fill(column >= counts[:, None], len(self.indices) - 1)
        self.indices.scatter_(0, target.flatten().long(), block_tables.flatten())
        torch.sub(context_lens, (counts - 1) * block_size, out=self.last)
