"""FlashAttention-2 (Dao 2023), from the package `flash-attn`: it plans nothing and takes blocks of 256 positions.

Decode tokens and chunks are two calls. The first splits the keys of a sequence into parts if the batch alone does not
fill the GPU. The number of parts depends on the width of the block table, which is fixed in a captured graph. The
second call never splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.ops.attention.packages import imported, refusal_of_gpu_and_dtype
from engine.ops.attention.seam import Attend, Capacity, Captured, KVFormat, Needs, StepLengths, View

MAX_HEAD = 256
HEAD_UNIT = 8
PAGE = 256  # positions; the kernels take multiples of it


@dataclass(frozen=True, slots=True)
class _Chunks:
    """The sequences of a step that come after its decode tokens."""

    cu_seqlens_q: Tensor  # [chunks + 1] int32, from 0
    cu_seqlens_k: Tensor  # [chunks + 1] int32: running sum of their context_lens
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True, slots=True)
class _Step:
    """The attention of one step: `num_decodes` sequences of one token, then chunks."""

    package: Any
    num_decodes: int
    chunks: _Chunks | None

    def __call__(
        self, q: Tensor, view: View, layer: int, scale: float, softcap: float, window: int
    ) -> Tensor:
        n = self.num_decodes
        keys, values = view.cache[:, layer, 0], view.cache[:, layer, 1]
        options = {
            "softmax_scale": scale,
            "causal": True,
            # positions to the left of the query's own, and to the right
            "window_size": (window - 1, 0) if window else (-1, -1),
            "softcap": softcap,
        }
        parts: list[Tensor] = []
        if n:
            found = self.package.flash_attn_with_kvcache(
                q[:n, None],
                keys,
                values,
                cache_seqlens=view.context_lens[:n],
                block_table=view.block_tables[:n],
                **options,
            )
            parts.append(found[:, 0])
        if (chunks := self.chunks) is not None:
            found = self.package.flash_attn_varlen_func(
                q[n:],
                keys,
                values,
                cu_seqlens_q=chunks.cu_seqlens_q,
                cu_seqlens_k=chunks.cu_seqlens_k,
                max_seqlen_q=chunks.max_seqlen_q,
                max_seqlen_k=chunks.max_seqlen_k,
                block_table=view.block_tables[n:],
                **options,
            )
            parts.append(found)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()


class _Graph:
    """Decode tokens only. Everything that changes from step to step is on the device."""

    def __init__(self, package: Any, rows: int) -> None:
        self.step = _Step(package, rows, None)

    def attend(self, block_tables: Tensor, context_lens: Tensor) -> Attend:
        return self.step

    def plan(self, context_lens: Iterable[int]) -> None: ...


class FlashAttention:
    """Imports the package. Raises ConfigError that names the package if it is missing."""

    name = "flash-attn"
    default_block_size = PAGE
    block_unit = PAGE
    captures_chunks = False

    def __init__(self, needs: Needs, package: Any = None) -> None:
        install = "pip install flash-attn --no-build-isolation"
        self.package = package or imported(self.name, "flash_attn", install)
        self.serves: Mapping[str, str] = {
            "paged_attention": f"{self.name} {self.package.__version__}"
        }

    @staticmethod
    def refusal(needs: Needs) -> str | None:
        if needs.head_dim % HEAD_UNIT or needs.head_dim > MAX_HEAD:
            return (
                f"serves heads of up to {MAX_HEAD} in steps of {HEAD_UNIT}, not of {needs.head_dim}"
            )
        return refusal_of_gpu_and_dtype(needs)

    def kv_format(self, dtype: torch.dtype) -> KVFormat:
        return KVFormat(dtype)

    def workspace(self, rows: int) -> int:
        """No buffers of its own: it allocates from torch, as activations do."""
        return 0

    def start(self, capacity: Capacity) -> None: ...

    def step(self, step: StepLengths, block_tables: Tensor, context_lens: Tensor) -> Attend:
        n = step.num_decodes
        query_lens = step.query_lens[n:]
        if not query_lens:
            return _Step(self.package, n, None)
        cu_seqlens_q = [0]
        for length in query_lens:
            cu_seqlens_q.append(cu_seqlens_q[-1] + length)
        cu_seqlens_k = torch.zeros(len(cu_seqlens_q), dtype=torch.int32, device=block_tables.device)
        torch.cumsum(context_lens[n:], 0, dtype=torch.int32, out=cu_seqlens_k[1:])
        chunks = _Chunks(
            _uploaded(cu_seqlens_q, block_tables.device),
            cu_seqlens_k,
            max(query_lens),
            max(step.context_lens[n:]),
        )
        return _Step(self.package, n, chunks)

    def captured(self, rows: int) -> Captured:
        return _Graph(self.package, rows)


def _uploaded(values: Sequence[int], device: torch.device) -> Tensor:
    """`values` as int32 on the device, without waiting for it."""
    host = torch.tensor(values, dtype=torch.int32)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
