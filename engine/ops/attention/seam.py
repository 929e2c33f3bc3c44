"""What an attention backend is: asked once at start, planned once a step, called once a layer.

All backends read the same cache, `[blocks, layers, 2, block_size, kv_heads, head_dim]`, viewed per layer by strides.
What else a step's attention needs is prepared once per step, by `Backend.step` or, in a captured graph, by `Captured`.
The result is the `Attend` that the layers call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a backend wants to know of a GPU."""

    capability: tuple[int, int]
    processors: int

    @classmethod
    def of(cls, device: torch.device) -> Gpu | None:
        """None on a CPU."""
        if device.type != "cuda":
            return None
        found = torch.cuda.get_device_properties(device)
        return cls((found.major, found.minor), found.multi_processor_count)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model asks of its attention, and where."""

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
class Room:
    """The most that one step may hold, and the cache's block size."""

    rows: int
    blocks: int  # of one row
    block_size: int  # positions


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How keys and values lie in the cache: a type of their own, and scales inside the bytes of each block."""

    dtype: torch.dtype
    scale_bytes: int = (
        0  # of each block of each layer, behind its keys and values; 0: there are none
    )

    def block_bytes(self, layers: int, positions: int, kv_heads: int, head_dim: int) -> int:
        """Bytes of one block over all layers."""
        values = 2 * positions * kv_heads * head_dim * self.dtype.itemsize
        return layers * (values + self.scale_bytes)


@dataclass(frozen=True, slots=True)
class StepLengths:
    """A step as the host knows it, one entry a sequence: decode tokens first, then chunks."""

    query_lens: Sequence[int]  # tokens of the step
    context_lens: Sequence[int]  # positions of each sequence, this step's included

    @property
    def num_decodes(self) -> int:
        """The number of leading sequences with one token."""
        longer = (i for i, length in enumerate(self.query_lens) if length != 1)
        return next(longer, len(self.query_lens))


class View(Protocol):
    """The KV cache as one step sees it: what a backend reads of `engine.layers.batch.KVView`."""

    @property
    def cache(self) -> Tensor: ...  # [blocks, layers, 2, block_size, kv_heads, head_dim]
    @property
    def block_tables(self) -> Tensor: ...  # [S, blocks of the longest] int32
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
    """The attention of one captured graph: rows with one token each, and chunks if the backend captures any."""

    def attend(self, block_tables: Tensor, context_lens: Tensor) -> Attend:
        """Called while the graph is captured: what it launches is part of the graph."""
        ...

    def plan(self, context_lens: Iterable[int]) -> None:
        """Called before the capture and before each replay. Waits for no step.

        `context_lens`: of the rows with one token, that token included.
        """
        ...


class Backend(Protocol):
    """One way to compute attention."""

    name: str  # as in --attention-backend
    default_block_size: int  # positions of a block, unless the user says otherwise
    block_unit: int  # block sizes are multiples of it
    captures_chunks: bool  # else steps with chunks are launched kernel by kernel

    def kv_format(self, dtype: torch.dtype) -> KVFormat:
        """How it stores keys and values that a model computes as `dtype`."""
        ...

    @property
    def serves(self) -> Mapping[str, str]:
        """Op -> what serves it instead of our own kernels, for `/info` and the log."""
        ...

    def workspace(self, rows: int) -> int:
        """Bytes that it takes for itself, of steps of up to `rows` sequences."""
        ...

    def start(self, room: Room) -> None:
        """Allocates, and builds what is built at first use; before any step. Raises ConfigError."""
        ...

    def step(self, step: StepLengths, block_tables: Tensor, context_lens: Tensor) -> Attend:
        """The attention of a step that is launched now, kernel by kernel. The tensors are those of `View`."""
        ...

    def captured(self, rows: int) -> Captured:
        """The attention of a graph with so many rows of one token each."""
        ...
