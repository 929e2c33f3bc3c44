"""The op `paged_attention`: every dtype, head size, window and softcap, on every device. It plans nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from engine.ops import schemas as schemas  # defines the op
from engine.ops.attention.seam import Attend, Capacity, Captured, KVFormat, Needs, StepLengths, View

ops = torch.ops.lorax

DEFAULT_BLOCK_SIZE = 16


def attend(q: Tensor, view: View, layer: int, scale: float, softcap: float, window: int) -> Tensor:
    """Any graph may hold it, because the device decides how keys are split among thread blocks."""
    return ops.paged_attention(
        q,
        view.cache,
        layer,
        view.block_tables,
        view.cu_seqlens_q,
        view.context_lens,
        scale,
        softcap,
        window,
        view.num_decodes,
    )


class Builtin:
    """Our own kernels, or their reference on a machine without them."""

    name = "builtin"
    default_block_size = DEFAULT_BLOCK_SIZE
    block_unit = 1
    captures_chunks = True
    serves: Mapping[str, str] = {}

    @staticmethod
    def refusal(needs: Needs) -> None:
        """It serves every model."""

    def kv_format(self, dtype: torch.dtype) -> KVFormat:
        return KVFormat(dtype)

    def workspace(self, rows: int) -> int:
        return 0

    def start(self, capacity: Capacity) -> None: ...

    def step(self, step: StepLengths, block_tables: Tensor, context_lens: Tensor) -> Attend:
        return attend

    def captured(self, rows: int) -> Captured:
        return self

    def attend(self, block_tables: Tensor, context_lens: Tensor) -> Attend:
        return attend

    def plan(self, context_lens: Iterable[int]) -> None: ...
