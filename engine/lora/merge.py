"""Merges adapters of one base model into one, with the numbers of PEFT's `add_weighted_adapter`.

    linear, ties, dare_linear, dare_ties, magnitude_prune
               both halves are merged alone; sqrt(|weight * scale|) weighs each, and A has the sign
    cat        A = [weight_i * scale_i * A_i], B = [B_i]: exact, of the sum of the ranks
    svd        the best approximation of the exact sum with the largest rank of the adapters

Adapters may have different targets: a module that one of them adapts is adapted. A module is computed when its matrices
are read. `write_image` reads group by group, so one group is in memory at a time.

TIES: Yadav et al. 2023, arXiv 2306.01708. DARE: Yu et al. 2023, arXiv 2311.03099.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import AdapterIncompatible
from engine.lora.recipe import ANY_RANKS, ELECTING, FIELD, RANDOM, Recipe, naming
from engine.lora.weights import LoraWeights, Pair, TargetIndex, TensorMatrix, read_all
from engine.ops.layout import MAX_RANK
from engine.ops.targets import MAX_TARGETS

MAX_SCALE = torch.finfo(torch.float32).max


class Part(NamedTuple):
    """One of the adapters to merge."""

    name: str  # for messages
    weights: LoraWeights


class _Share(NamedTuple):
    """A part's pair of one module."""

    part: int  # position in the recipe
    name: str
    pair: Pair
    factor: float  # weight * scale


class _Module(NamedTuple):
    """One module of the merged adapter."""

    target: TargetIndex
    shares: tuple[_Share, ...]  # of the parts that adapt it
    rank: int


def merge(
    parts: Sequence[Part],
    recipe: Recipe,
    *,
    max_rank: int = MAX_RANK,
    pause: Callable[[], None] = lambda: None,
) -> LoraWeights:
    """The merged adapter. Closing it closes the parts; `pause` is called before each module is computed.

    Raises AdapterIncompatible if ranks differ (except for `cat` and `svd`) or a rank exceeds `max_rank`.
    Reading the matrices raises AdapterIncompatible for values that are not finite, and AdapterLoadFailed.
    """
    shares: dict[TargetIndex, list[_Share]] = {}
    for number, ((name, weights), weight) in enumerate(zip(parts, recipe.weights, strict=True)):
        if weights.extras or weights.own:
            raise _refused(
                "ids",
                f"{name} has more than LoRA pairs (DoRA, biases or rows of its own), which cannot be merged",
                "request it alone, or merge ordinary LoRA adapters",
            )
        for index, pair in weights.pairs.items():
            factor = weight * pair.scale
            if not abs(factor) <= MAX_SCALE:
                raise _refused("weights", f"the weight of {name} times its scale is not finite")
            shares.setdefault(index, []).append(_Share(number, name, pair, factor))
    largest = max(pair.rank for part in parts for pair in part.weights.pairs.values())
    merger = _Merger(recipe, pause)
    pairs = {}
    for index, found in shares.items():
        module = _Module(index, tuple(found), _rank(found, recipe, largest, max_rank))
        pairs[index] = _pair(merger, module)

    def verify() -> None:
        for name, weights in parts:
            with naming(name):
                weights.verify()

    def close() -> None:
        for _, weights in parts:
            weights.close()

    notes = [f"{name}: {note}" for name, weights in parts for note in weights.notes]
    bases = {weights.base_model for _, weights in parts}
    base = bases.pop() if len(bases) == 1 else None
    return LoraWeights(pairs, base_model=base, notes=notes, verify=verify, close=close)


def _rank(shares: Sequence[_Share], recipe: Recipe, largest: int, max_rank: int) -> int:
    """The rank of a merged module; `largest`: of any module of any part. Raises AdapterIncompatible."""
    name, first = shares[0].name, shares[0].pair
    if recipe.strategy == "svd":
        stacked = sum(share.pair.rank for share in shares)
        return min(largest, stacked, first.a.shape[1], first.b.shape[0])
    if recipe.strategy == "cat":
        rank = sum(share.pair.rank for share in shares)
        if rank > max_rank:
            raise _refused(
                "merge_strategy",
                f"cat gives {first.module} the rank {rank}; the limit is {max_rank}",
                f"use merge_strategy svd, or start the server with --max-adapter-rank {rank}",
            )
        return rank
    for share in shares:
        if share.pair.rank != first.rank:
            raise _refused(
                "merge_strategy",
                f"{recipe.strategy} needs equal ranks, but {first.module} has rank {first.rank} in {name}"
                f" and rank {share.pair.rank} in {share.name}",
                "use merge_strategy cat, which keeps every rank, or svd",
            )
    return first.rank


def _refused(field: str, message: str, hint: str | None = None) -> AdapterIncompatible:
    return AdapterIncompatible(message, field=f"{FIELD}.{field}", hint=hint)


def _pair(merger: _Merger, module: _Module) -> Pair:
    """The merged pair. A part that is alone keeps its matrices, where the strategy would only scale them."""
    _, name, first, factor = module.shares[0]
    if len(module.shares) == 1 and merger.recipe.density is None:
        return Pair(first.a, first.b, factor, f"{first.module} of {name}")
    a = _MergedMatrix(merger, module, 0, (module.rank, first.a.shape[1]))
    b = _MergedMatrix(merger, module, 1, (first.b.shape[0], module.rank))
    return Pair(a, b, 1.0, first.module)


@dataclass(frozen=True, slots=True)
class _MergedMatrix:
    """A matrix that is computed when it is read."""

    merger: _Merger
    module: _Module
    half: int  # 0: A, 1: B
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32

    def read(self, start: int, stop: int, out: memoryview) -> None:
        TensorMatrix(self.merger.halves(self.module)[self.half]).read(start, stop, out)


class _Merger:
    """Computes modules. Keeps the last ones, those of a group, because all A of a group are read before its B."""

    def __init__(self, recipe: Recipe, pause: Callable[[], None]) -> None:
        self.recipe, self._pause = recipe, pause
        self._last: OrderedDict[TargetIndex, tuple[Tensor, Tensor]] = OrderedDict()

    def halves(self, module: _Module) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] of one module, float32."""
        if module.target not in self._last:
            self._pause()
            while len(self._last) >= MAX_TARGETS:
                self._last.popitem(last=False)
            self._last[module.target] = self._compute(module)
        return self._last[module.target]

    def _compute(self, module: _Module) -> tuple[Tensor, Tensor]:
        if self.recipe.strategy not in ANY_RANKS:
            return self._half(module.shares, 0), self._half(module.shares, 1)
        a = torch.cat([_values(share, 0) * share.factor for share in module.shares])
        b = torch.cat([_values(share, 1) for share in module.shares], dim=1)
        return (a, b) if self.recipe.strategy == "cat" else _truncated(a, b, module.rank)

    def _half(self, shares: Sequence[_Share], half: int) -> Tensor:
        """All A, or all B, of a module as one: pruned, weighted and added."""
        pruned = (self._pruned(share, half) for share in shares)
        roots = [math.sqrt(abs(share.factor)) for share in shares]
        if half == 0:  # the sign belongs to one half, or it would cancel out
            roots = [math.copysign(root, s.factor) for root, s in zip(roots, shares, strict=True)]
        if self.recipe.strategy in ELECTING:
            return _elected(torch.stack(list(pruned)), roots, self.recipe.majority_sign)
        values = [root * part for root, part in zip(roots, pruned, strict=True)]
        return torch.stack(values).sum(dim=0)

    def _pruned(self, share: _Share, half: int) -> Tensor:
        """The values that the strategy keeps; the others are zero."""
        values, density = _values(share, half), self.recipe.density
        if density is None or density >= 1:
            return values
        if self.recipe.strategy in RANDOM:
            mask = dare_mask(
                values.shape, density, (self.recipe.seed, share.part, half, share.pair.module)
            )
            return values * mask / density
        flat = values.flatten()
        kept = flat.abs().topk(int(density * flat.numel())).indices
        return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view(values.shape)


def dare_mask(shape: Sequence[int], density: float, key: tuple[object, ...]) -> Tensor:
    """Ones with the probability `density`, else zeros. Equal for equal keys."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.bernoulli(torch.full(tuple(shape), density), generator=generator)


def _values(share: _Share, half: int) -> Tensor:
    """A or B of a part, float32. Raises AdapterIncompatible if a value is not finite."""
    matrix = share.pair.a if half == 0 else share.pair.b
    with naming(share.name):
        values = read_all(matrix).float()
    if not values.isfinite().all():
        raise AdapterIncompatible(
            f"{share.pair.module} of {share.name} has values that are not finite",
            field=FIELD,
            hint="check whether the training diverged",
        )
    return values


def _elected(values: Tensor, roots: Sequence[float], method: str) -> Tensor:
    """The mean of the weighted values whose sign is that of the majority. `values` [parts, rows, columns]."""
    signs = values.sign()
    majority = torch.where((values if method == "total" else signs).sum(dim=0) >= 0, 1.0, -1.0)
    agree = signs == majority
    weighted = values * torch.tensor(roots).view(-1, 1, 1)
    return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `b @ a` with this rank, from factors and without the product.

    With a.T = Qa Ra and b = Qb Rb, b @ a = Qb (Rb Ra.T) Qa.T: the small matrix in the middle has the singular values.
    """
    qa, ra = torch.linalg.qr(a.T)
    qb, rb = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return vh[:rank] @ qa.T, qb @ (u[:, :rank] * s[:rank])
