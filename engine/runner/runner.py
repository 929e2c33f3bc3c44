"""One shard's runner: applies a plan to the device state, runs the model over it, samples."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.messages import Chunk, Placement, StepPlan, StepResult
from engine.ops.attention import Backend
from engine.runner.batch import Adapters, BatchBuilder, Model, Step
from engine.runner.graphs import DecodeGraphs
from engine.runner.rows import RowTable
from engine.runner.sampler import Sampled, SamplePlan
from engine.runner.transfer import Mark, read_back


class Placer(Protocol):
    """Moves adapter images from the host tier into the arena, a piece at a time."""

    beside_step: int  # bytes to copy in a step that also computes
    alone: int  # and in one that does not

    def start(self, placement: Placement) -> None: ...

    def touched(self, placement: Placement) -> list[list[bool]]: ...

    def advance(self, max_bytes: int) -> list[int]:
        """Copies up to `max_bytes`; returns the slots that became resident."""
        ...

    def unplace(self, slot: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step whose results are on their way."""

    step: int
    sampled: Sampled | None
    prompt: dict[int, Tensor]  # chunk index -> log-probabilities
    resident: list[int]
    mark: Mark  # reached when all of it has arrived


class Runner:
    """`launch` starts a step, `collect` waits for its result; on a CPU the first does all the work.

    A step may be launched before the one before it was collected: what it needs of that one is on the device.
    """

    def __init__(
        self,
        model: Model,
        rows: RowTable,
        cache: Tensor,
        adapters: Adapters,
        placer: Placer,
        attention: Backend,
    ):
        self.model, self.rows, self.placer = model, rows, placer
        self.adapters = adapters
        self.attention = attention
        self.builder = BatchBuilder(rows, cache, adapters, attention)
        self.decode_sampling = SamplePlan([], rows.device)
        self.graphs: DecodeGraphs | None = None
        self.way = read_back(rows.device)
        self.launched: deque[_Launched] = deque()

    def capture(self, width: int) -> None:
        """Decode steps are replayed from now on; `width` is the largest stacked rank of an adapter."""
        parts = (self.model, self.rows, self.builder.cache, self.adapters, self.attention)
        self.graphs = DecodeGraphs(*parts, width)
        self.graphs.capture()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> None:
        self._apply(plan)
        busy = bool(self.builder.decode or plan.chunks)
        sampled, prompt = self._compute(plan.chunks) if busy else (None, {})
        resident = self.placer.advance(self.placer.beside_step if busy else self.placer.alone)
        self.launched.append(_Launched(plan.step, sampled, prompt, resident, self.way.mark()))

    def collect(self) -> StepResult:
        """The result of the oldest step that was launched and not collected."""
        launched = self.launched.popleft()
        launched.mark.synchronize()
        return StepResult(
            launched.step,
            launched.sampled.outputs() if launched.sampled is not None else [],
            {index: logprobs.tolist() for index, logprobs in launched.prompt.items()},
            launched.resident,
        )

    def abandon(self) -> None:
        """Drops the steps in flight; returns when the device no longer works on them."""
        self.launched.clear()
        self.way.mark().synchronize()

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.release:
            self.rows.release(row)
        for slot in plan.unplace:
            self.placer.unplace(slot)
        for placement in plan.placements:
            self.placer.start(placement)
            touched = self.placer.touched(placement)
            self.adapters.placed(placement.slot, placement.image.max_rank, touched)
        for admit in plan.admit:
            self.rows.admit(admit)
        for row, blocks in plan.extend:
            self.rows.extend(row, blocks)
        if plan.decode is not None:
            self.builder.set_decode(plan.decode)
            if self.graphs is not None:
                slots = [self.rows.slots[row] for row in plan.decode]
                self.graphs.set_decode(plan.decode, slots)
            params = [self.rows.params[row] for row in plan.decode]
            self.decode_sampling = SamplePlan(params, self.rows.device)

    def _forward(self, chunks: list[Chunk]) -> tuple[Step, Tensor]:
        if self.graphs is not None and not chunks:
            return self.graphs.replay(self.builder.decode)
        step = self.builder.build(chunks)
        return step, self.model(step.batch)

    def _compute(self, chunks: list[Chunk]) -> tuple[Sampled | None, dict[int, Tensor]]:
        step, logits = self._forward(chunks)
        wanted = len(step.rows)
        out: Sampled | None = None
        if wanted:
            sampling = self.decode_sampling
            new = [self.rows.params[chunk.row] for chunk in chunks if chunk.sample]
            if new:
                sampling = SamplePlan(sampling.params + new, self.rows.device)
            sampled = sampling.sample(logits[:wanted], self.rows, step.rows, step.lengths)
            self.rows.store(step.rows, step.lengths, sampled.tokens)
            out = sampled.fetched(self.way)
        return out, self._prompt_logprobs(chunks, logits[wanted:])

    def _prompt_logprobs(self, chunks: list[Chunk], logits: Tensor) -> dict[int, Tensor]:
        """Log-probability of the known token after each position of the chunks that want them."""
        found: dict[int, Tensor] = {}
        first = 0
        for i, chunk in enumerate(chunks):
            if chunk.prompt_logprobs:
                known = (
                    chunk.count - chunk.sample
                )  # the token after the last position is not the prompt's
                after = self.rows.tokens[
                    chunk.row, chunk.start + 1 : chunk.start + 1 + known
                ].long()
                rows = logits[first : first + known].log_softmax(-1)
                found[i] = self.way.fetch(rows.gather(1, after[:, None])[:, 0])
                first += chunk.count
        return found
