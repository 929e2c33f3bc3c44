"""The layout of adapters in memory, shared by the image writer, the kernels and the reference.

Everything is rank-major. For one group (one fused linear with up to three targets) of one layer:

    A      [r_0 + r_1 + r_2, K]     one row per rank; targets stacked in order
    B_t    [r_t, N_t]               target after target

Row lengths are padded to `ALIGN` bytes, ranks never. An embedding's A is `[vocab, r]`, its B `[r, hidden]`. K and N are
those of one shard.

A record is eight int32 words per (slot, layer, group); offsets are in units of `ALIGN` bytes from the start of the
arena (in an image: from the start of its data). Rank 0 means that the adapter does not adapt the target. Slot 0 is the
base model, whose records are all zero.

A group of experts has a second level. Its record in the slot has FLAG_EXPERTS, the largest rank of any expert for each
target, and in place of A and B

    WORD_A   offset of the expert records [experts, 8] int32, which lie in the arena with the adapter's data
    WORD_B   offset of the adapter's data

Offsets in an expert record are relative to the adapter's data, so that the data is copied as it is. An expert with
ranks of 0 is not adapted.

Extras change the outputs of a group after its pairs: y becomes `scale * y + shift`. They are float32 rows over all
outputs of the group, padded to ALIGN bytes: the scale row if any target has FLAG_SCALED, then the shift row if
FLAG_SHIFT. An image has the rows of the adapter's file:

    scale   the DoRA magnitude of a target with FLAG_SCALED, else 1
    shift   what is added to a target, or with FLAG_OWN_BIAS what replaces the base's bias

`engine.runner.extras` makes the rows final in the arena, where the base weights are.

Embedding and head may have own rows (FLAG_OWN_ROWS), which replace the base's or add tokens to its vocabulary. They lie
at WORD_OWN, which is free since both have one target:

    header   int32 [4]: number of rows n; the adapter's vocabulary, whose end is -inf in the logits; 0; 0
    ids      int32 [n], rising, padded to ALIGN bytes
    rows     [n, hidden]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.messages import aligned
from engine.ops.targets import Group, ModelTargets, Shard, Span, Target, share

ALIGN = 16  # bytes
MAX_RANK = 65535  # a rank is a uint16 in the record
RECORD_WORDS = 8
RECORD_BYTES = RECORD_WORDS * 4

# words of a record
WORD_A = 0  # offset of A
WORD_B = 1  # offset of B of the first target
WORD_EXTRA = 2  # offset of the extras, if the flags say that there are any
WORD_RANKS = 3  # rank 0 | rank 1 << 16
WORD_RANK2 = 4  # rank 2 | flags << 16
WORD_SCALE = 5  # float32 bits of the three targets' scales
WORD_OWN = 7  # offset of the own rows of embedding or head

FLAG_EXPERTS = 1  # A and B are those of the second level
FLAG_SHIFT = 2  # the extras have a shift row
FLAG_SCALED = 4  # target 0 has a DoRA magnitude; target t: FLAG_SCALED << t
FLAG_OWN_BIAS = 32  # the same for a bias that replaces the base's
FLAG_OWN_ROWS = 256  # embedding or head: own rows
SCALED = FLAG_SCALED * 7  # any target
EXTRAS = FLAG_SHIFT | SCALED  # there are extras
FLAGS_SHIFT = 16  # bits from the start of WORD_RANK2 to the flags

# What an adapter does to a group, combined.
PAIRS = 1  # adds x A.T B.T
RESCALES = 2  # has extras
REPLACES = 4  # has own rows


def padded(num_bytes: int) -> int:
    """`num_bytes` rounded up to the alignment."""
    return (num_bytes + ALIGN - 1) // ALIGN * ALIGN


def row_stride(length: int, element_size: int) -> int:
    """Elements from one row of A or B to the next."""
    return padded(length * element_size) // element_size


def own_ids_start(offset: int) -> int:
    """Bytes from the start of the data to the ids of own rows at byte `offset`."""
    return offset + ALIGN


def own_rows_start(offset: int, count: int) -> int:
    """The same to the rows, of which there are `count`."""
    return own_ids_start(offset) + padded(4 * count)


def data_start(record_bytes: int) -> int:
    """Bytes from the start of an image to its data, which follows the records."""
    return aligned(record_bytes)


@dataclass(frozen=True, slots=True)
class TargetPart:
    """One shard's part of a target."""

    whole: Target
    outputs: tuple[Span, ...]

    @property
    def out_features(self) -> int:
        return sum(span.size for span in self.outputs)


@dataclass(frozen=True, slots=True)
class GroupPart:
    """One shard's part of a group: a linear as the shard holds it."""

    whole: Group
    inputs: Span
    targets: tuple[TargetPart, ...]

    @property
    def in_features(self) -> int:
        return self.inputs.size

    @property
    def out_features(self) -> int:
        return sum(target.out_features for target in self.targets)


def part_of(group: Group, shard: Shard) -> GroupPart:
    """A column-parallel group is cut along its outputs, a row-parallel one along its inputs."""
    if group.cut == "outputs":
        targets = tuple(TargetPart(target, target.outputs(shard)) for target in group.targets)
        return GroupPart(group, Span(0, group.in_features), targets)
    targets = tuple(TargetPart(t, (Span(0, t.out_features),)) for t in group.targets)
    return GroupPart(group, share(group.in_features, group.unit, shard), targets)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One shard's part of the adapters: the layout of images, arena and records."""

    targets: ModelTargets
    dtype: str  # "float32" | "bfloat16" | "float16": of every matrix in the arena
    shard: Shard = Shard()

    @property
    def num_layers(self) -> int:
        return self.targets.num_layers

    @property
    def groups(self) -> tuple[GroupPart, ...]:
        """The groups of each decoder layer."""
        return tuple(part_of(group, self.shard) for group in self.targets.groups)

    @property
    def ends(self) -> tuple[GroupPart, ...]:
        """Embedding and head."""
        return tuple(part_of(group, self.shard) for group in self.targets.ends)

    @property
    def num_groups(self) -> int:
        """Groups per layer in a slot's records."""
        return max(len(self.targets.groups), len(self.targets.ends))

    @property
    def record_bytes(self) -> int:
        """Bytes of one adapter's records."""
        return (self.num_layers + 1) * self.num_groups * RECORD_BYTES

    def each_group(self) -> Iterator[tuple[int, int, GroupPart]]:
        """(layer, group number, part) of every group of every layer, the ends last."""
        groups, ends = self.groups, self.ends
        for layer, number, _ in self.targets.each_group():
            yield layer, number, (ends if layer == self.num_layers else groups)[number]
