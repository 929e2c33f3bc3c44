"""Pinned and dropped adapters on a real engine, with steps in turn and ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.messages import AdapterImageRef
from tests.engine.harness import MIB, Harness, config_of, request
from tests.tiny import make_adapter, make_model

PROMPT = [5, 6, 7]
Make = Callable[..., Harness]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pins")
    model = make_model("llama", folder / "base")
    for seed in range(6):
        make_adapter(model, folder / f"{seed}", seed=seed, rank=8).unload()
    return folder


@pytest.fixture(params=[0, 1], ids=["in turn", "run ahead"])
def make(folder: Path, request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[Harness] = []

    def build() -> Harness:
        made.append(Harness(config_of(folder / "base"), run_ahead=request.param))
        return made[-1]

    yield build
    for harness in made:
        harness.close()


def residents(harness: Harness) -> set[bytes]:
    return {digest for _, digest, _ in harness.engine.stats.resident}


def small_arena(harness: Harness, image: AdapterImageRef, adapters: int) -> None:
    """Leaves room for so many adapters like this one."""
    size = -(-image.data_bytes // 256) * 256
    harness.engine.scheduler.slots.arena_bytes = adapters * size  # type: ignore[attr-defined]
    assert size * adapters < 8 * MIB


def test_a_dropped_adapter_leaves_when_its_request_ends(make: Make, folder: Path) -> None:
    """No other request is needed for it."""
    harness = make()
    engine, image = harness.engine, harness.stage(folder / "0")
    engine.submit(request("a", PROMPT, image, max_new_tokens=20))
    while not engine.stats.in_use:
        engine.step()
    engine.drop(image.digest)
    tokens = 0
    while engine.has_work:
        assert residents(harness) == {image.digest} or not engine.stats.running
        tokens += sum(len(update.tokens) for update in engine.step())
        engine.scheduler.check()
    assert tokens >= 15, "the request went on"
    assert not residents(harness) and engine.stats.arena_used == 0


def test_an_idle_adapter_leaves_at_once(make: Make, folder: Path) -> None:
    harness = make()
    image = harness.stage(folder / "0")
    harness.run([request("a", PROMPT, image)])
    assert residents(harness) == {image.digest}
    harness.engine.drop(image.digest)
    assert not residents(harness)
    again = harness.run([request("b", PROMPT, image)])
    assert again["b"].finish == "length" and residents(harness) == {image.digest}


@pytest.mark.parametrize("pinned", [True, False])
def test_a_pinned_adapter_stays_while_others_come_and_go(
    make: Make, folder: Path, pinned: bool
) -> None:
    harness = make()
    images = [harness.stage(folder / f"{n}") for n in range(6)]
    small_arena(harness, images[0], 3)
    harness.engine.pin(images[0].digest, pinned)
    harness.run([request("first", PROMPT, images[0])])
    before, stayed = harness.engine.stats.placements, True
    for turn in range(3):
        for n, image in enumerate(images[1:]):
            harness.engine.submit(request(f"{turn} {n}", PROMPT, image))
        while harness.engine.has_work:
            assert not [update.error for update in harness.engine.step() if update.error]
            stayed &= images[0].digest in residents(harness)
    assert stayed == pinned
    assert harness.engine.stats.placements - before >= 13
