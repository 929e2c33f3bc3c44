"""One shard's runner: applies a plan to the device state, runs the model over it, samples."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engine.layers.batch import Batch
from engine.messages import Chunk, Placement, StepPlan, StepResult, TokenOutput
from engine.runner.batch import Adapters, BatchBuilder
from engine.runner.rows import RowTable
from engine.runner.sampler import SamplePlan

COPY_BESIDE_STEP = 4 << 20  # bytes of adapters copied in a step that also computes
COPY_ALONE = 64 << 20


class Model(Protocol):
    def __call__(self, batch: Batch) -> Tensor: ...


class Placer(Protocol):
    """Moves adapter images from the host tier into the arena, a piece at a time."""

    def start(self, placement: Placement) -> None: ...

    def advance(self, max_bytes: int) -> list[int]:
        """Copies up to `max_bytes`; returns the slots that became resident."""
        ...

    def unplace(self, slot: int) -> None: ...


class Runner:
    """`launch` starts a step, `collect` waits for its result; on a CPU the first does all the work."""

    def __init__(
        self, model: Model, rows: RowTable, cache: Tensor, adapters: Adapters, placer: Placer
    ):
        self.model, self.rows, self.placer = model, rows, placer
        self.adapters = adapters
        self.builder = BatchBuilder(rows, cache, adapters)
        self.decode_sampling = SamplePlan([], rows.device)
        self.results: list[StepResult] = []

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> None:
        self._apply(plan)
        busy = bool(self.builder.decode or plan.chunks)
        outputs: list[TokenOutput] = []
        prompt: dict[int, list[float]] = {}
        if busy:
            outputs, prompt = self._compute(plan.chunks)
        resident = self.placer.advance(COPY_BESIDE_STEP if busy else COPY_ALONE)
        self.results.append(StepResult(plan.step, outputs, prompt, resident))

    def collect(self) -> StepResult:
        """The result of the oldest step that was launched and not collected."""
        return self.results.pop(0)

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.release:
            self.rows.release(row)
        for slot in plan.unplace:
            self.placer.unplace(slot)
        for placement in plan.placements:
            self.placer.start(placement)
            self.adapters.placed(placement.slot, placement.image.max_rank)
        for admit in plan.admit:
            self.rows.admit(admit)
        for row, blocks in plan.extend:
            self.rows.extend(row, blocks)
        if plan.decode is not None:
            self.builder.set_decode(plan.decode)
            params = [self.rows.params[row] for row in plan.decode]
            self.decode_sampling = SamplePlan(params, self.rows.device)

    def _compute(self, chunks: list[Chunk]) -> tuple[list[TokenOutput], dict[int, list[float]]]:
        batch, rows = self.builder.build(chunks)
        logits = self.model(batch)
        sampled = [i for i, chunk in enumerate(chunks) if chunk.sample]
        num_decode = len(self.builder.decode)
        wanted = num_decode + len(sampled)
        outputs: list[TokenOutput] = []
        if wanted:
            sampling = self.decode_sampling
            if sampled:
                new = [self.rows.params[chunks[i].row] for i in sampled]
                sampling = SamplePlan(sampling.params + new, self.rows.device)
            index = [*range(num_decode), *(num_decode + i for i in sampled)]
            out_rows = rows[index]
            lengths = self.rows.computed[out_rows]
            tokens, outputs = sampling.sample(logits[:wanted], self.rows, out_rows, lengths)
            self.rows.store(out_rows, lengths, tokens)
        return outputs, self._prompt_logprobs(chunks, logits[wanted:])

    def _prompt_logprobs(self, chunks: list[Chunk], logits: Tensor) -> dict[int, list[float]]:
        """Log-probability of the known token after each position of the chunks that want them."""
        found: dict[int, list[float]] = {}
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
                found[i] = rows.gather(1, after[:, None])[:, 0].tolist()
                first += chunk.count
        return found
