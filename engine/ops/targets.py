"""The LoRA targets of a model: linears of the checkpoint in their full sizes, and their division among shards.

Adapters are checked against `ModelTargets`. One shard's part of them is an `engine.ops.layout.ShardLayout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

MAX_TARGETS = 3  # per group; more linears with the same input make another group


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of the model that one process holds: number `index` of `count`."""

    index: int = 0
    count: int = 1


class Span(NamedTuple):
    """Features start .. stop - 1."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def share(size: int, unit: int, shard: Shard) -> Span:
    """A shard's part of `size` features. Units (heads) stay whole; if they are too few, several shards hold one."""
    units = size // unit
    if units < shard.count:
        index = shard.index * units // shard.count
        return Span(index * unit, (index + 1) * unit)
    each = -(-units // shard.count)
    start = min(shard.index * each, units)
    return Span(start * unit, min(start + each, units) * unit)


@dataclass(frozen=True, slots=True)
class Target:
    """One linear of the checkpoint that an adapter can adapt."""

    name: str  # as in PEFT's target_modules: "q_proj"
    module: str  # its path in the transformers model: "model.layers.{layer}.self_attn.q_proj"; experts: "{expert}" too
    out_features: int
    unit: int = 1  # outputs that stay in one shard: the size of a head
    fused: tuple[int, ...] = ()  # outputs of each linear fused in the checkpoint (gpt2's c_attn)

    def outputs(self, shard: Shard) -> tuple[Span, ...]:
        """The outputs that a shard holds: one span for each fused linear."""
        if shard.count == 1:
            return (Span(0, self.out_features),)
        spans, start = [], 0
        for size in self.fused or (self.out_features,):
            part = share(size, self.unit, shard)
            spans.append(Span(start + part.start, start + part.stop))
            start += size
        return tuple(spans)


@dataclass(frozen=True, slots=True)
class Group:
    """One linear of the engine, fused from the linears of its targets: they read the same x."""

    name: str  # "qkv"
    in_features: int  # K; of an embedding: the vocabulary
    targets: tuple[Target, ...]
    embedding: bool = False
    cut: Literal["outputs", "inputs"] = "outputs"  # column-parallel or row-parallel
    unit: int = 1  # inputs that stay in one shard, if it is cut along its inputs
    bias: bool = False  # the base has biases, of all targets
    experts: int = 0  # linears like this one per layer, one per expert; 0: no experts

    def __post_init__(self) -> None:
        assert 0 < len(self.targets) <= MAX_TARGETS, f"{self.name} has {len(self.targets)} targets"

    @property
    def vocab(self) -> int:
        """Of embedding or head: the tokens that it has rows for."""
        return self.in_features if self.embedding else self.targets[0].out_features


@dataclass(frozen=True, slots=True)
class ModelTargets:
    """Every linear of a base model that an adapter can adapt."""

    num_layers: int
    groups: tuple[Group, ...]  # of each decoder layer; the index is the group number
    ends: tuple[Group, ...]  # embedding and head: groups of the layer numbered `num_layers`
    tied: bool = False  # the base's head is its embedding

    def each_group(self) -> Iterator[tuple[int, int, Group]]:
        """(layer, group number, group) of every group of every layer, the ends last."""
        for layer in range(self.num_layers):
            for number, group in enumerate(self.groups):
                yield layer, number, group
        for number, group in enumerate(self.ends):
            yield self.num_layers, number, group

    @property
    def vocab(self) -> int:
        """Rows of the embedding; 0 if it is not a target."""
        return max((group.in_features for group in self.ends if group.embedding), default=0)

    @property
    def names(self) -> list[str]:
        """The names of all targets, sorted."""
        groups = (*self.groups, *self.ends)
        return sorted({target.name for group in groups for target in group.targets})
