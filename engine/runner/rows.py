"""Per-row state on the device. A plan edits it by deltas: admit, extend, release. Row 0 is scratch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.kinds import GENERATE
from engine.messages import Admit, SamplingParams
from engine.runner.transfer import device_words

GREEDY = SamplingParams()


class RowTable:
    """Row -> known tokens, number of computed positions, KV blocks, slot, sampling parameters.

    The device's part is in `words`, row after row. After the rows come `spare` words for the inputs of steps, so that
    one launch applies everything that the host changes before a step.
    """

    def __init__(
        self,
        num_rows: int,
        max_tokens: int,
        max_blocks: int,
        device: torch.device,
        spare: int = 0,
    ) -> None:
        """`num_rows` counts the scratch row; `max_tokens` and `max_blocks` bound one row."""
        self.device = device
        self._blocks_at = max_tokens + 1
        self._computed_at = self._blocks_at + max_blocks
        self._width = self._computed_at + 2
        self.spare_at = num_rows * self._width
        self.words = device_words(self.spare_at + spare, device)
        table = self.words.words[: self.spare_at].view(num_rows, self._width)
        self.tokens = table[:, : self._blocks_at]
        self.blocks = table[:, self._blocks_at : self._computed_at]
        self.computed = table[:, self._computed_at]
        self.prompt_lengths = table[:, self._computed_at + 1]
        self.num_computed = [0] * num_rows  # as `computed`, but on the host: counts launched steps
        self.slots = [0] * num_rows
        self.params = [GREEDY] * num_rows
        self.kinds = [GENERATE.name] * num_rows
        self.num_blocks = [0] * num_rows

    @property
    def spare(self) -> Tensor:
        return self.words.words[self.spare_at :]

    def _write(self, row: int, column: int, values: Sequence[int] | np.ndarray) -> None:
        self.words.write(row * self._width + column, values)

    def admit(self, admit: Admit) -> None:
        row = admit.row
        self._write(row, 0, admit.tokens)
        self._write(row, self._computed_at, [admit.computed, admit.prompt_length])
        self.num_computed[row] = admit.computed
        self.slots[row] = admit.slot
        self.params[row] = admit.sampling
        self.kinds[row] = admit.kind
        self.num_blocks[row] = 0
        self.extend(row, admit.blocks)

    def extend(self, row: int, blocks: list[int]) -> None:
        self._write(row, self._blocks_at + self.num_blocks[row], blocks)
        self.num_blocks[row] += len(blocks)

    def release(self, row: int) -> None:
        """The row is free. The next sequence that takes it overwrites its state."""
        self.num_blocks[row] = 0
        self.slots[row] = 0
        self.params[row] = GREEDY

    def store(self, rows: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Writes sampled tokens [n] at `positions` [n] of `rows` [n]."""
        self.tokens[rows, positions] = tokens.to(torch.int32)
