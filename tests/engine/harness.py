"""An engine over a tiny model, adapters staged in its host region, and requests run to their end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from engine.adapters.tiers import HostRegion
from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.lora.own import Tables
from engine.messages import (
    AdapterImageRef,
    FinishReason,
    Request,
    SamplingParams,
    TokenOutput,
    Usage,
)
from engine.models.decoder import Decoder
from tools.adapters import stage

MIB = 1 << 20
Device = Literal["auto", "cpu", "cuda"]


def config_of(
    model: Path, arena_mib: int = 8, device: Device = "auto", **scheduler: object
) -> EngineConfig:
    """A small engine: 32 MiB in all, of which `arena_mib` are the arena; on a GPU the same arena in what is free."""
    share = arena_mib / 32
    if device != "cpu" and torch.cuda.is_available():
        budget = torch.cuda.mem_get_info()[0] * MemoryConfig().cuda_memory_fraction
        share = (arena_mib + 0.5) * MIB / budget  # rounded down to whole MiB
    return EngineConfig(
        model=ModelConfig(model_id=str(model), dtype="float32"),
        adapters=AdapterConfig(
            adapter_memory_fraction=share,
            max_active_adapters=64,
            adapter_cycle_time_s=0.02,
        ),
        scheduler=replace(SchedulerConfig(max_total_tokens=200), **scheduler),  # type: ignore[arg-type]
        memory=MemoryConfig(device=device, cpu_memory_gb=32 / 1024),
    )


@dataclass
class Outcome:
    """Everything that one request was told."""

    outputs: list[TokenOutput] = field(default_factory=list)
    finish: FinishReason | None = None
    usage: Usage | None = None
    error: dict[str, object] | None = None
    prompt_logprobs: list[float] | None = None
    prompt_tops: list[tuple[int, float]] = field(default_factory=list)
    pooled: list[float] | None = None

    @property
    def tokens(self) -> list[int]:
        return [output.token for output in self.outputs]

    @property
    def logprobs(self) -> list[float]:
        return [output.logprob for output in self.outputs if output.logprob is not None]


class Wrapper:
    """Stands before a decoder."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.heads, self.body, self.logits = model.heads, model.body, model.logits


class Harness:
    """One engine; `stage` puts adapters into its host region, `run` ends a list of requests."""

    def __init__(
        self,
        config: EngineConfig,
        host_mib: int = 64,
        run_ahead: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.region = HostRegion.create(host_mib * MIB)
        self.engine = Engine(config, self.region, clock, run_ahead)
        self.free = 0

    def stage(self, folder: Path, tables: Tables | None = None) -> AdapterImageRef:
        """Writes the adapter's image into the region, as the exchange would."""
        image, self.free = stage(folder, self.engine.layout, self.region, self.free, tables)
        return image

    def run(self, requests: list[Request], check: bool = True) -> dict[str, Outcome]:
        """Submits all, steps until nothing is left; the scheduler is checked after every step."""
        outcomes = {request.id: Outcome() for request in requests}
        for request in requests:
            self.engine.submit(request)
        while self.engine.has_work:
            for update in self.engine.step():
                outcome = outcomes[update.id]
                outcome.outputs += update.tokens
                outcome.finish = update.finish or outcome.finish
                outcome.usage = update.usage or outcome.usage
                outcome.error = update.error or outcome.error
                outcome.prompt_logprobs = update.prompt_logprobs or outcome.prompt_logprobs
                outcome.prompt_tops += update.prompt_tops
                outcome.pooled = update.pooled or outcome.pooled
            if check:
                self.engine.scheduler.check()
        return outcomes

    def close(self) -> None:
        self.engine.close()
        self.region.close()


def request(
    id: str,
    tokens: list[int],
    adapter: AdapterImageRef | None = None,
    max_new_tokens: int = 12,
    **sampling: object,
) -> Request:
    """A greedy request that does not stop early and reports log-probabilities."""
    params = SamplingParams(**({"logprobs": True} | sampling))  # type: ignore[arg-type]
    return Request(id, tokens, params, max_new_tokens, [], adapter)
