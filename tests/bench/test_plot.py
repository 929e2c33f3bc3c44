"""Plots: well-formed pages without external resources, PNG files that open, and odd numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from engine.bench.drawing import Bars, Roofline, ticks
from engine.bench.engine_report import (
    EngineReport,
    Loaded,
    Measurement,
    Placed,
    Work,
    engine_report_from,
)
from engine.bench.load.load_report import Background, LoadReport
from engine.bench.machine import Machine, machine
from engine.bench.plot import check_plot, draw, drawing_of
from engine.bench.quantiles import Times
from engine.bench_options import Load, Workload
from engine.errors import ConfigError

MACHINE = Machine("a <card> & more", "2026-01-02T03:04:05+00:00", {"torch": "2.11.0"})
SVG = "{http://www.w3.org/2000/svg}"


def measurement(case: str, step: float, limit: float, forward: float | None) -> Measurement:
    return Measurement(
        case=case,
        adapters=1,
        step_ms=step,
        rounds_ms=(step, step),
        forward_ms=forward,
        tokens_per_s=100.0,
        prefill_tokens_per_s=1000.0,
        prefill_ms=20 * step,
        decode=Work(10**12, 10**10, 10**9, 10**8),
        prefill=Work(10**14, 10**10, 10**9, 10**8),
        limit_ms=limit,
        share=limit / step,
        ratio=1.0,
        resident=True,
    )


def engine_report() -> EngineReport:
    cases = [
        measurement("base", 7.0, 5.4, 6.5),
        measurement('64 "distinct" <&>', 10.0, 7.2, None),
        measurement("noise", 1.0, 2.0, 0.5),
    ]
    return EngineReport(
        machine=MACHINE,
        workload=Workload(ranks=((16,), (8, 64))),
        model_id="mistral-7b",
        dtype="bfloat16",
        backends={"linear": "extension"},
        copy_bytes_per_s=3e12,
        product_flops_per_s=7e14,
        adapter_bytes=10,
        adapter_memory_fraction=0.2,
        needed_memory_fraction=0.1,
        make_seconds=1.0,
        measurements=cases,
        placed=Placed(8, 100, 2.0, 4.0, 50.0),
        loaded=Loaded(
            adapters=4,
            bytes_each=84,
            first_token_ms=20.0,
            warm_first_token_ms=5.0,
            staged_ms=10.0,
            bytes_per_s=8400.0,
        ),
    )


def times(*values: float) -> Times:
    made = Times.of(value / 1000 for value in values)
    assert made is not None
    return made


def load_report(**changes: object) -> LoadReport:
    report = LoadReport(
        machine=MACHINE,
        url="http://x",
        model="base",
        server={"version": "1"},
        load=Load(),
        seconds=3.0,
        sent=4,
        completed=3,
        errors={"timeout": 1},
        reasons={},
        tokens_per_s=9.0,
        requests_per_s=1.0,
        ttft=times(10, 20, 300),
        ttft_warm=times(10),
        ttft_cold=times(20, 300),
        itl=times(0, 0, 7, 7.5, 8, 60),
        latency=times(100, 100),
        background=Background(
            streams=2,
            restarts=1,
            tokens_per_s=5.0,
            alone=times(7),
            outside=None,
            inside=times(7, 9),
            inside_s=1.0,
        ),
        client_lag=times(0.1),
        client_cpu=0.2,
    )
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


def test_page_of_an_engine(tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    draw(engine_report(), file)
    root = ET.parse(file).getroot()
    svg, roof = root.iter(f"{SVG}svg")
    texts = [node.text for node in svg.iter(f"{SVG}text")]
    assert {"base", '64 "distinct" <&>', "7.00 ms, 77%", "10.00 ms, 72%"} <= set(texts)
    page = "".join(root.itertext())
    for words in ("a <card> & more", "torch 2.11.0", "2026-01-02T03:04:05", "3000.0 GB/s"):
        assert words in page
    # Widths are in the proportion of the times.
    boxes = [node for node in svg.iter(f"{SVG}rect") if node.get("height") == "26.0"]
    widths = [float(str(box.get("width"))) for box in boxes]
    assert widths == pytest.approx([7 * widths[2], 10 * widths[2], widths[2]], abs=1.0)
    assert "<script" not in file.read_text() and not outside(file.read_text())
    # Below the roof, each point by as much as its rate is below the device's.
    roofline = drawing_of(engine_report()).figures[1]
    assert isinstance(roofline, Roofline)
    (line,) = (one for one in roof.iter(f"{SVG}polyline") if one.get("stroke-width") == "2.0")
    corners = [tuple(map(float, at.split(","))) for at in str(line.get("points")).split()]
    decade = (corners[0][1] - corners[1][1]) / math.log10(
        roofline.corners[1][1] / roofline.corners[0][1]
    )
    drawn = [
        (float(str(one.get("cx"))), float(str(one.get("cy")))) for one in roof.iter(f"{SVG}circle")
    ]
    points = [point for point in roofline.points if not point.prefill]
    assert len(drawn) == len(points) == 3
    for (x, y), point in zip(drawn, points, strict=True):
        top = np.interp(x, *zip(*corners, strict=True))
        limit = min(point.flops_per_byte * roofline.bytes_per_s, roofline.flops_per_s)
        assert y - top == pytest.approx(decade * math.log10(limit / point.flops_per_s), abs=0.5)


def test_a_step_that_noise_made_negative(tmp_path: Path) -> None:
    """It is a bar of no width, and no point."""
    report = engine_report()
    noise = measurement("lost in noise", -0.1, 2.0, 0.5)
    report = dataclasses.replace(report, measurements=[*report.measurements, noise])
    draw(report, tmp_path / "a.html")
    ET.parse(tmp_path / "a.html")
    roof = drawing_of(report).figures[1]
    assert isinstance(roof, Roofline)
    assert "lost in noise" not in {point.label for point in roof.points}


def outside(page: str) -> list[str]:
    """External resources of the page."""
    return re.findall(r'(?:src|href|url\()\s*=?\s*["\']?http', page)


def test_page_of_a_server(tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    draw(load_report(), file)
    root = ET.parse(file).getroot()
    assert len(list(root.iter(f"{SVG}svg"))) == 4
    texts = {node.text for node in root.iter(f"{SVG}text")}
    assert {"all", "cold", "warm", "alone", "a cold adapter loads", "milliseconds"} <= texts
    assert "no cold adapter loads" not in texts
    for line in root.iter(f"{SVG}polyline"):
        for point in str(line.get("points")).split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 900 and 0 <= y <= 260
    assert not outside(file.read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {"ttft": None, "itl": None, "latency": None, "background": None, "ttft_cold": None},
        {"itl": times(0, 0, 0)},
        {"itl": times(5)},
    ],
)
def test_pages_of_odd_numbers(tmp_path: Path, changes: dict[str, object]) -> None:
    draw(load_report(**changes), tmp_path / "a.html")
    ET.parse(tmp_path / "a.html")


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    nothing = {"ttft": None, "itl": None, "latency": None, "background": None, "ttft_cold": None}
    for number, report in enumerate((engine_report(), load_report(), load_report(**nothing))):
        file = tmp_path / f"{number}.png"
        draw(report, file)
        with Image.open(file) as image:
            image.load()
            assert image.width > 500 and len(image.convert("L").getcolors() or []) > 2


def test_png_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="matplotlib") as raised:
        check_plot(tmp_path / "a.png")
    assert raised.value.hint is not None and "pip install matplotlib" in raised.value.hint


def test_other_endings() -> None:
    with pytest.raises(ConfigError, match="unknown file type"):
        check_plot(Path("a.pdf"))


def test_drawing_of_either() -> None:
    figure, _ = drawing_of(engine_report()).figures
    assert isinstance(figure, Bars) and [bar.label for bar in figure.bars][0] == "base"
    assert ("errors", "1 x timeout") in drawing_of(load_report()).facts


def test_ticks() -> None:
    assert list(ticks(3.0, 150.0)) == pytest.approx([5, 10, 20, 50, 100])
    assert list(ticks(0.02, 0.02)) == pytest.approx([0.02])


def test_report_goes_to_json_and_back() -> None:
    report = engine_report()
    assert engine_report_from(json.loads(json.dumps(report.to_json()))) == report


def test_machine_tells_versions() -> None:
    import torch

    found = machine("x")
    assert found.device == "x" and found.versions["torch"] == torch.__version__
    assert {"lorax", "python", "system"} <= found.versions.keys() and found.date.endswith("+00:00")
