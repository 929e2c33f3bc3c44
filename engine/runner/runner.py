"""One shard's runner: applies a plan to the device state, runs the model, samples."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.messages import Chunk, StepPlan, StepResult
from engine.ops.attention import AttentionBackend
from engine.runner.batch import Adapters, BatchBuilder, Model
from engine.runner.graphs import StepGraphs
from engine.runner.inputs import Description
from engine.runner.placement import Placer
from engine.runner.rows import RowTable
from engine.runner.sampler import Masks, Sampled, SamplePlan
from engine.runner.transfer import Mark, read_back


@dataclass(frozen=True, slots=True)
class _Launched:
    """A launched step, not yet collected."""

    step: int
    sampled: Sampled | None
    prompt: dict[int, Tensor]  # chunk index -> log-probabilities
    pooled: dict[int, Tensor]  # chunk index -> vector
    resident: list[int]
    mark: Mark  # reached when all of it has arrived


Outputs = tuple[Tensor, Tensor, Tensor]  # rows, their lengths, logits; the sampled ones first


@dataclass(frozen=True, slots=True)
class _Forwarded:
    """A step with its forward pass launched, but not its sampling."""

    step: int
    description: Description
    outputs: Outputs | None  # None: the step computes nothing
    pooled: dict[int, Tensor]  # chunk index -> vector


class Runner:
    """`forward` and `sample` start a step, `collect` waits for its result. On a CPU, they do all the work.

    A step may be launched before the previous one is collected: it reads the previous step's tokens on the device.
    """

    def __init__(
        self,
        model: Model,
        rows: RowTable,
        cache: Tensor,
        adapters: Adapters,
        placer: Placer,
        attention: AttentionBackend,
    ):
        self.model, self.rows, self.placer = model, rows, placer
        self.adapters = adapters
        self.builder = BatchBuilder(rows, cache, adapters, attention)
        self.decode_sampling = SamplePlan([], rows.device)
        self.graphs: StepGraphs | None = None
        self.readback = read_back(rows.device)
        self.launched: deque[_Launched] = deque()
        self._forwarded: _Forwarded | None = None

    def capture(self, stacked_rank: int, max_tokens: int) -> None:
        """Captures the CUDA graphs. `stacked_rank`: largest of an adapter; `max_tokens`: of a step."""
        self.graphs = StepGraphs(self.model, self.builder, stacked_rank, max_tokens)
        self.graphs.capture()

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> None:
        """Starts a step up to its logits; `sample` must follow before the next one."""
        assert self._forwarded is None, "a step is sampled before the next one starts"
        self.rows.words.send()  # a failed launch may have left edits: send them before new ones
        self._apply(plan)
        description = self.builder.describe(plan.chunks)
        outputs: Outputs | None = None
        pooled: dict[int, Tensor] = {}
        if description.pooled:
            outputs, pooled = self._forward_pooled(description)
        elif description.slots:
            outputs = self._forward(description)
        if outputs is not None:
            self.builder.advance(description)
        self._forwarded = _Forwarded(plan.step, description, outputs, pooled)

    @torch.inference_mode()
    def sample(self, masks: Masks | None = None) -> None:
        """Starts the sampling of the step of the last `forward`, and its copies of adapters. None: no masks."""
        forwarded, self._forwarded = self._forwarded, None
        assert forwarded is not None, "`forward` comes first"
        sampled: Sampled | None = None
        prompt: dict[int, Tensor] = {}
        if forwarded.outputs is not None:
            sampled, prompt = self._sample(forwarded.description, forwarded.outputs, masks)
        busy = forwarded.outputs is not None
        placer = self.placer
        resident = placer.advance(placer.busy if busy else placer.idle)
        mark = self.readback.mark()
        self.launched.append(
            _Launched(
                step=forwarded.step,
                sampled=sampled,
                prompt=prompt,
                pooled=forwarded.pooled,
                resident=resident,
                mark=mark,
            )
        )

    def collect(self) -> StepResult:
        """Waits for the oldest launched step and returns its result."""
        launched = self.launched.popleft()
        launched.mark.synchronize()
        return StepResult(
            step=launched.step,
            outputs=launched.sampled.outputs() if launched.sampled is not None else [],
            prompt_logprobs={i: scores[0].tolist() for i, scores in launched.prompt.items()},
            resident=launched.resident,
            pooled={i: vector.tolist() for i, vector in launched.pooled.items()},
            prompt_tops={i: _tops(scores) for i, scores in launched.prompt.items()},
        )

    def abandon(self) -> None:
        """Drops the steps in flight; returns once the device has stopped working on them."""
        self.launched.clear()
        self._forwarded = None
        self.readback.mark().synchronize()

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.release:
            self.rows.release(row)
        for slot in plan.unplace:
            self.placer.unplace(slot)
        for placement in plan.placements:
            self.placer.start(placement)
            touched = self.placer.touched(placement)
            self.adapters.placed(placement.slot, placement.image.stacked_rank, touched)
        for admit in plan.admit:
            self.rows.admit(admit)
        for row, blocks in plan.extend:
            self.rows.extend(row, blocks)
        if plan.decode is not None:
            self.builder.set_decode(plan.decode)
            params = [self.rows.params[row] for row in plan.decode]
            self.decode_sampling = SamplePlan(params, self.rows.device)

    def _forward(self, description: Description) -> Outputs:
        """Starts the forward pass, as a CUDA graph if one fits."""
        graphs = self.graphs
        if graphs is not None and (captured := graphs.find(description)) is not None:
            return graphs.replay(captured, description)
        step = self.builder.build(description)
        return step.rows, step.lengths, self.model(step.batch)

    def _forward_pooled(self, description: Description) -> tuple[Outputs, dict[int, Tensor]]:
        """Starts a forward pass with pooled chunks: the head of each chunk's kind reads its hidden states."""
        step = self.builder.build(description)
        hidden = self.model.body(step.batch)
        at = description.num_logits
        logits = self.model.logits(hidden[:at], step.batch) if at else hidden[:0]
        pooled: dict[int, Tensor] = {}
        for index, chunk in enumerate(description.chunks):
            if chunk.pooled:
                head = self.model.heads[self.rows.kinds[chunk.row]]
                vector = head(hidden[at : at + chunk.count]).float()
                pooled[index] = self.readback.fetch(vector)
                at += chunk.count
        return (step.rows, step.lengths, logits), pooled

    def _sample(
        self, description: Description, outputs: Outputs, masks: Masks | None
    ) -> tuple[Sampled | None, dict[int, Tensor]]:
        rows, lengths, logits = outputs
        chunks = description.chunks
        new = [chunk.row for chunk in chunks if chunk.sample]
        count = len(description.decode) + len(new)
        out: Sampled | None = None
        if count:
            sampling = self.decode_sampling
            if new:
                params = [self.rows.params[row] for row in new]
                sampling = SamplePlan(sampling.params + params, self.rows.device)
            longest = max(self.rows.num_computed[row] for row in (*description.decode, *new))
            part = slice(count)
            sampled = sampling.sample(
                logits[part],
                self.rows,
                rows[part],
                lengths[part],
                longest=longest,
                masks=masks,
            )
            out = sampled.fetched(self.readback)
        return out, self._prompt_logprobs(chunks, logits[count:])

    def _prompt_logprobs(self, chunks: list[Chunk], logits: Tensor) -> dict[int, Tensor]:
        """For the chunks that need scores, `[3, positions]`: the log-probability of the prompt token after each
        position, and the most likely token there with its own."""
        found: dict[int, Tensor] = {}
        first = 0
        for i, chunk in enumerate(chunks):
            if chunk.scores:
                # the token after a sampling chunk is not in the prompt
                count, start = chunk.count - chunk.sample, chunk.start + 1
                after = self.rows.tokens[chunk.row, start : start + count].long()
                rows = logits[first : first + count].float().log_softmax(-1)
                best, tops = rows.max(-1)  # ids are exact in float32: vocabularies are below 2**24
                own = rows.gather(1, after[:, None])[:, 0]
                found[i] = self.readback.fetch(torch.stack([own, tops.float(), best]))
                first += chunk.count
        return found


def _tops(scores: Tensor) -> list[tuple[int, float]]:
    """The most likely token after each position, and its log-probability."""
    return list(zip(scores[1].long().tolist(), scores[2].tolist(), strict=True))
