"""What one H100 is to reach, held against what `tools.gpu_check` measured: a line for each goal.

    python -m tools.gpu_check --out gpu-check --sections step,single,long,server
    python -m tools.gpu_goals gpu-check

Mistral 7B's shape in bfloat16, 64 sequences of 128 tokens in and 256 out. The exit status is the number of goals that
were missed; what was not measured is said and misses nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bench.engine_report import EngineReport, Measurement, engine_report_from


@dataclass(frozen=True, slots=True)
class Goal:
    """`measured` raises LookupError if there is no such figure."""

    what: str
    measured: Callable[[Figures], float]
    bound: float
    at_least: bool = False

    def holds(self, found: float) -> bool:
        return found >= self.bound if self.at_least else found <= self.bound


class Figures:
    """The files of a folder, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def report(self, name: str) -> EngineReport:
        return engine_report_from(self.json(name))

    def json(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if not path.exists():
            raise LookupError(f"there is no {path.name}")
        value: dict[str, Any] = json.loads(path.read_text())
        return value

    def case(self, name: str, adapters: int, mix: int = 0, enabled: bool = False) -> Measurement:
        """The case of so many adapters, of the `mix`-th choice of ranks; without any, LoRA enabled or not."""
        found = [one for one in self.report(name).measurements if one.adapters == adapters]
        return found[int(enabled) if not adapters else mix]


def step(adapters: int, mix: int = 0) -> Callable[[Figures], float]:
    return lambda figures: figures.case("step", adapters, mix).step_ms


def prefill(adapters: int) -> Callable[[Figures], float]:
    return lambda figures: figures.case("step", adapters).prefill_tokens_per_s


def enabled_over_base(figures: Figures) -> float:
    return figures.case("step", 0, enabled=True).step_ms / figures.case("step", 0).step_ms


def single(figures: Figures) -> float:
    return figures.case("single", 1).step_ms / figures.case("single", 0).step_ms


def long_over_limit(figures: Figures) -> float:
    """Of the step with one long context beside the others: how far from what must move, against base's distance."""
    base, beside = figures.report("long").measurements
    return (beside.step_ms / beside.limit_ms) / (base.step_ms / base.limit_ms)


def server(name: str) -> Callable[[Figures], float]:
    return lambda figures: float(figures.json("server")["summary"][name])


GOALS = (
    Goal("step, LoRA not enabled, ms", step(0), 7.0),
    Goal("enabled, none used / base", enabled_over_base, 1.01),
    Goal("step, 1 adapter of rank 16, ms", step(1), 7.6),
    Goal("step, 8 distinct of rank 16, ms", step(8), 7.9),
    Goal("step, 64 distinct of rank 16, ms", step(64), 10.0),
    Goal("step, 64 distinct of ranks 8 to 64, ms", step(64, mix=1), 12.0),
    Goal("prefill, base, tokens/s", prefill(0), 40_000, at_least=True),
    Goal("prefill, 64 distinct of rank 16, tokens/s", prefill(64), 34_000, at_least=True),
    Goal("one sequence, rank 16 / base", single, 1.08),
    Goal("32k context beside 63: step / limit, against base's", long_over_limit, 1.5),
    Goal("64 streams over HTTP / offline tokens/s", server("HTTP / offline"), 0.95, at_least=True),
    Goal(
        "p99 between tokens, cold adapters loading / step",
        server("streams, p99 gap inside / offline step"),
        2.0,
    ),
    Goal("start to first token, s", server("start to first token, s"), 40.0),
)


def lines(figures: Figures, goals: tuple[Goal, ...] = GOALS) -> tuple[list[str], int]:
    """A line for each goal, and how many were missed."""
    found, missed = [], 0
    for goal in goals:
        sign = ">=" if goal.at_least else "<="
        bound = f"{sign} {goal.bound:g}"
        try:
            value = goal.measured(figures)
        except (LookupError, ValueError) as error:
            found.append(f"{goal.what:52} {'':>10} {bound:>9}  not measured: {error}")
            continue
        missed += not goal.holds(value)
        found.append(
            f"{goal.what:52} {value:10.3f} {bound:>9}  {'holds' if goal.holds(value) else 'MISSED'}"
        )
    return found, missed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    shown, missed = lines(Figures(parser.parse_args().folder))
    print("\n".join(shown))
    sys.exit(missed)


if __name__ == "__main__":
    main()
