"""The engine: requests in, updates out, one synchronous step at a time. It starts no processes and no threads.

`step` is plan, run, commit: the scheduler plans the next step, the runner computes it, and the scheduler turns the
result into updates.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import msgspec

from engine.adapters.tiers import HostRegion
from engine.build import build_shard, info_of, log_start, make_scheduler
from engine.checkpoint import tokenizer_json
from engine.config import EngineConfig
from engine.errors import EngineDead, InvalidRequest, LoraxError, OutOfMemory
from engine.grammar import Constrained, Grammars
from engine.messages import AdapterImageRef, EngineStats, Request, StepPlan, Update
from engine.ops.layout import ShardLayout
from engine.runner.faults import empty_cache, first_line, num_refusals, out_of_memory
from engine.runner.masks import MaskBuffers
from engine.runner.sampler import Masks
from engine.step_counts import StepCounts
from engine.structured import Structured

logger = logging.getLogger(__name__)

STEP_REMEDY = "lower --max-batch-prefill-tokens or --cuda-memory-fraction"


class Engine:
    """One base model on one device, its KV cache, its adapters.

    Not thread-safe: one thread calls it. Raises ModelError or ConfigError from the constructor.
    """

    def __init__(
        self,
        config: EngineConfig,
        region: HostRegion,
        clock: Callable[[], float] = time.monotonic,
        run_ahead: int | None = None,
    ) -> None:
        """`run_ahead`: steps launched before the oldest is read back, 0 or 1; None: 1 on a GPU, 0 on a CPU."""
        started = time.perf_counter()
        built = build_shard(config, region)
        self.platform, self.plan, self.runner = built.platform, built.plan, built.runner
        self.model, self.spec = built.model.decoder, built.model.spec
        self.layout: ShardLayout = built.model.layout
        self.scheduler = make_scheduler(config, built.plan, clock)
        grammars = Grammars(partial(tokenizer_json, built.model.folder), self.spec.vocab)
        buffers = MaskBuffers(built.plan.max_rows, self.spec.vocab, self.platform.device)
        self.structured = Structured(grammars, buffers)
        self._counts = StepCounts()
        self._updates: list[Update] = []  # not taken yet
        self.run_ahead = int(self.platform.is_cuda) if run_ahead is None else run_ahead
        self.info = info_of(config, built)
        self._refusals = num_refusals()  # read again only after a failed step: it is slow
        log_start(built, self.info, time.perf_counter() - started)

    def step(self) -> list[Update]:
        """One step of the batch, if there is work.

        A step that does not fit into the device's memory is rolled back; the next steps retry it in parts.
        """
        self._updates += self.structured.add_ready(self.scheduler.add)
        plan = self.scheduler.plan()
        if plan is not None and (reason := self._launch(plan)) is not None:
            self._roll_back(reason)
        elif len(self.runner.launched) > (0 if plan is None else self.run_ahead):
            self._commit()
        return self._take_updates()

    def _commit(self) -> None:
        """Waits for the oldest step. What it brings is kept until it is taken: a later failure does not lose it."""
        result = self.runner.collect()
        self._counts.committed()
        self._updates += self.scheduler.commit(result)

    def _take_updates(self) -> list[Update]:
        updates = self._updates + self.scheduler.take_updates()
        self._updates = []
        if self.structured.any:
            self.structured.ended(updates)
        return updates

    def _launch(self, plan: StepPlan) -> str | None:
        """Starts the step. Returns None, or the reason if the step does not fit into the device's memory."""
        try:
            self.runner.forward(plan)
            size = len(self.scheduler.flights[-1].decode) + len(plan.chunks)
            self._counts.launched(plan, size)
            self.runner.sample(self._masks() if self.structured.any else None)
        except RuntimeError as error:
            reason = out_of_memory(error, self._refusals)
            self._refusals = num_refusals()
            if reason is None:
                raise
            return reason  # the error itself would keep the step's activations alive
        return None

    def _masks(self) -> Masks | None:
        """The masks of the rows with a grammar in the step that was launched. None: there are none.

        Masks depend on the tokens before, so the steps before are committed first. The forward pass runs meanwhile.
        """
        flight = self.scheduler.flights[-1]
        if not any(one is not None and one.request.grammar for one in flight.sampled()):
            return None
        while self.runner.launched:
            self._commit()
        rows = [
            Constrained(at, one.request.id, one.tokens, one.prompt_length)
            for at, one in enumerate(flight.sampled())
            if one is not None and one.request.grammar
        ]
        return self.structured.masks(rows, lambda id, error: self.scheduler.fail([id], error))

    def _roll_back(self, reason: str) -> None:
        """Undoes the last planned step and commits those before it. Raises OutOfMemory if no request was in it."""
        while self.runner.launched:
            self._commit()
        self.runner.abandon()
        self._counts.failed()
        empty_cache(self.platform.device)
        error = OutOfMemory(
            f"the request does not fit into the device's memory: {reason}", hint=STEP_REMEDY
        )
        involved = self.scheduler.roll_back(error)
        if not involved:
            raise OutOfMemory(f"the device's memory is full: {reason}", hint=STEP_REMEDY)
        logger.warning(
            "a step of %d requests did not fit into memory and is retried in parts (%s): %s",
            len(involved),
            STEP_REMEDY,
            reason,
        )

    @property
    def stats(self) -> EngineStats:
        return msgspec.structs.replace(self.scheduler.stats(), **self._counts.stats())

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.structured.has_work

    def preload(self, image: AdapterImageRef) -> None:
        """Places an adapter that is never evicted; call it before any request. Raises AdapterTooLarge."""
        self.scheduler.preload(image)

    def pin(self, digest: bytes, pinned: bool) -> None:
        """An adapter stays on the device as long as requests find room without it, or no longer."""
        self.scheduler.pin(digest, pinned)

    def drop(self, digest: bytes) -> None:
        """An adapter leaves the device when no sequence uses it."""
        self.scheduler.drop(digest)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises InvalidRequest or AdapterTooLarge and then changes nothing."""
        kinds = self.model.kinds
        if request.kind not in kinds:
            raise InvalidRequest(
                f"{self.spec.model_type} models do not serve requests of kind {request.kind!r}",
                field="kind",
                hint=f"this model serves: {', '.join(kinds)}",
            )
        vocab = (request.adapter and request.adapter.vocab) or self.spec.vocab
        if any(not 0 <= token < vocab for token in request.tokens):
            raise InvalidRequest(
                f"a prompt token is outside the vocabulary of {vocab}", field="tokens"
            )
        if request.grammar:
            self.structured.submit(request)
        else:
            self.scheduler.add(request)

    def cancel(self, id: str) -> None:
        """Ends a request early; its last update says so. An unknown id is ignored."""
        if not self.structured.cancel(id):
            self.scheduler.cancel(id)

    def fail(self, error: LoraxError) -> list[Update]:
        """Ends the requests of a failed step with an error; all others continue.

        Raises EngineDead if the device is in an unrecoverable state: after an illegal access, all later steps fail.
        """
        try:
            self.runner.abandon()
        except RuntimeError as broken:
            raise EngineDead(
                f"the device is in an unrecoverable state: {first_line(broken)}"
            ) from broken
        self._counts.failed()
        self.scheduler.fail(None, error)
        return self._take_updates()

    def close(self) -> None:
        """Frees the memory."""
        self.structured.close()
        with suppress(RuntimeError):  # of a device in an unrecoverable state
            self.runner.abandon()
            self.runner.placer.close()
        del self.runner, self.model
