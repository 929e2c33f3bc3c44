"""The cases of the benchmark of an engine, and which adapter each request uses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from engine.bench_options import Popularity, Workload

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the report."""

    name: str
    kind: Literal["base", "enabled", "adapters", "long"]
    mix: int = 0  # index in the workload's `ranks`
    distinct: int = 0  # adapters to choose from
    popularity: Popularity = "distinct"


def cases_of(workload: Workload) -> list[Case]:
    """The cases, in the order of the rounds and of the report."""
    cases: list[Case] = []
    if "base" in workload.cases:
        cases.append(Case("base", "base"))
    if "enabled" in workload.cases:
        cases.append(Case("LoRA enabled, none used", "enabled"))
    if "adapters" in workload.cases:
        cases += _adapter_cases(workload)
    if "long" in workload.cases and workload.long_context:
        cases.append(Case(f"1 x {workload.long_context} with {workload.batch - 1} short", "long"))
    return cases


def _adapter_cases(workload: Workload) -> list[Case]:
    most, first = workload.adapters, ranks_text(workload.ranks[0])
    cases: list[Case] = []
    for popularity in workload.popularity:
        if popularity == "distinct":
            numbers = sorted({1, min(8, most, workload.batch), min(most, workload.batch)})
            for number in numbers:
                words = "1 adapter" if number == 1 else f"{number} distinct"
                cases.append(Case(f"{words}, {first}", "adapters", 0, number))
        else:
            name = f"{popularity} of {most}, {first}"
            cases.append(Case(name, "adapters", 0, most, popularity))
    for mix, ranks in enumerate(workload.ranks[1:], 1):
        number = min(most, workload.batch)
        cases.append(Case(f"{number} distinct, {ranks_text(ranks)}", "adapters", mix, number))
    return cases


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 16`, `ranks 8/16`."""
    return f"rank{'s' * (len(ranks) > 1)} {'/'.join(map(str, ranks))}"


def assign(
    adapters: Sequence[T], batch: int, popularity: Popularity, chooser: random.Random
) -> list[T]:
    """The adapter of each request of a batch."""
    if popularity == "distinct":
        return [adapters[index % len(adapters)] for index in range(batch)]
    if popularity == "identical":
        return [adapters[0]] * batch
    return chooser.choices(adapters, weights_of(len(adapters), popularity), k=batch)


def weights_of(number: int, popularity: Popularity) -> list[float]:
    """Relative frequency of each of `number` adapters (zipf: exponent 1)."""
    return [1 / (index + 1) if popularity == "zipf" else 1.0 for index in range(number)]
