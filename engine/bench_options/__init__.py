"""Options of `lorax bench`: one dataclass per way to measure, each field with its help and the reader of its text.

They are apart from `engine.bench` so that `lorax --help` does not import the benchmark.
"""

from engine.bench_options.options import BenchOption, Span, bench_options, fill, names
from engine.bench_options.simulation import Pace, SimulatedServer, Simulation, Tenancy, Traffic
from engine.bench_options.workloads import (
    CASES,
    POPULARITIES,
    SHAPE_NAMES,
    Load,
    Popularity,
    Workload,
)

__all__ = [
    "CASES",
    "POPULARITIES",
    "SHAPE_NAMES",
    "BenchOption",
    "Load",
    "Pace",
    "Popularity",
    "SimulatedServer",
    "Simulation",
    "Span",
    "Tenancy",
    "Traffic",
    "Workload",
    "bench_options",
    "fill",
    "names",
]
