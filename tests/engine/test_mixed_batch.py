"""Sixteen requests on sixteen adapters in one batch give what each gives alone, however the engine is squeezed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.messages import Request
from tests.engine.harness import Harness, Outcome, config_of, request
from tests.tiny import TARGETS, VOCAB, make_adapter, make_model

TOLERANCE = 1e-4
RANKS = [3, 8, 16, 64, 5, 12, 32, 48, 4, 7, 24, 40, 6, 10, 20, 33]
ARENA_OF_FEW = 1  # MiB, of 1.6 in all


@dataclass
class Scene:
    base: Path
    adapters: list[Path]
    prompts: list[list[int]]
    alone: dict[str, Outcome]

    def requests(self, harness: Harness) -> list[Request]:
        """One request per adapter, two of the base; half greedy, half sampled with their own seeds."""
        images = [*map(harness.stage, self.adapters), None, None]
        return [
            request(
                str(i),
                prompt,
                image,
                max_new_tokens=12,
                temperature=0.0 if i % 2 else 0.9,
                seed=i,
                repetition_penalty=1.2 if i % 3 == 0 else 1.0,
            )
            for i, (image, prompt) in enumerate(zip(images, self.prompts, strict=True))
        ]


def prompts() -> list[list[int]]:
    """Prompts of 5 to 90 tokens; every fourth begins with the same 40."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(2, VOCAB, (40,), generator=generator).tolist()
    found = []
    for i in range(18):
        length = 5 + (i * 37) % 86
        tokens = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
        found.append(shared + tokens[:30] if i % 4 == 0 else tokens)
    return found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("mixed")
    model = make_model("llama", folder / "base")
    adapters = []
    for i, rank in enumerate(RANKS):
        adapters.append(folder / f"adapter{i}")
        targets = list(TARGETS)[i % len(TARGETS)]
        make_adapter(model, adapters[-1], seed=i, rank=rank, targets=targets).unload()
    harness = Harness(config_of(folder / "base", arena_mib=16))
    found = Scene(folder / "base", adapters, prompts(), {})
    for one in found.requests(harness):
        found.alone |= harness.run([one])
    harness.close()
    return found


@pytest.fixture(params=[0, 1], ids=["in turn", "run ahead"])
def make(scene: Scene, request: pytest.FixtureRequest) -> Iterator[Callable[..., Harness]]:
    """Engines that launch a step after, or before, the one before it was read back."""
    made: list[Harness] = []

    def build(**options: object) -> Harness:
        config = config_of(scene.base, **options)  # type: ignore[arg-type]
        made.append(Harness(config, run_ahead=request.param))
        return made[-1]

    yield build
    for harness in made:
        harness.close()


def assert_equal(outcomes: dict[str, Outcome], expected: dict[str, Outcome]) -> None:
    assert outcomes.keys() == expected.keys()
    for id, outcome in outcomes.items():
        assert outcome.error is None
        assert outcome.tokens == expected[id].tokens, id
        torch.testing.assert_close(
            torch.tensor(outcome.logprobs),
            torch.tensor(expected[id].logprobs),
            atol=TOLERANCE,
            rtol=0,
        )


def assert_idle(harness: Harness) -> None:
    stats = harness.engine.stats
    assert (stats.waiting, stats.running) == (0, 0)
    assert stats.free_blocks == stats.total_blocks


def test_the_alone_runs_differ_from_each_other(scene: Scene) -> None:
    texts = {tuple(outcome.tokens) for outcome in scene.alone.values()}
    assert len(texts) == len(scene.alone)


def test_mixed_batch(scene: Scene, make: Callable[..., Harness]) -> None:
    harness = make(arena_mib=16, max_batch_prefill_tokens=4096)
    assert_equal(harness.run(scene.requests(harness)), scene.alone)
    assert harness.engine.stats.steps < 30  # they did share their steps
    assert_idle(harness)


def test_chunked_prefill(scene: Scene, make: Callable[..., Harness]) -> None:
    harness = make(arena_mib=16, max_batch_prefill_tokens=19, max_batch_size=18)
    assert_equal(harness.run(scene.requests(harness)), scene.alone)
    assert_idle(harness)


def test_prefix_cache(scene: Scene, make: Callable[..., Harness]) -> None:
    harness = make(arena_mib=16)
    requests = scene.requests(harness)
    assert_equal(harness.run(requests), scene.alone)
    again = harness.run(requests)
    assert_equal(again, scene.alone)
    assert sum(outcome.usage.cached_tokens for outcome in again.values() if outcome.usage) > 400
    assert_idle(harness)


def test_no_prefix_cache(scene: Scene, make: Callable[..., Harness]) -> None:
    harness = make(arena_mib=16, prefix_caching=False)
    requests = scene.requests(harness)
    for _ in range(2):
        outcomes = harness.run(requests)
        assert_equal(outcomes, scene.alone)
        assert all(o.usage and o.usage.cached_tokens == 0 for o in outcomes.values())
    assert_idle(harness)


def test_preemption(scene: Scene, make: Callable[..., Harness]) -> None:
    def long_ones(harness: Harness) -> list[Request]:
        images = [*map(harness.stage, scene.adapters[:5]), None]
        return [
            request(str(i), scene.prompts[i][:5], image, max_new_tokens=50)
            for i, image in enumerate(images)
        ]

    roomy = make(arena_mib=16)
    alone: dict[str, Outcome] = {}
    for one in long_ones(roomy):
        alone |= roomy.run([one])
    for caching in (False, True):
        tight = make(arena_mib=16, max_batch_total_tokens=200, block_size=4, prefix_caching=caching)
        assert_equal(tight.run(long_ones(tight)), alone)
        assert tight.engine.stats.preemptions > 0
        assert_idle(tight)


def test_adapters_exchanged_during_the_run(scene: Scene, make: Callable[..., Harness]) -> None:
    harness = make(arena_mib=ARENA_OF_FEW)
    assert_equal(harness.run(scene.requests(harness)), scene.alone)
    assert harness.engine.stats.evictions > 0
    assert_idle(harness)


def test_everything_at_once(scene: Scene, make: Callable[..., Harness]) -> None:
    harness = make(
        arena_mib=ARENA_OF_FEW,
        max_batch_total_tokens=208,
        max_batch_prefill_tokens=23,
        max_batch_size=7,
        block_size=4,
    )
    requests = scene.requests(harness)
    for _ in range(2):
        assert_equal(harness.run(requests), scene.alone)
    assert_idle(harness)


def test_large_blocks(scene: Scene, make: Callable[..., Harness]) -> None:
    harness = make(arena_mib=8, block_size=256)
    assert_equal(harness.run(scene.requests(harness)), scene.alone)
    assert_idle(harness)
