"""One shard's runner: applies a plan to the device state, runs the model over it, samples."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.messages import Chunk, Placement, StepPlan, StepResult
from engine.runner.batch import Adapters, BatchBuilder, Model
from engine.runner.graphs import StepGraphs
from engine.runner.inputs import Description
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
        self, model: Model, rows: RowTable, cache: Tensor, adapters: Adapters, placer: Placer
    ):
        self.model, self.rows, self.placer = model, rows, placer
        self.adapters = adapters
        self.builder = BatchBuilder(rows, cache, adapters)
        self.decode_sampling = SamplePlan([], rows.device)
        self.graphs: StepGraphs | None = None
        self.way = read_back(rows.device)
        self.launched: deque[_Launched] = deque()

    def capture(self, width: int, max_tokens: int) -> None:
        """Steps are replayed from now on. `width`: the largest stacked rank of an adapter; `max_tokens`: of a step."""
        self.graphs = StepGraphs(self.model, self.builder, width, max_tokens)
        self.graphs.capture()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> None:
        self.rows.words.send()  # what a launch that failed left behind, before the same is written again
        self._apply(plan)
        description = self.builder.describe(plan.chunks)
        busy = bool(description.slots)
        sampled, prompt = self._compute(description) if busy else (None, {})
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
            params = [self.rows.params[row] for row in plan.decode]
            self.decode_sampling = SamplePlan(params, self.rows.device)

    def _forward(self, description: Description) -> tuple[Tensor, Tensor, Tensor]:
        """Starts the step: (rows, their known tokens, logits), the sampled ones first."""
        graphs = self.graphs
        if graphs is not None and (captured := graphs.find(description)) is not None:
            return graphs.replay(captured, description)
        step = self.builder.build(description)
        return step.rows, step.lengths, self.model(step.batch)

    def _compute(self, description: Description) -> tuple[Sampled | None, dict[int, Tensor]]:
        rows, lengths, logits = self._forward(description)
        self.builder.advance(description)
        chunks = description.chunks
        new = [chunk.row for chunk in chunks if chunk.sample]
        count = len(description.decode) + len(new)
        out: Sampled | None = None
        if count:
            sampling = self.decode_sampling
            if new:
                params = [self.rows.params[row] for row in new]
                sampling = SamplePlan(sampling.params + params, self.rows.device)
            longest = max(self.rows.known[row] for row in (*description.decode, *new))
            part = slice(count)
            sampled = sampling.sample(logits[part], self.rows, rows[part], lengths[part], longest)
            out = sampled.fetched(self.way)
        return out, self._prompt_logprobs(chunks, logits[count:])

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
                rows = logits[first : first + known].float().log_softmax(-1)
                found[i] = self.way.fetch(rows.gather(1, after[:, None])[:, 0])
                first += chunk.count
        return found
