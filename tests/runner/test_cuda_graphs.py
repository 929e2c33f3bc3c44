"""Captured steps give what the same steps give when each kernel is launched by itself, and no launch waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.messages import StepPlan
from engine.ops import extension
from engine.runner.inputs import Description
from engine.runner.runner import Runner
from engine.runner.shapes import Shape
from tests.engine.harness import Harness, config_of, request
from tests.runner.twins import PARAMETERS, Scene, Twins, make_scene, small_config
from tests.tiny import VOCAB

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    assert "prepare_step_" in extension.load_cuda().ops, extension.load_cuda().reason
    return make_scene(tmp_path_factory.mktemp("graphs"))


def watch(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[Shape], list[int]]:
    """How often each shape is replayed from now on, and the number of steps that fit none."""
    graphs = runner.graphs
    assert graphs is not None
    replayed: Counter[Shape] = Counter()
    eager = [0]
    replay, build = graphs.replay, runner.builder.build

    def counted_replay(captured: Any, description: Description) -> Any:
        replayed[captured.shape] += 1
        return replay(captured, description)

    def counted_build(description: Description) -> Any:
        eager[0] += 1
        return build(description)

    monkeypatch.setattr(graphs, "replay", counted_replay)
    monkeypatch.setattr(runner.builder, "build", counted_build)
    return replayed, eager


@pytest.mark.parametrize("ahead", [0, 1], ids=["in turn", "run ahead"])
@pytest.mark.parametrize("step_tokens", [23, 200, 600])
def test_graphs_are_eager(
    scene: Scene, ahead: int, step_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 random steps: admissions, chunks, endings, preemptions, and adapters that come and go."""
    config = small_config(scene, max_batch_prefill_tokens=step_tokens)
    plain = replace(config, memory=replace(config.memory, eager=True))
    twins = Twins(scene, config, plain)
    runner = twins.padded.engine.runner
    assert runner.graphs is not None and twins.plain.engine.runner.graphs is None
    captured = dict(runner.graphs.captured)
    replayed, eager = watch(runner, monkeypatch)
    twins.run(200, seed=step_tokens + ahead, longest=min(150, 4 * step_tokens), ahead=ahead)
    assert runner.graphs.captured == captured  # nothing was captured again
    assert any(shape.chunks for shape in replayed) and any(not shape.chunks for shape in replayed)
    assert 0 < eager[0] < sum(replayed.values())  # prompts whose log-probabilities are wanted
    assert twins.padded.engine.stats.evictions > 0
    twins.close()


@contextmanager
def no_waiting() -> Iterator[None]:
    """An operation that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("eager", [False, True])
def test_a_launch_never_waits(scene: Scene, eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Admission, chunks, decode and every way of sampling, once libraries have what they allocate once."""
    config = config_of(scene.base, arena_mib=8, max_batch_prefill_tokens=60, max_batch_size=20)
    harness = Harness(replace(config, memory=replace(config.memory, eager=eager)))
    images = [None, *map(harness.stage, scene.adapters[:4])]
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, VOCAB, (18, 40), generator=generator).tolist()
    requests = [
        request(
            str(i),
            prompt[: 3 + 2 * i],
            images[i % len(images)],
            max_new_tokens=5 + i,
            seed=i,
            num_alternatives=i % 3,
            prompt_logprobs=i % 7 == 0,
            **PARAMETERS[i % len(PARAMETERS)],
        )
        for i, prompt in enumerate(prompts)
    ]
    first = harness.run(requests)
    runner = harness.engine.runner
    launch = runner.launch
    launched: list[StepPlan] = []

    def checked(plan: StepPlan) -> None:
        launched.append(plan)
        with no_waiting():
            launch(plan)

    monkeypatch.setattr(runner, "launch", checked)
    again = harness.run(requests)
    assert len(launched) > 20
    assert [again[id].tokens for id in again] == [first[id].tokens for id in first]
    harness.close()
