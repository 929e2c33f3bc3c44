"""How to merge adapters: weights, strategy and its options, as a client gives them. Without torch.

A recipe is part of the identity of a merged adapter, so options that the strategy does not use have their defaults.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast, get_args

from engine.errors import AdapterError, InvalidRequest, from_wire

Strategy = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "cat", "svd"]
MajoritySign = Literal["total", "frequency"]

STRATEGIES: tuple[str, ...] = get_args(Strategy)
SIGN_METHODS: tuple[str, ...] = get_args(MajoritySign)
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # need a density
RANDOM = ("dare_linear", "dare_ties")  # use the seed
ELECTING = ("ties", "dare_ties")  # use the majority sign
ANY_RANKS = ("cat", "svd")  # accept adapters of different ranks

FIELD = "merged_adapters"  # of the API, for messages
MAX_MERGED = 16  # adapters of one merge
MAX_WEIGHT = 1e6
MAX_SEED = 2**63 - 1
MAX_SHOWN = 100  # characters of a wrong name in a message


@dataclass(frozen=True, slots=True)
class Recipe:
    """One weight per adapter, and the strategy of PEFT's `add_weighted_adapter`."""

    weights: tuple[float, ...]
    strategy: Strategy = "linear"
    density: float | None = None  # fraction of values to keep; None: the strategy keeps all
    majority_sign: MajoritySign = "total"
    seed: int = 0  # of the random values that `dare` drops

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for equal recipes."""
        return (
            self.strategy,
            ",".join(map(repr, self.weights)),
            repr(self.density),
            self.majority_sign,
            str(self.seed),
        )

    @classmethod
    def parse(
        cls,
        weights: Sequence[float],
        strategy: str = "linear",
        density: float | None = None,
        majority_sign: str = "total",
        seed: int = 0,
    ) -> Recipe:
        """Checks what a client gave. Options that the strategy does not use are ignored, as PEFT does.

        One adapter is merged by `linear`, as by PEFT. Raises InvalidRequest that names the field.
        """
        for weight in weights:
            if not abs(weight) <= MAX_WEIGHT:  # refuses NaN too
                raise _invalid("weights", f"must be between {-MAX_WEIGHT:g} and {MAX_WEIGHT:g}")
        if strategy not in STRATEGIES:
            given = repr(strategy[:MAX_SHOWN])
            raise _invalid(
                "merge_strategy", f"{given} is not supported", f"use one of {', '.join(STRATEGIES)}"
            )
        if majority_sign not in SIGN_METHODS:
            raise _invalid("majority_sign_method", f"must be one of {', '.join(SIGN_METHODS)}")
        if not 0 <= seed <= MAX_SEED:
            raise _invalid("seed", f"must be between 0 and {MAX_SEED}")
        if len(weights) == 1:
            strategy = "linear"
        return cls(
            tuple(map(float, weights)),
            cast(Strategy, strategy),
            _density(density, strategy) if strategy in PRUNING else None,
            cast(MajoritySign, majority_sign) if strategy in ELECTING else "total",
            seed if strategy in RANDOM else 0,
        )


def _density(density: float | None, strategy: str) -> float:
    if density is None:
        hint = "0.5 keeps half of the values"
        raise _invalid("density", f"is required for {strategy}", hint)
    if not 0 < density <= 1:
        raise _invalid("density", f"must be above 0 and at most 1, not {density}")
    return float(density)


def check_count(ids: Sequence[str], weights: Sequence[float]) -> None:
    """Raises InvalidRequest if there is no adapter, too many, or another number of weights."""
    if not ids:
        raise _invalid("ids", "is empty", f"leave {FIELD} out for the base model")
    if len(ids) > MAX_MERGED:
        raise _invalid("ids", f"has {len(ids)} adapters; the limit is {MAX_MERGED}")
    if len(weights) != len(ids):
        raise _invalid(
            "weights", f"has {len(weights)} values for {len(ids)} adapters", "give one for each id"
        )


def _invalid(name: str, problem: str, hint: str | None = None) -> InvalidRequest:
    return InvalidRequest(f"`{FIELD}.{name}` {problem}", field=f"{FIELD}.{name}", hint=hint)


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Errors of the block name this part of a merge."""
    try:
        yield
    except AdapterError as error:
        named = {"message": f"{part}: {error.message}", "field": FIELD}
        raise from_wire(error.to_wire() | named) from None
