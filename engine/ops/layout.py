"""The fixed layout of adapters in memory: what the image writer, the kernels and the reference agree on.

Everything is rank-major. For one group (one fused linear with up to three targets) of one layer:

    A      [r_0 + r_1 + r_2, K]     one row per rank; targets stacked in order
    B_t    [r_t, N_t]               target after target

Row lengths are padded to `ALIGN` bytes, ranks never. An embedding's A is `[vocab, r]`, its B `[r, hidden]`.
A record is eight int32 words per (slot, layer, group); offsets are in units of `ALIGN` bytes from the start of the
arena (in an image: from the start of its data). Rank 0 means that the adapter leaves the target alone; slot 0 is
the base model, whose records are all zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.messages import aligned

ALIGN = 16  # bytes
MAX_TARGETS = 3  # per group
MAX_RANK = 65535  # a rank is a uint16 in the record
RECORD_WORDS = 8

# words of a record
WORD_A = 0  # offset of A
WORD_B = 1  # offset of B of the first target
WORD_EXTRA = 2  # offset of per-output extras (bias, DoRA scale); 0: none
WORD_RANKS = 3  # rank 0 | rank 1 << 16
WORD_RANK2 = 4  # rank 2 | flags << 16
WORD_SCALE = 5  # float32 bits of the three targets' scales


def padded(num_bytes: int) -> int:
    """`num_bytes` rounded up to the alignment."""
    return (num_bytes + ALIGN - 1) // ALIGN * ALIGN


def row_stride(length: int, element_size: int) -> int:
    """Elements from one row of A or B to the next."""
    return padded(length * element_size) // element_size


def data_start(record_bytes: int) -> int:
    """Where the data of an image starts, behind its records, in bytes."""
    return aligned(record_bytes)


@dataclass(frozen=True, slots=True)
class Target:
    """One linear of the checkpoint that an adapter can adapt."""

    name: str  # as in PEFT's target_modules: "q_proj"
    module: str  # its path in the transformers model: "model.layers.{layer}.self_attn.q_proj"
    out_features: int


@dataclass(frozen=True, slots=True)
class Group:
    """One linear of the engine, fused from the linears of its targets: they read the same x."""

    name: str  # "qkv"
    in_features: int  # K; of an embedding: the vocabulary
    targets: tuple[Target, ...]
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Every place where an adapter of this base model can act."""

    dtype: str  # "float32" | "bfloat16" | "float16": of every matrix in the arena
    num_layers: int
    groups: tuple[Group, ...]  # of each decoder layer; the index is the group number
    ends: tuple[Group, ...]  # embedding and head: groups of the layer numbered `num_layers`

    @property
    def num_groups(self) -> int:
        """Second dimension of a slot's records."""
        return max(len(self.groups), len(self.ends))

    @property
    def record_bytes(self) -> int:
        """Bytes of one adapter's records."""
        return (self.num_layers + 1) * self.num_groups * RECORD_WORDS * 4

    def places(self) -> Iterator[tuple[int, int, Group]]:
        """(layer, group number, group) of every group of every layer, the ends last."""
        for layer in range(self.num_layers):
            for number, group in enumerate(self.groups):
                yield layer, number, group
        for number, group in enumerate(self.ends):
            yield self.num_layers, number, group
