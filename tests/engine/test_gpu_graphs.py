"""Steps replayed from CUDA graphs against the same steps launched kernel by kernel, while everything changes.

Two engines get the same requests and cancellations at the same steps, under one clock, with an arena for a few of the
adapters. Copies are waited for, so that residency does not depend on time and both plan the same steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest
import torch

from engine.messages import AdapterImageRef, Request, Update
from engine.runner.placement import Budget, CudaPlacer, Placer
from tests.engine.harness import Harness, config_of, request
from tests.tiny import TARGETS, VOCAB, make_adapter, make_model

pytestmark = pytest.mark.gpu

STEPS = 200
ADAPTERS = 16
TOLERANCE = 1e-4  # of log-probabilities, in float32
PIECE = 40_000  # bytes of adapters copied in a step: placements take several


@dataclass
class Side:
    """One of the two engines."""

    harness: Harness
    images: list[AdapterImageRef]
    now: float = 0.0
    lasts: dict[str, Update] = field(default_factory=dict)

    def step(self) -> list[Update]:
        self.now += 0.01
        updates = self.harness.engine.step()
        self.lasts |= {update.id: update for update in updates if update.finish or update.error}
        self.harness.engine.scheduler.check()
        return updates


def settle(placer: CudaPlacer) -> None:
    """Makes the placer wait for its copies."""

    def advance(budget: Budget) -> list[int]:
        with torch.cuda.stream(placer._stream):
            resident = Placer.advance(placer, budget)
        placer._stream.synchronize()
        return resident

    placer.advance = advance  # type: ignore[method-assign]
    placer.busy = Budget(PIECE, PIECE)


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    """With graphs, and eager."""
    model = make_model("llama", tmp_path / "base")
    for i in range(ADAPTERS):
        targets = list(TARGETS)[i % len(TARGETS)]
        options = ({}, {"use_dora": True}, {"trainable_token_indices": [5, 9]}, {})[i % 4]
        rank = 1 + 5 * i
        make_adapter(model, tmp_path / f"{i}", i, rank, targets, **options).unload()
    made = []
    for eager in (False, True):
        config = config_of(
            tmp_path / "base",
            arena_mib=1,
            max_batch_size=12,
            max_batch_prefill_tokens=40,
            max_batch_total_tokens=600,
        )
        clock: list[Side] = []
        config = replace(config, memory=replace(config.memory, eager=eager))
        harness = Harness(config, clock=lambda clock=clock: clock[0].now if clock else 0.0)
        placer = harness.engine.runner.placer
        assert isinstance(placer, CudaPlacer) and harness.engine.run_ahead == 1
        settle(placer)
        clock.append(Side(harness, [harness.stage(tmp_path / f"{i}") for i in range(ADAPTERS)]))
        made += clock
    yield made[0], made[1]
    for side in made:
        side.harness.close()


def arrival(chooser: random.Random, side: Side, id: str) -> Request:
    """Any length, adapter and sampling; the same for both sides if their choosers are."""
    number = chooser.randrange(ADAPTERS + 3)
    image = side.images[number] if number < ADAPTERS else None
    tokens = [chooser.randrange(2, VOCAB) for _ in range(chooser.randrange(1, 70))]
    new = chooser.randrange(1, 30)
    sampling = {"temperature": chooser.choice([0.0, 0.0, 0.8]), "seed": chooser.randrange(1000)}
    sampling["repetition_penalty"] = chooser.choice([1.0, 1.0, 1.3])
    one = request(id, tokens, image, new, **sampling)
    return msgspec.structs.replace(one, arrival=side.now)


def disturb(chooser: random.Random, side: Side, step: int) -> None:
    """What happens to an engine ahead of a step."""
    if chooser.random() < 0.4:
        for number in range(chooser.randrange(1, 4)):
            side.harness.engine.submit(arrival(chooser, side, f"{step}.{number}"))
    if chooser.random() < 0.1:
        side.harness.engine.cancel(f"{chooser.randrange(step + 1)}.0")


def assert_equal(ours: list[Update], theirs: list[Update]) -> None:
    assert [(u.id, u.finish, u.error) for u in ours] == [(u.id, u.finish, u.error) for u in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert [o.token for o in our.tokens] == [o.token for o in their.tokens], our.id
        for one, other in zip(our.tokens, their.tokens, strict=True):
            assert one.logprob is not None and other.logprob is not None
            assert abs(one.logprob - other.logprob) < TOLERANCE, our.id


@pytest.mark.parametrize("seed", [0, 1])
def test_graph_is_eager(sides: tuple[Side, Side], seed: int) -> None:
    choosers = random.Random(seed), random.Random(seed)
    step = 0
    while step < STEPS or any(side.harness.engine.has_work for side in sides):
        if step < STEPS:
            for side, chooser in zip(sides, choosers, strict=True):
                disturb(chooser, side, step)
        assert_equal(*(side.step() for side in sides))
        step += 1
        assert step < 20 * STEPS
    for side in sides:
        stats = side.harness.engine.stats
        assert stats.evictions > 5 and stats.preemptions > 0
        finishes = {update.finish for update in side.lasts.values()}
        assert finishes == {"length", "cancelled"}
    left, right = (side.harness.engine.stats for side in sides)
    assert (left.steps, left.evictions, left.preemptions) == (
        right.steps,
        right.evictions,
        right.preemptions,
    )
