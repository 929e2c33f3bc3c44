"""`lorax bench simulate`: its options, its report in every form, and its place below `lorax bench`."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.bench.simulate.report import simulation_report_from
from engine.bench.simulate.run import simulate
from engine.bench_options import (
    Pace,
    SimulatedServer,
    Simulation,
    Span,
    Traffic,
    bench_options,
    fill,
)
from lorax_cli.app import app

SMALL = "--requests 60 --rate 200 --adapters 20 --input-tokens 8-40 --output-tokens 5 --seed 3"
TRAFFIC = Traffic(60, 200.0, 20, input_tokens=Span(8, 40), output_tokens=Span(5, 5), seed=3)


@pytest.mark.parametrize("cls", [Traffic, SimulatedServer, Pace])
def test_the_defaults_of_the_help_are_the_defaults(cls: type) -> None:
    given = {name: option.default for name, option in bench_options(cls)}
    assert fill(cls, given) == cls()


def test_every_form_of_the_report(tmp_path: Path) -> None:
    file, plot = tmp_path / "a.json", tmp_path / "a.html"
    words = ["bench", "simulate", *SMALL.split(), "--arena-gb", "0.5"]
    report = simulate(Simulation(TRAFFIC, SimulatedServer(arena_gb=0.5)))
    printed = CliRunner().invoke(app, [*words, "--json", "-"])
    assert printed.exit_code == 0, printed.output
    assert simulation_report_from(json.loads(printed.stdout)) == report
    shown = CliRunner().invoke(
        app, [*words, "--json", str(file), "--plot", str(plot)], env={"COLUMNS": "200"}
    )
    assert simulation_report_from(json.loads(file.read_text())) == report
    assert "60 of 60 requests" in shown.stdout and f"{report.placements} placements" in shown.stdout
    assert report.ttft is not None and f"{report.ttft.p99:.2f}" in shown.stdout
    texts = {node.text for node in ET.parse(plot).iter("{http://www.w3.org/2000/svg}text")}
    assert {"all", "source", "requests"} <= texts
    bare = CliRunner().invoke(app, [*words, "--quiet"])
    figures = dict(line.split("\t") for line in bare.stdout.splitlines())
    assert float(figures["first token, p99, ms"]) == pytest.approx(report.ttft.p99, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("bench --seed 3 simulate", "--seed has no effect before simulate"),
        ("bench --url http://x simulate", "--url has no effect before simulate"),
        ("bench simulate --requests 0", "--requests: '0' must be above 0"),
        ("bench simulate --adapter-mb 84,0", "--adapter-mb"),
        ("bench simulate --arena-gb 0.01", "does not fit"),
        ("bench simulate --plot a.pdf", "unknown file type"),
    ],
)
def test_bad_options(words: str, error: str) -> None:
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2, result.output
    assert error in result.stderr
