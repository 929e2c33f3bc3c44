"""Steps that the device's memory is too small for: retried in parts, and nobody else notices."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import build
from engine.errors import ConfigError, EngineDead, GenerationError, OutOfMemory, from_wire
from engine.layers.batch import Batch
from engine.messages import Request
from engine.models.decoder import Decoder
from engine.process.pipe_messages import Submit
from engine.process.stepper import Stepper
from engine.runner.faults import fitting, num_refusals, out_of_memory
from engine.runner.memory import compared
from tests.engine.harness import Harness, Outcome, Wrapper, config_of, request
from tests.tiny import TARGETS, VOCAB, make_adapter, make_model

HEAVY = 100  # tokens of a prompt that nothing else is as long as


class SmallMemory(Wrapper):
    """Runs out of memory in the batches that `fits` refuses."""

    def __init__(self, model: Decoder, fits: Callable[[Batch], bool]) -> None:
        super().__init__(model)
        self.fits = fits
        self.refused: list[int] = []  # tokens of the batches

    def __call__(self, batch: Batch) -> Tensor:
        if not self.fits(batch):
            self.refused.append(len(batch.ids))
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 7 GiB.\nMore advice."
            )
        return self.model(batch)


@dataclass
class Scene:
    harness: Harness
    requests: list[Request]
    expected: dict[str, Outcome]

    def run(
        self, fits: Callable[[Batch], bool], *more: Request
    ) -> tuple[dict[str, Outcome], list[int]]:
        """The outcomes, and the sizes of the batches that did not fit."""
        runner, before = self.harness.engine.runner, self.harness.engine.stats
        self.harness.engine.scheduler._budget.restore()
        model = SmallMemory(self.harness.engine.model, fits)
        runner.model = model
        outcomes = self.harness.run([*self.requests, *more])
        runner.model = self.harness.engine.model
        stats = self.harness.engine.stats
        sizes, seconds = stats.step_sizes, stats.step_seconds
        in_flight = sum(sizes.counts) - sum(seconds.counts)
        assert 0 <= in_flight <= self.harness.engine.run_ahead and seconds.total > 0
        assert sizes.total >= sum(sizes.counts)
        assert stats.failed_steps - before.failed_steps == len(model.refused)
        assert stats.free_blocks == stats.total_blocks and not stats.running
        return outcomes, model.refused


@pytest.fixture(scope="module", params=[0, 1], ids=["in turn", "run ahead"])
def scene(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("memory")
    model = make_model("llama", folder / "base")
    for i, targets in enumerate(TARGETS):
        make_adapter(model, folder / f"{i}", seed=i, rank=4 + 5 * i, targets=targets).unload()
    config = config_of(folder / "base", max_batch_prefill_tokens=256, prefix_caching=False)
    harness = Harness(config, run_ahead=request.param)
    images = [None, *(harness.stage(folder / f"{i}") for i in range(len(TARGETS)))]
    yield from _scene(harness, images)


def _scene(harness: Harness, images: list[Any]) -> Iterator[Scene]:
    chooser = random.Random(0)
    requests = [one(str(i), 5 + 8 * i, images[i % len(images)], chooser) for i in range(9)]
    yield Scene(harness, requests, harness.run(requests))
    harness.close()


def one(id: str, length: int, image: Any, chooser: random.Random) -> Request:
    """Greedy or sampled, some with the log-probabilities of their prompts."""
    sampling = {
        "temperature": 0.8 * chooser.randrange(2),
        "seed": length,
        "prompt_logprobs": length % 3 == 0,
    }
    tokens = [chooser.randrange(2, VOCAB) for _ in range(length)]
    return request(id, tokens, image, 15, **sampling)


def assert_equal(outcomes: dict[str, Outcome], expected: dict[str, Outcome]) -> None:
    for id, outcome in expected.items():
        found = outcomes[id]
        assert found.error is None and found.outputs == outcome.outputs, id
        assert found.prompt_logprobs == outcome.prompt_logprobs, id
        assert found.finish == outcome.finish


@pytest.mark.parametrize("most", [1, 7, 100])
def test_memory_for_a_number_of_tokens(scene: Scene, most: int) -> None:
    outcomes, refused = scene.run(lambda batch: len(batch.ids) <= most)
    assert refused and min(refused) > most
    assert_equal(outcomes, scene.expected)


@pytest.mark.parametrize("seed", range(3))
def test_memory_that_runs_out_at_random(scene: Scene, seed: int) -> None:
    chooser = random.Random(seed)
    outcomes, refused = scene.run(lambda batch: len(batch.ids) == 1 or chooser.random() < 0.8)
    assert len(refused) > 3
    assert_equal(outcomes, scene.expected)


def test_a_request_that_never_fits_fails_alone(scene: Scene) -> None:
    heavy = one("heavy", HEAVY, None, random.Random(1))
    outcomes, refused = scene.run(lambda batch: int(batch.kv.context_lens.max()) < HEAVY, heavy)
    error = outcomes["heavy"].error
    assert error is not None and error["class"] == "OutOfMemory"
    found = from_wire(error)
    assert isinstance(found, OutOfMemory) and found.status == 503
    assert "--max-batch-prefill-tokens" in str(found) and "7 GiB" in str(found)
    assert "advice" not in str(found)
    assert len(refused) < 12
    assert_equal(outcomes, scene.expected)


def test_every_request_fails_where_nothing_fits(scene: Scene) -> None:
    """The server lives: it answers, and serves again once there is memory."""
    outcomes, _ = scene.run(lambda batch: False)
    assert {outcome.error["class"] for outcome in outcomes.values() if outcome.error} == {
        "OutOfMemory"
    }
    assert all(outcome.error for outcome in outcomes.values())
    outcomes, refused = scene.run(lambda batch: True)
    assert not refused
    assert_equal(outcomes, scene.expected)


class Broken:
    """The way to the host of a device whose context is gone."""

    def fetch(self, tensor: Tensor) -> Tensor:
        return tensor

    def mark(self) -> Broken:
        return self

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")


def test_a_broken_device_ends_the_engine_at_once(scene: Scene) -> None:
    runner = scene.harness.engine.runner
    stepper = Stepper(scene.harness.engine)
    readback, runner.readback = runner.readback, Broken()
    with pytest.raises(EngineDead, match="illegal memory access was encountered$"):
        for _ in range(2):  # with run-ahead, the first step is read back in the second
            stepper.turn([Submit(scene.requests[0])])
    runner.readback = readback
    scene.harness.engine.fail(GenerationError("the test is over"))


def test_which_errors_are_of_memory() -> None:
    def chained() -> RuntimeError:
        try:
            raise torch.OutOfMemoryError("full")
        except torch.OutOfMemoryError:
            try:
                raise RuntimeError("the capture was not ended")
            except RuntimeError as error:
                return error

    for text in (
        "CUDA error: out of memory",
        "lora_shrink: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED when",
    ):
        assert out_of_memory(RuntimeError(f"{text}\nadvice"), 0) == text
    assert out_of_memory(chained(), 0) == "full"
    for error in (RuntimeError("an illegal memory access was encountered"), ValueError(text)):
        assert out_of_memory(error, 0) is None
    with pytest.raises(RuntimeError, match="another"), fitting("all", "less"):
        raise RuntimeError("another")


def test_an_op_that_was_refused_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside an extension's op loses its text; torch's allocator counts what it refused."""
    stats: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: stats)
    error = RuntimeError('torch_call_dispatcher("aten::linear", ...) API call failed at line 16')
    found = []
    for refusals in (0, 1, 1):
        before = num_refusals()
        stats["num_ooms"] = refusals
        for _ in range(2):  # to ask changes nothing
            found.append(out_of_memory(error, before) is not None)
    assert found == [False, False, True, True, False, False]


@pytest.mark.parametrize(
    ("part", "what", "flag"),
    [
        ("Decoder", "weights", "smaller model"),
        ("RowTable", "KV cache", "--adapter-memory-fraction"),
        ("Runner", "KV cache", "--cuda-memory-fraction"),
    ],
)
def test_what_finds_no_room_at_start_is_named(
    part: str, what: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama", tmp_path)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(build, part, full)
    with pytest.raises(ConfigError, match=what) as caught:
        Harness(config_of(tmp_path))
    assert flag in (caught.value.hint or "") and caught.value.field == "cuda_memory_fraction"


def test_too_little_memory_for_one_sequence_names_who_takes_it(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="arena 0.03") as caught:
        Harness(config_of(tmp_path, arena_mib=31, block_size=1024))
    assert caught.value.field == "cpu_memory_gb"
    assert "--adapter-memory-fraction" in (caught.value.hint or "")


def test_plan_and_reality_in_one_line(scene: Scene) -> None:
    plan = scene.harness.engine.plan
    stats = {"allocated_bytes.all.current": 3 << 29, "reserved_bytes.all.current": 2 << 30}
    line = compared(plan, stats | {"reserved_bytes.all.peak": 5 << 29}, 10 << 30)
    kept = plan.weights + plan.arena + plan.records + plan.num_blocks * plan.kv_block
    for number in (kept / 2**30, 1.5, 2.0, 2.5, 10.0):
        assert f"{number:.2f}" in line
    assert "\n" not in line
