"""The tables of `lorax bench`: complete at any width, with the reason of every failure."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from lorax_cli.bench_tables import engine_lines, engine_table, load_lines, load_table
from tests.bench.test_plot import engine_report, load_report, measurement

CASES = [
    "base",
    "64 distinct, ranks 8/16/32/64",
    "identical of 128, rank 256",
    "1 x 32768 with 63 short",
]


def shown(table: Any, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_nothing_is_cut(width: int) -> None:
    """Case names wrap; figures do not."""
    cases = [measurement(name, 11.0, 8.0, 10.0) for name in CASES]
    report = dataclasses.replace(engine_report(), measurements=cases)
    text = shown(engine_table(report), width)
    assert "…" not in text
    for one in cases:
        assert set(one.case.split()) <= set(text.split())
        assert f"{one.step_ms:.2f}" in text and f"{one.decode.num_bytes / 1e6:.1f}" in text
    assert "…" not in shown(load_table(load_report()), width)


def test_bare_lines_are_the_report() -> None:
    report = engine_report()
    figures = dict(line.split("\t") for line in engine_lines(report).splitlines())
    assert {name: float(value) for name, value in figures.items()} == {
        one.case: one.step_ms for one in report.measurements
    }
    server = load_report()
    found = dict(line.split("\t") for line in load_lines(server).splitlines())
    assert server.ttft is not None and server.itl is not None
    assert float(found["first token, p99, ms"]) == pytest.approx(server.ttft.p99, abs=1e-3)
    assert float(found["between tokens, p50, ms"]) == pytest.approx(server.itl.p50, abs=1e-3)
    assert float(found["tokens/s"]) == server.tokens_per_s


def test_reasons_are_printed_verbatim() -> None:
    """The server's text is not markup."""
    report = load_report(errors={"404 x": 2, "timeout": 1}, reasons={"404 x": "no [bold]such"})
    text = shown(load_table(report), 200)
    assert "2 x 404 x; the first: no [bold]such" in text and "1 x timeout" in text
