"""The interface of attention backends: started once, prepared once per step, called once per layer.

All backends read the same cache, `[blocks, layers, 2, block_size, kv_heads, head_dim]`, viewed per layer by strides.
What else a step's attention needs is prepared once per step, by `AttentionBackend.step` or, in a captured graph, by
`Captured`. The result is the `Attend` that the layers call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a backend needs to know about a GPU."""

    capability: tuple[int, int]
    processors: int  # streaming multiprocessors

    @classmethod
    def of(cls, device: torch.device) -> Gpu | None:
        """None on a CPU."""
        if device.type != "cuda":
            return None
        found = torch.cuda.get_device_properties(device)
        return cls((found.major, found.minor), found.multi_processor_count)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model needs of its attention, and on which device."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float  # 0: none
    windows: frozenset[int]  # of the layers; 0: none
    dtype: torch.dtype
    device: torch.device
    gpu: Gpu | None  # None: a CPU


@dataclass(frozen=True, slots=True)
class Capacity:
    """The largest step, and the cache's block size."""

    rows: int
    blocks: int  # of one row
    block_size: int  # positions


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How the cache stores keys and values: their dtype, and scales inside the bytes of each block."""

    dtype: torch.dtype
    scale_bytes: int = 0  # of each block of each layer, after its keys and values; 0: no scales

    def block_bytes(self, layers: int, positions: int, kv_heads: int, head_dim: int) -> int:
        """Bytes of one block over all layers."""
        values = 2 * positions * kv_heads * head_dim * self.dtype.itemsize
        return layers * (values + self.scale_bytes)


@dataclass(frozen=True, slots=True)
class StepLengths:
    """A step as the host knows it, one entry per sequence: decode tokens first, then chunks."""

    query_lens: Sequence[int]  # tokens of each sequence in this step
    context_lens: Sequence[int]  # positions of each sequence, this step's included

    @property
    def num_decodes(self) -> int:
        """The number of leading sequences with one token."""
        longer = (i for i, length in enumerate(self.query_lens) if length != 1)
        return next(longer, len(self.query_lens))


class View(Protocol):
    """The part of `engine.layers.batch.KVView` that a backend reads."""

    @property
    def cache(self) -> Tensor: ...  # [blocks, layers, 2, block_size, kv_heads, head_dim]
    @property
    def block_tables(self) -> Tensor: ...  # [S, blocks of the longest sequence] int32
    @property
    def cu_seqlens_q(self) -> Tensor: ...  # [S + 1] int32
    @property
    def context_lens(self) -> Tensor: ...  # [S] int32
    @property
    def num_decodes(self) -> int: ...  # the first `num_decodes` sequences have one token each


class Attend(Protocol):
    """Causal attention of one layer over one step: q [T, heads, head_dim] -> the same shape, contiguous.

    Semantics: `engine.ops.reference.paged_attention`.
    """

    def __call__(
        self, q: Tensor, view: View, layer: int, scale: float, softcap: float, window: int
    ) -> Tensor: ...


# Makes the attention of a step from its (block_tables, context_lens), as in `View`.
Prepare = Callable[[Tensor, Tensor], Attend]


class Captured(Protocol):
    """The attention of one captured graph: rows with one token each, and chunks if the backend captures them."""

    def attend(self, block_tables: Tensor, context_lens: Tensor) -> Attend:
        """Called while the graph is captured: its launches are part of the graph."""
        ...

    def plan(self, context_lens: Iterable[int]) -> None:
        """Called before the capture and before each replay. Waits for no step.

        `context_lens`: of the rows with one token, that token included.
        """
        ...


class AttentionBackend(Protocol):
    """One way to compute attention."""

    name: str  # as in --attention-backend
    default_block_size: int  # positions of a block, unless the user says otherwise
    block_unit: int  # block sizes are multiples of it
    captures_chunks: bool  # False: steps with chunks are launched kernel by kernel

    def kv_format(self, dtype: torch.dtype) -> KVFormat:
        """How it stores the keys and values that a model computes as `dtype`."""
        ...

    @property
    def serves(self) -> Mapping[str, str]:
        """Op -> what serves it in place of our own kernels, for `/info` and the log."""
        ...

    def workspace(self, rows: int) -> int:
        """Bytes of its own buffers, for steps of up to `rows` sequences."""
        ...

    def start(self, capacity: Capacity) -> None:
        """Allocates buffers and builds kernels. Called before any step. Raises ConfigError."""
        ...

    def step(self, step: StepLengths, block_tables: Tensor, context_lens: Tensor) -> Attend:
        """The attention of a step that is launched now, kernel by kernel. The tensors are those of `View`."""
        ...

    def captured(self, rows: int) -> Captured:
        """The attention of a graph with `rows` rows of one token each."""
        ...
