"""What the benchmark of an engine in this process is asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar, get_args

from engine.bench.options import Ask, amount, count, counts, one_of, some_of, words
from engine.bench.shapes import SHAPES
from engine.errors import ConfigError

T = TypeVar("T")

Popularity = Literal["distinct", "uniform", "zipf", "identical"]
POPULARITIES: tuple[Popularity, ...] = get_args(Popularity)
KINDS = ("base", "enabled", "adapters", "long", "files")


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured."""

    batch: Annotated[int, Ask("Requests that run at the same time.", count, "8")] = 8
    input_tokens: Annotated[
        int, Ask("Tokens of every prompt; with --url also a range: 64-256.", count, "64")
    ] = 64
    output_tokens: Annotated[
        int, Ask("Tokens generated for every prompt; with --url also a range.", count, "32")
    ] = 32
    adapters: Annotated[
        int,
        Ask(
            "Adapters to make. With --url: names, a,b or a{0..63}, or @file with one name a line.",
            count,
            "8; with --url none",
        ),
    ] = 8
    ranks: Annotated[
        tuple[tuple[int, ...], ...],
        Ask(
            "Ranks of the adapters, given out in turn: 8,16,32. Repeat for a further case.",
            counts,
            "16",
            repeated=True,
        ),
    ] = ((16,),)
    targets: Annotated[
        tuple[str, ...],
        Ask("Targets of the adapters: q_proj,v_proj.", words, "every linear of the layers"),
    ] = ()
    popularity: Annotated[
        tuple[Popularity, ...],
        Ask(
            "Who uses which adapter: distinct, uniform, zipf, identical; without --url several.",
            some_of(*POPULARITIES),
            "distinct; with --url uniform",
        ),
    ] = ("distinct",)
    long_context: Annotated[
        int, Ask("One request of this context beside the others, as a case.", amount, "none")
    ] = 0
    files: Annotated[int, Ask("Adapters to load from files, as a case.", amount, "4")] = 4
    cases: Annotated[
        tuple[str, ...],
        Ask(
            "Which cases: base (an engine without adapters), enabled, adapters, long, files.",
            some_of(*KINDS),
            "all",
        ),
    ] = KINDS
    shape: Annotated[
        str,
        Ask(f"Random weights of a known shape: {', '.join(SHAPES)}.", one_of(*SHAPES), "the model"),
    ] = ""
    repeat: Annotated[int, Ask("Rounds of every case, in turn.", count, "3")] = 3
    seed: Annotated[
        int, Ask("Seed of prompts, adapters, popularity and arrivals.", amount, "0")
    ] = 0

    def check(self) -> None:
        """Raises ConfigError for what cannot be measured."""
        if self.output_tokens < 2:
            raise ConfigError(
                "--output-tokens must be above 1: a decode step follows the first token",
                field="output_tokens",
            )
        if self.long_context and self.batch < 2:
            raise ConfigError(
                "--long-context is one request beside others",
                field="batch",
                hint="give it a --batch of 2 or more",
            )


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the report."""

    name: str
    kind: Literal["base", "enabled", "adapters", "long"]
    mix: int = 0  # index in the workload's `ranks`
    distinct: int = 0  # adapters to choose from
    popularity: Popularity = "distinct"


def cases_of(workload: Workload) -> list[Case]:
    """The cases in the order in which they run and are shown."""
    cases: list[Case] = []
    if "base" in workload.cases:
        cases.append(Case("base", "base"))
    if "enabled" in workload.cases:
        cases.append(Case("LoRA enabled, none used", "enabled"))
    if "adapters" in workload.cases:
        cases += _adapter_cases(workload)
    if "long" in workload.cases and workload.long_context:
        beside = f"1 x {workload.long_context} beside {workload.batch - 1}"
        cases.append(Case(beside, "long"))
    return cases


def _adapter_cases(workload: Workload) -> list[Case]:
    most, first = workload.adapters, spelled(workload.ranks[0])
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
        cases.append(Case(f"{number} distinct, {spelled(ranks)}", "adapters", mix, number))
    return cases


def spelled(ranks: Sequence[int]) -> str:
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
    """How often each of `number` adapters is chosen, relative to the others (zipf: exponent 1)."""
    return [1 / (index + 1) if popularity == "zipf" else 1.0 for index in range(number)]
