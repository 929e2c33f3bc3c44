"""A quantised base with adapters on a GPU: in a batch, against its dequantised weights, from graphs and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.harness import Harness
from tests.engine.test_quantised import (
    TOLERANCE,
    Scene,
    assert_like_dequantised,
    assert_same_but_for_ties,
    every_scheme,
    quantised,
    run,
    scene,
    scores,
)

__all__ = ["scene"]  # a fixture

pytestmark = pytest.mark.gpu


@every_scheme
def test_mixed_batch(scene: Scene, scheme: str) -> None:
    config = quantised(scene.folder, scheme)
    alone = run(config, scene, together=False, temperature=0.0)
    together = run(config, scene, temperature=0.0)
    assert_same_but_for_ties(together, alone, TOLERANCE[scheme])


@every_scheme
def test_like_dequantised(scene: Scene, scheme: str, tmp_path: Path) -> None:
    assert_like_dequantised(scene, scheme, tmp_path)


@every_scheme
def test_graphs_are_like_eager(scene: Scene, scheme: str) -> None:
    config = quantised(scene.folder, scheme)
    harness = Harness(config)
    assert harness.engine.info.device == "cuda" and harness.engine.runner.graphs is not None
    harness.close()
    graphs = run(config, scene, temperature=0.0)
    eager = replace(config, memory=replace(config.memory, eager=True))
    assert_same_but_for_ties(graphs, run(eager, scene, temperature=0.0), TOLERANCE[scheme])


@every_scheme
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(scene: Scene, scheme: str, dtype: str) -> None:
    """Quantised weights lose no more by 16 bits than plain ones do, up to a few roundings in a kernel."""
    lost = []
    for one in (None, scheme):
        exact = scores(quantised(scene.folder, one), scene)
        half = scores(quantised(scene.folder, one, dtype=dtype), scene)
        lost.append((half - exact).abs().max().item())
    assert lost[1] < 4 * lost[0]
