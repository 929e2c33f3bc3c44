"""Two runners under one scheduler: every plan goes to both, and every result of one must be the other's.

One pads its steps to the shapes of the graphs, the other computes each as it is.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import AdapterConfig
from engine.messages import AdapterImageRef, Request, SamplingParams, StepPlan, StepResult
from engine.ops.attention import builtin
from engine.runner.batch import EVERYTHING
from engine.runner.graphs import Captured, StepGraphs
from engine.runner.shapes import Shape
from tests.engine.harness import Harness, config_of
from tests.tiny import TARGETS, VOCAB, make_adapter, make_model

RANKS = [64, 24, 48, 61, 33, 57, 3, 64]
TOLERANCE = 1e-5

PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 20, "min_p": 0.01},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"temperature": 0.7, "typical_p": 0.9},
]


@dataclass
class Scene:
    base: Path
    adapters: list[Path]


def make_scene(folder: Path) -> Scene:
    """A tiny model and adapters of different ranks and targets, embedding and head among them."""
    model = make_model("llama", folder / "base")
    adapters = []
    for i, rank in enumerate(RANKS):
        adapters.append(folder / f"adapter{i}")
        targets = list(TARGETS)[i % len(TARGETS)]
        # every third runs the ops of extras or of own rows
        options = ({}, {}, {"use_dora": True}, {}, {}, {"trainable_token_indices": [5, 9]})[i % 6]
        make_adapter(model, adapters[-1], seed=i, rank=rank, targets=targets, **options).unload()
    return Scene(folder / "base", adapters)


class PaddedSteps(StepGraphs):
    """The graphs without CUDA: a replay is the captured step computed anew, its results where a graph leaves them."""

    def capture(self) -> None:
        self.replayed: list[tuple[Shape, int]] = []
        outputs = max(shape.outputs or shape.tokens for shape in self.shapes)
        room = self.builder.adapters.arena.numel() and AdapterConfig().max_added_tokens
        self.logits = torch.zeros(outputs, VOCAB + room)
        for shape in self.shapes:
            inputs = self.builder.inputs(shape)
            rows = inputs.sampled_rows if shape.chunks else inputs.rows
            for kind in self.reaches:
                lengths = torch.zeros(len(rows), dtype=torch.int32)
                graph: Any = SimpleNamespace(
                    replay=lambda key=(shape, kind), to=lengths: self._again(key, to)
                )
                vocab = VOCAB + (room if kind == EVERYTHING else 0)
                self.captured[shape, kind] = Captured(graph, shape, rows, lengths, vocab)

    def _again(self, key: tuple[Shape, int], lengths: Tensor) -> None:
        self.replayed.append(key)
        self.logits.fill_(float("nan"))  # type: ignore[union-attr]
        step, vocab = self._run(*key)
        assert vocab == self.captured[key].vocab
        lengths.copy_(step.lengths)


def let_attention_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's attention refuses tokens that no sequence has; here they get NaN, which must reach nobody."""
    own = builtin.ops

    def paged_attention(q: Tensor, *where: Any) -> Tensor:
        cu_seqlens_q, num_decodes = where[3], where[8]
        assert cu_seqlens_q[: num_decodes + 1].tolist() == [*range(num_decodes + 1)]
        out = torch.full_like(q, float("nan"))
        out[: cu_seqlens_q[-1]] = own.paged_attention(q[: cu_seqlens_q[-1]], *where)
        return out

    monkeypatch.setattr(builtin, "ops", SimpleNamespace(paged_attention=paged_attention))


class Twins:
    """Both engines; the scheduler of the first one plans for both."""

    def __init__(self, scene: Scene, config: Any, plain_config: Any) -> None:
        ticks = itertools.count()
        # Plans are the same in every run: a look at the clock takes 5 ms, whatever the machine does.
        clock = lambda: next(ticks) * 0.005  # noqa: E731
        self.padded, self.plain = Harness(config, clock=clock), Harness(plain_config)
        self.images: list[AdapterImageRef] = []
        for folder in scene.adapters:
            image = self.padded.stage(folder)
            assert self.plain.stage(folder) == image
            self.images.append(image)
        self.resident: tuple[set[int], set[int]] = (set(), set())
        self.plans: list[StepPlan] = []
        self.in_flight = 0

    def capture(self) -> PaddedSteps:
        """From now on the first engine's steps are padded to the shapes of graphs; the graphs."""
        engine = self.padded.engine
        runner = engine.runner
        graphs = PaddedSteps(runner.model, runner.builder, 3 * 64, engine.plan.max_step_tokens)
        graphs.capture()
        runner.graphs = graphs
        return graphs

    def step(self, ahead: int) -> None:
        """Plans and launches a step, then commits all but `ahead` of those in flight."""
        scheduler = self.padded.engine.scheduler
        plan = scheduler.plan()
        if plan is not None:
            self.plans.append(plan)
            for twin in (self.padded, self.plain):
                twin.engine.runner.forward(plan)
                twin.engine.runner.sample()
            self.in_flight += 1
        while self.in_flight > (ahead if plan is not None else 0):
            scheduler.commit(self._collect())
            self.in_flight -= 1
        scheduler.check()

    def _collect(self) -> StepResult:
        padded, plain = (twin.engine.runner.collect() for twin in (self.padded, self.plain))
        assert padded.step == plain.step
        assert [o.token for o in padded.outputs] == [o.token for o in plain.outputs]
        for mine, theirs in zip(padded.outputs, plain.outputs, strict=True):
            assert close([mine.logprob or 0.0], [theirs.logprob or 0.0])
            pairs = mine.alternatives or [], theirs.alternatives or []
            assert close(*([value for _, value in of] for of in pairs))
        assert padded.prompt_logprobs.keys() == plain.prompt_logprobs.keys()
        for index, values in padded.prompt_logprobs.items():
            assert close(values, plain.prompt_logprobs[index])
        # a copy counts once both have it
        for found, result in zip(self.resident, (padded, plain), strict=True):
            found.update(result.resident)
        both = self.resident[0] & self.resident[1]
        for found in self.resident:
            found -= both
        return StepResult(padded.step, padded.outputs, padded.prompt_logprobs, sorted(both))

    def run(self, num_steps: int, seed: int, longest: int, ahead: int) -> None:
        """Random requests arrive over `num_steps` steps: any adapter, length and parameters; some are cancelled."""
        generator = random.Random(seed)
        scheduler = self.padded.engine.scheduler
        number = 0
        for _ in range(num_steps):
            if len(scheduler._sequences) < 14:
                for _ in range(generator.choice([0, 0, 1, 1, 2, 6])):
                    scheduler.add(self._request(generator, number, longest))
                    number += 1
            if number and generator.random() < 0.03:
                scheduler.cancel(str(generator.randrange(number)))
            self.step(ahead)
            scheduler.take_updates()
        while scheduler.has_work:
            self.step(ahead)
            scheduler.take_updates()

    def _request(self, generator: random.Random, number: int, longest: int) -> Request:
        prompt = [
            generator.randrange(2, VOCAB)
            for _ in range(generator.choice([1, 5, 30, generator.randint(2, longest)]))
        ]
        sampling = SamplingParams(
            seed=number,
            logprobs=True,
            num_alternatives=3,
            prompt_logprobs=generator.random() < 0.1,
            **generator.choice(PARAMETERS),
        )
        adapter = generator.choice([None, *self.images]) if number > 4 else None
        return Request(str(number), prompt, sampling, generator.randint(1, 12), [], adapter)

    def close(self) -> None:
        self.padded.close()
        self.plain.close()


def close(found: list[float], expected: list[float]) -> bool:
    return torch.allclose(
        torch.tensor(found), torch.tensor(expected), rtol=TOLERANCE, atol=TOLERANCE
    )


def small_config(scene: Scene, **options: Any) -> Any:
    """Arena and cache of a few sequences, so that adapters are exchanged and sequences preempted."""
    return config_of(
        scene.base,
        arena_mib=1,
        **({"max_batch_total_tokens": 600, "block_size": 8, "max_batch_size": 20} | options),
    )
