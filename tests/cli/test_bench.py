"""`lorax bench` on a tiny model: it measures every case, and its numbers are what they say."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine import bench
from engine.config import EngineConfig, ModelConfig
from engine.lora.image import image_size, read_image
from engine.messages import AdapterImageRef
from engine.models import adapter_layout
from lorax_cli.app import app
from tests.tiny import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", folder)
    return folder


def refs(number: int) -> list[AdapterImageRef]:
    return [AdapterImageRef(bytes([index]), 0, 0, 0) for index in range(number)]


def test_popularity() -> None:
    chooser = random.Random(0)
    eight = refs(8)
    assert bench.assign(eight, 16, "distinct", chooser) == eight * 2
    assert bench.assign(eight, 16, "identical", chooser) == [eight[0]] * 16
    zipf = bench.assign(eight, 1000, "zipf", chooser)
    counts = [zipf.count(ref) for ref in eight]
    assert counts[0] > 2 * counts[3] > 0
    uniform = bench.assign(eight, 1000, "uniform", chooser)
    assert all(80 < uniform.count(ref) < 180 for ref in eight)


def test_adapters_are_what_was_asked_for(model: Path) -> None:
    config = EngineConfig(model=ModelConfig(model_id=str(model)))
    layout, _, _ = adapter_layout(config.model)
    workload = bench.Workload(adapters=4, ranks=(8, 3), targets=("q_proj", "down_proj"))
    images = bench.Images(layout, workload)
    assert len({ref.digest for ref in images.refs}) == 4
    for number, ref in enumerate(images.refs):
        start, rank = ref.offset, workload.ranks[number % 2]
        size = image_size(bench.random_adapter(layout, rank, workload.targets), layout)
        assert ref.data_bytes == size.data_bytes
        pairs = read_image(images.region.view[start : start + size.total], layout)
        assert len(pairs) == 2 * layout.num_layers
        for a, b, scale in pairs.values():
            assert a.shape[0] == rank and scale == bench.SCALE
            assert a.ne(0).any() and b.ne(0).any()
    images.region.close()


def test_command(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    sizes = "--batch 3 --input-tokens 8 --output-tokens 4 --adapters 2 --ranks 4,9 --repeat 2"
    result = CliRunner().invoke(
        app,
        [
            *("bench", "--model-id", str(model), *sizes.split()),
            *("--popularity", "distinct,identical", "--json", str(file)),
            *("--cpu-memory-gb", "0.2"),
        ],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert [one["case"] for one in report["measurements"]] == ["base", "distinct", "identical"]
    base, distinct, identical = report["measurements"]
    assert base["ratio"] == 1 and base["adapters"] == 0
    assert (distinct["adapters"], identical["adapters"]) == (2, 1)
    assert distinct["must_move_bytes"] > identical["must_move_bytes"] > base["must_move_bytes"]
    for one in report["measurements"]:
        assert one["resident"] and one["step_ms"] > 0 and one["tokens_per_s"] > 0
        assert one["case"] in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "8,x"], "--ranks"),
        (["--popularity", "distinct,fair"], "'fair'"),
        (["--batch", "0"], "--batch"),
        (["--output-tokens", "1"], "--output-tokens"),
        (["--targets", "nonsense"], "nonsense"),
    ],
)
def test_bad_values(model: Path, arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--model-id", str(model), *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
