"""Goals of a GPU against the files of its measurements."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tests.bench.test_plot import engine_report, measurement
from tools.gpu_check import SECTIONS
from tools.gpu_goals import GOALS, Figures, lines

# adapters of the case, milliseconds of its step; the two mixes of 64 come in this order
STEPS = ((0, 7.0), (0, 7.07), (1, 7.6), (8, 7.9), (64, 10.0), (64, 12.0))


def write(folder: Path, name: str, *cases: tuple[int, float, float, float]) -> None:
    """A report of cases: adapters, step, limit, prefill."""
    made = [
        dataclasses.replace(
            measurement(str(n), step, limit, None), adapters=n, prefill_tokens_per_s=prefill
        )
        for n, step, limit, prefill in cases
    ]
    report = dataclasses.replace(engine_report(), measurements=made)
    (folder / f"{name}.json").write_text(json.dumps(report.to_json()))


def write_all(folder: Path, slower: float) -> None:
    """Every figure at its bound, and times longer by a factor, rates smaller."""
    rates = {0: 40_000 / slower, 64: 34_000 / slower}
    write(folder, "step", *((n, ms * slower, 5.0, rates.get(n, 1.0)) for n, ms in STEPS))
    write(folder, "single", (0, 5.0, 4.0, 1.0), (1, 5.4 * slower, 4.0, 1.0))
    write(folder, "long", (0, 7.0, 5.0, 1.0), (0, 10.5 * slower, 5.0, 1.0))
    summary = {
        "HTTP / offline": 0.95 / slower,
        "streams, p99 gap inside / offline step": 2.0 * slower,
        "start to first token, s": 40.0 * slower,
    }
    (folder / "server.json").write_text(json.dumps({"summary": summary}))


def test_goals_hold_at_their_bounds_and_not_beyond(tmp_path: Path) -> None:
    write_all(tmp_path, 1 - 1e-9)
    shown, missed = lines(Figures(tmp_path))
    assert missed == 0 and all(line.endswith("holds") for line in shown)
    write_all(tmp_path, 1.001)
    shown, missed = lines(Figures(tmp_path))
    of_ratio = [goal.what for goal in GOALS if goal.what.startswith("enabled")]
    assert [line.endswith("MISSED") for line in shown] == [g.what not in of_ratio for g in GOALS]
    assert missed == len(GOALS) - len(of_ratio)


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    shown, missed = lines(Figures(tmp_path))
    assert missed == 0 and all("not measured: there is no" in line for line in shown)
    (tmp_path / "server.json").write_text(json.dumps({"summary": {}}))
    shown, missed = lines(Figures(tmp_path))
    assert missed == 0 and "not measured: 'start to first token, s'" in shown[-1]


def test_every_file_that_a_goal_reads_has_a_section(tmp_path: Path) -> None:
    names = {section.name for section in SECTIONS}
    shown, _ = lines(Figures(tmp_path))
    assert {line.split("there is no ")[1].removesuffix(".json") for line in shown} <= names
