"""`lorax bench` on a tiny model: it measures every case, and its numbers are correct."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.bench.adapters import size_of
from engine.bench.drawing import Roofline
from engine.bench.engine_report import engine_report_from
from engine.bench.plot import drawing_of
from engine.config import ModelConfig
from engine.models import adapter_layout
from lorax_cli.app import app
from tests.cli.conftest import FakeServer
from tests.tiny import make_model

CASES = [
    "base",
    "LoRA enabled, none used",
    "1 adapter, rank 4",
    "2 distinct, rank 4",
    "identical of 2, rank 4",
    "2 distinct, ranks 4/9",
    "1 x 100 with 2 short",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", folder)
    return folder


def test_in_this_process(model: Path, tmp_path: Path) -> None:
    file, plot = tmp_path / "bench.json", tmp_path / "bench.html"
    sizes = "--batch 3 --input-tokens 8 --output-tokens 12 --adapters 2 --ranks 4 --ranks 4,9"
    result = CliRunner().invoke(
        app,
        [
            *("bench", "--model-id", str(model), *sizes.split(), "--repeat", "2", "--files", "2"),
            *("--popularity", "distinct,identical", "--long-context", "100"),
            *("--json", str(file), "--plot", str(plot), "--cpu-memory-gb", "0.2"),
        ],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == 0, result.output
    report = engine_report_from(json.loads(file.read_text()))
    by_name = {one.case: one for one in report.measurements}
    assert list(by_name) == CASES
    for one in report.measurements:
        assert one.case in result.stdout
        assert one.resident and one.tokens_per_s > 0 and one.prefill_tokens_per_s > 0
        assert len(one.rounds_ms) == 2 and one.forward_ms is not None and one.forward_ms > 0
        assert one.limit_ms == pytest.approx(one.decode.num_bytes / report.copy_bytes_per_s * 1e3)
        assert one.prefill_ms > 0 and one.decode.flops > 0
        assert one.share == pytest.approx(one.limit_ms / one.step_ms)
    assert [one.adapters for one in report.measurements] == [0, 0, 1, 2, 1, 2, 0]
    layout, spec, _ = adapter_layout(ModelConfig(model_id=str(model)))
    four, nine = (size_of(layout, rank).data_bytes for rank in (4, 9))
    assert by_name["2 distinct, rank 4"].decode.adapter_bytes == 2 * four
    assert by_name["2 distinct, ranks 4/9"].decode.adapter_bytes == four + nine
    position = spec.num_layers * 2 * spec.attention.kv_heads * spec.attention.head_dim * 4
    assert by_name["base"].decode.kv_bytes == 3 * (8 + 6) * position
    assert by_name["1 x 100 with 2 short"].decode.kv_bytes == (2 * (8 + 6) + 100 - 6) * position
    assert report.placed is not None and report.placed.adapters == 4
    assert report.loaded is not None and report.loaded.adapters == 2
    assert report.loaded.bytes_each == four
    assert report.adapter_memory_fraction == report.needed_memory_fraction > 0
    assert f"{report.needed_memory_fraction:.4f}" in result.stdout
    ET.parse(plot)
    _, roof = drawing_of(report).figures
    assert isinstance(roof, Roofline)
    found = {(point.label, point.prefill): point for point in roof.points}
    for one in report.measurements:
        if one.step_ms > 0:  # it may not be, on a busy machine
            decode = found[one.case, False]
            of_roof = decode.flops_per_s / (decode.flops_per_byte * roof.bytes_per_s)
            assert of_roof == pytest.approx(one.share)
        seconds = one.prefill.flops / found[one.case, True].flops_per_s
        requests = 2 if "short" in one.case else 3
        assert requests * 8 / seconds == pytest.approx(one.prefill_tokens_per_s)


def test_a_known_shape_and_a_single_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.bench import shapes

    small = shapes.SHAPES["smollm2-135m"] | {"num_hidden_layers": 1, "hidden_size": 36}
    monkeypatch.setitem(shapes.SHAPES, "smollm2-135m", small | {"head_dim": 4})
    words = "bench --shape smollm2-135m --batch 1 --input-tokens 4 --output-tokens 5 --repeat 1"
    memory = ["--cpu-memory-gb", "0.2", "--files", "0"]
    result = CliRunner().invoke(app, [*words.split(), *memory, "--json", "-"])
    assert result.exit_code == 0, result.output
    report = engine_report_from(json.loads(result.stdout))
    assert report.model_id == "smollm2-135m, random weights" and report.loaded is None
    names = [one.case for one in report.measurements]
    assert names == ["base", "LoRA enabled, none used", "1 adapter, rank 16"]


def test_too_little_memory_is_reported(model: Path) -> None:
    """The user's fraction stays, and a warning names the effect."""
    result = CliRunner().invoke(
        app,
        [
            *("bench", "--model-id", str(model), "--batch", "4", "--input-tokens", "4"),
            *("--output-tokens", "6", "--adapters", "4", "--ranks", "128", "--repeat", "1"),
            *("--cases", "adapters", "--cpu-memory-gb", "0.02"),
            *("--adapter-memory-fraction", "0.15", "--max-adapter-rank", "128"),
        ],
    )
    assert result.exit_code != 0 or "adapters were copied to the device during" in result.stderr, (
        result.output
    )
    assert "0.1500" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "8,x"], "--ranks"),
        (["--popularity", "distinct,fair"], "'fair'"),
        (["--batch", "0"], "--batch"),
        (["--output-tokens", "1"], "--output-tokens"),
        (["--output-tokens", "1000"], "exceed the model's limit of 256"),
        (["--targets", "nonsense"], "nonsense"),
        (["--merge-adapter-weights", "--adapter-id", "a"], "has no effect on steps"),
        (["--shape", "mistral-7b"], "exclude each other"),
        (["--long-context", "50", "--batch", "1"], "together with short ones"),
        (["--long-context", "50", "--cases", "long"], "too short: the case takes"),
        (["--cases", "long"], "no case to measure"),
        (["--rate", "3"], "--rate needs --url"),
        (["--url", "http://x", "--ranks", "8"], "--ranks has no effect with --url"),
        (["--url", "http://x", "--rate", "3", "--concurrency", "2"], "exclude each other"),
        (["--plot", "a.pdf"], "unknown file type"),
        (["--plot", "nowhere/a.html"], "--plot nowhere/a.html: folder"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json: folder"),
        (["--json", "/"], "is a folder"),
        (["--url", "ftp://x"], "'ftp://x' is not a valid server URL"),
        (["--url", "localhost:port"], "'localhost:port' is not a valid server URL"),
    ],
)
def test_bad_values(model: Path, arguments: list[str], words: str) -> None:
    given = ["bench", "--model-id", str(model), "--cpu-memory-gb", "0.2", *arguments]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2, result.output
    assert words in result.stderr


def test_over_http(server: FakeServer, tmp_path: Path) -> None:
    from engine.bench.load.load_report import load_report_from

    plot = tmp_path / "load.html"
    words = "--requests 5 --concurrency 2 --warm-up 0 --api openai --popularity zipf"
    result = CliRunner().invoke(
        app,
        ["bench", "--url", server.url, *words.split(), "--json", "-", "--plot", str(plot)],
    )
    assert result.exit_code == 1, result.output
    assert "none of the 5 requests" in result.stderr
    report = load_report_from(json.loads(result.stdout))
    assert report.errors == {"404": 5} and report.completed == 0  # it has no such route
    ET.parse(plot)
    table = CliRunner().invoke(app, ["bench", "--url", server.url, *words.split()])
    assert "5 x 404" in table.stdout and "0 of 5 requests" in table.stdout
