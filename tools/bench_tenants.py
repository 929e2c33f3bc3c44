"""Two tenants of equal weight on the real engine: one floods it, the other asks for more than its share.

    python -m tools.bench_tenants [--seconds 60] [--json FILE]

In turn, the flood asks for 50 adapters over room for 8 on the device and 20 in host memory, and sends requests of 1,024
prompts. Each run is paired with one in which both tenants send the same. Prints the other tenant's share of the tokens.
Exits with 1 if a flood leaves it less than 0.45. The engine is a tiny model.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
from pathlib import Path

from engine.adapters.ref import AdapterRef
from engine.config import (
    GIB,
    AdapterConfig,
    EngineConfig,
    MemoryConfig,
    ModelConfig,
    SchedulerConfig,
)
from engine.errors import LoraxError, Overloaded
from engine.messages import Request, SamplingParams, TenantRef, Update
from engine.models import adapter_layout
from engine.process import ProcessBackend
from tools.adapters import write_adapter
from tools.bench_stalls import report
from tools.tiny import write_model

ADAPTERS = 50  # of the flood
ON_DEVICE, IN_HOST = 8, 20  # adapters
RANK, PROMPT, OUTPUT = 8, 32, 32  # of an adapter; tokens
PROMPTS = 1024  # of one request
OPEN = 40  # requests of a tenant with one prompt each
RETRY_S = 0.1  # after a refusal for lack of room
SETTLE = 0.2  # of a run, before tokens count
MIN_SHARE = 0.45


class Tenant:
    """Keeps requests open until it is cancelled, and counts the tokens that were computed for them."""

    def __init__(
        self, backend: ProcessBackend, name: str, adapters: list[str], prompts: int = 1
    ) -> None:
        self.tokens = 0
        self._backend, self._name = backend, name
        self._adapters = itertools.cycle(adapters)
        self._prompts = prompts
        self._numbers = itertools.count()
        open_requests = OPEN if prompts == 1 else 2
        if len(adapters) > 1:
            open_requests = 4 * len(adapters)
        self._tasks = [asyncio.create_task(self._run()) for _ in range(open_requests)]

    async def _run(self) -> None:
        while True:
            adapter = AdapterRef.parse(next(self._adapters))
            try:
                lease = await self._backend.acquire(adapter, None, TenantRef(self._name, 0.5))
            except Overloaded:
                await asyncio.sleep(RETRY_S)
                continue
            group = f"{self._name}-{next(self._numbers)}"
            await asyncio.gather(
                *(
                    _Sequence(self).run(self._backend, self._request(group, number, lease.image))
                    for number in range(self._prompts)
                )
            )
            lease.release()

    def _request(self, group: str, number: int, image: object) -> Request:
        return Request(
            id=f"{group}-{number}",
            tokens=[3 + (hash(group) + number + at) % 400 for at in range(PROMPT)],
            sampling=SamplingParams(),
            max_new_tokens=OUTPUT,
            eos_token_ids=[],
            adapter=image,  # type: ignore[arg-type]
            group=group,
            behind=number * (PROMPT + OUTPUT),
            arrival=asyncio.get_running_loop().time(),
            tenant=self._name,
        )

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _Sequence:
    """One sequence and its reader."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, backend: ProcessBackend, request: Request) -> None:
        """To its end."""
        backend.submit(request, self)
        try:
            await self._end
        except asyncio.CancelledError:
            backend.cancel(request.id)
            raise

    def take(self, update: Update) -> None:
        """See `Reader`."""
        if update.admitted is not None:
            self._tenant.tokens += PROMPT - update.cached_tokens
        self._tenant.tokens += len(update.tokens)
        if update.is_last and not self._end.done():
            self._end.set_result(None)

    def on_engine_lost(self, error: LoraxError) -> None:
        """See `Reader`."""
        if not self._end.done():
            self._end.set_exception(error)


def settings(folder: Path) -> EngineConfig:
    """Writes the model and its adapters."""
    write_model(folder / "model")
    model = ModelConfig(model_id=str(folder / "model"), dtype="float32", load_format="dummy")
    layout, _, _ = adapter_layout(model)
    size = 0
    for name in ("other", *(f"a{number}" for number in range(ADAPTERS))):
        size = write_adapter(folder / name, layout, RANK, seed=len(name))
    return EngineConfig(
        model=model,
        adapters=AdapterConfig(
            adapter_root=(str(folder),),
            adapter_source="local",
            max_active_adapters=ON_DEVICE,
            host_cache_gb=IN_HOST * (size + 65536) / GIB,
        ),
        scheduler=SchedulerConfig(max_batch_size=32, prefix_caching=False),
        memory=MemoryConfig(cpu_memory_gb=0.25),
    )


async def share_of_other(
    backend: ProcessBackend, flood: tuple[list[str], int], seconds: float
) -> float:
    """The other tenant's part of the tokens, beside a tenant with these adapters and prompts of a request."""
    tenants = [Tenant(backend, "flood", *flood), Tenant(backend, "other", ["other"])]
    await asyncio.sleep(SETTLE * seconds)
    before = [tenant.tokens for tenant in tenants]
    await asyncio.sleep(seconds)
    got = [tenant.tokens - first for tenant, first in zip(tenants, before, strict=True)]
    for tenant in tenants:
        await tenant.end()
    while backend.stats.running or backend.stats.waiting:
        await asyncio.sleep(0.1)
    return got[1] / sum(got)


async def measure(seconds: float) -> dict[str, float]:
    floods = {
        f"{ADAPTERS} adapters": ([f"a{number}" for number in range(ADAPTERS)], 1),
        f"requests of {PROMPTS} prompts": (["a0"], PROMPTS),
    }
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        backend = await ProcessBackend.start(settings(Path(name)))
        try:
            for flood, sends in floods.items():
                even = await share_of_other(backend, (["a0"], 1), seconds)
                found[f"share beside the same, before {flood}"] = even
                found[f"share beside {flood}"] = await share_of_other(backend, sends, seconds)
        finally:
            await backend.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = asyncio.run(measure(args.seconds))
    report(found, args.json)
    sys.exit(int(min(found.values()) < MIN_SHARE))


if __name__ == "__main__":
    main()
