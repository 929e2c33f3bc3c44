"""Adapters copied into the arena while graphs replay: every byte arrives, and the steps do not notice."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import ModelConfig
from engine.lora.image import data_start
from engine.messages import AdapterImageRef, Placement, Request
from engine.runner.placement import Budget, CudaPlacer, relocated
from tests.engine.harness import Harness, Outcome, config_of, request
from tools.adapters import write_adapter

pytestmark = pytest.mark.gpu

VOCAB, HIDDEN = 512, 512
COLD, RANK = 24, 128  # adapters that come and go, 17 MB each
ARENA_MIB = 120  # holds a few of them
TOLERANCE = 1e-4  # of log-probabilities, in float32
DECODES, NEW = 12, 120
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


class Watch:
    """Stands before a placer and compares what lies in the arena with the host's image: at eviction and on demand."""

    def __init__(self, placer: CudaPlacer) -> None:
        self.placer = placer
        self.placed: dict[int, Placement] = {}  # by slot, once resident
        self.begun: dict[int, Placement] = {}
        self.compared = 0
        self.under_way = 0  # steps that ended while a copy was on its way
        self._start, self._advance, self._unplace = placer.start, placer.advance, placer.unplace
        placer.start = self.start  # type: ignore[method-assign]
        placer.advance = self.advance  # type: ignore[method-assign]
        placer.unplace = self.unplace  # type: ignore[method-assign]

    def start(self, placement: Placement) -> None:
        self.begun[placement.slot] = placement
        self._start(placement)

    def advance(self, budget: Budget) -> list[int]:
        resident = self._advance(budget)
        for slot in resident:
            self.placed[slot] = self.begun.pop(slot)
        self.under_way += bool(self.begun)
        return resident

    def unplace(self, slot: int) -> None:
        self.begun.pop(slot, None)
        if (placement := self.placed.pop(slot, None)) is not None:
            self.compare(placement)
        self._unplace(slot)

    def compare(self, placement: Placement) -> None:
        """The adapter's bytes and records on the device, against the image that they came from."""
        placer, image = self.placer, placement.image
        record_bytes = placer.records[0].numel() * 4
        start = image.offset + data_start(record_bytes)
        data = placer.host[start : start + image.data_bytes]
        found = placer.arena[placement.offset : placement.offset + image.data_bytes]
        assert torch.equal(found.cpu(), data), image.name
        words = placer.host[image.offset : image.offset + record_bytes].view(torch.int32)
        records = relocated(words.view(placer.records.shape[1:]), placement.offset)
        assert records.any() and torch.equal(placer.records[placement.slot].cpu(), records)
        self.compared += 1


class Scene:
    def __init__(self, folder: Path) -> None:
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text(json.dumps(SHAPE))
        config = config_of(
            folder / "base",
            arena_mib=ARENA_MIB,
            max_batch_size=32,
            max_batch_prefill_tokens=256,
            prefix_caching=False,
        )
        model = ModelConfig(model_id=str(folder / "base"), dtype="float32", load_format="dummy")
        torch.manual_seed(0)
        self.harness = Harness(replace(config, model=model), host_mib=600)
        self.chooser = random.Random(0)
        self.cold = [self.adapter(folder / f"cold{i}", RANK, i) for i in range(COLD)]
        self.warm = [self.adapter(folder / f"warm{i}", 8 + i, 100 + i) for i in range(3)]

    def adapter(self, folder: Path, rank: int, seed: int) -> AdapterImageRef:
        write_adapter(folder, self.harness.engine.layout, rank, seed, scale=0.05)
        return self.harness.stage(folder)

    def prompt(self) -> list[int]:
        return [self.chooser.randrange(VOCAB) for _ in range(self.chooser.randrange(3, 30))]

    def decodes(self) -> list[Request]:
        images = [None, *self.warm]
        return [
            request(f"decode {i}", self.prompt(), images[i % len(images)], NEW)
            for i in range(DECODES)
        ]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.harness.close()


def test_copies_beside_replays(scene: Scene) -> None:
    engine = scene.harness.engine
    assert isinstance(engine.runner.placer, CudaPlacer)
    requests = scene.decodes()
    expected = scene.harness.run(requests)
    watch = Watch(engine.runner.placer)
    engine.runner.placer.busy = Budget(scene.cold[0].data_bytes // 4, 1)  # a copy takes steps
    outcomes = {one.id: Outcome() for one in requests}
    for one in requests:
        engine.submit(one)
    step = num_cold = 0
    while engine.has_work:
        if step % 4 == 2 and step < NEW:  # a request for another cold adapter
            image = scene.cold[num_cold % COLD]
            num_cold += 1
            cold = request(f"cold {step}", scene.prompt(), image, 2)
            outcomes[cold.id] = Outcome()
            engine.submit(cold)
        for update in engine.step():
            outcome = outcomes[update.id]
            outcome.outputs += update.tokens
            outcome.finish = update.finish or outcome.finish
            assert update.error is None
        engine.scheduler.check()
        step += 1
    for placement in watch.placed.values():
        watch.compare(placement)
    assert engine.stats.evictions > 5 and watch.compared >= num_cold
    assert watch.under_way > 0, "no step ran beside a copy"
    for id, outcome in expected.items():
        assert outcomes[id].tokens == outcome.tokens, id
        torch.testing.assert_close(
            torch.tensor(outcomes[id].logprobs),
            torch.tensor(outcome.logprobs),
            atol=TOLERANCE,
            rtol=0,
        )
    assert all(outcome.finish == "length" for outcome in outcomes.values())
