"""Per-row state on the device, edited by the deltas of a plan: admit, extend, release. Row 0 is scratch."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.messages import Admit, SamplingParams
from engine.runner.transfer import upload

GREEDY = SamplingParams()


class RowTable:
    """Row -> known tokens, how many are computed, KV blocks, slot, sampling parameters."""

    def __init__(
        self, num_rows: int, max_tokens: int, max_blocks: int, device: torch.device
    ) -> None:
        """`num_rows` counts the scratch row; `max_tokens` and `max_blocks` bound one row."""
        self.tokens = torch.zeros(num_rows, max_tokens + 1, dtype=torch.int32, device=device)
        self.blocks = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)
        self.computed = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.prompt_lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.known = [0] * num_rows  # `computed`, as the host counts it
        self.slots = [0] * num_rows
        self.params = [GREEDY] * num_rows
        self.num_blocks = [0] * num_rows
        self.device = device

    def admit(self, admit: Admit) -> None:
        row = admit.row
        self.tokens[row, : len(admit.tokens)] = upload(admit.tokens, torch.int32, self.device)
        self.computed[row] = self.known[row] = admit.computed
        self.prompt_lengths[row] = admit.prompt_length
        self.slots[row] = admit.slot
        self.params[row] = admit.sampling
        self.num_blocks[row] = 0
        self.extend(row, admit.blocks)

    def extend(self, row: int, blocks: list[int]) -> None:
        if blocks:
            first = self.num_blocks[row]
            new = upload(blocks, torch.int32, self.device)
            self.blocks[row, first : first + len(blocks)] = new
            self.num_blocks[row] = first + len(blocks)

    def release(self, row: int) -> None:
        """The row is free; its block table points at the scratch block again."""
        self.blocks[row, : self.num_blocks[row]] = 0
        self.num_blocks[row] = 0
        self.slots[row] = 0
        self.params[row] = GREEDY

    def store(self, rows: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Writes sampled tokens [n] at `positions` [n] of `rows` [n]."""
        self.tokens[rows, positions] = tokens.to(torch.int32)
