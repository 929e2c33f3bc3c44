"""The real engine and exchange: three processes say what one process says, adapters and errors included."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from engine.adapters.ref import AdapterRef
from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.errors import AdapterNotFound, AdapterTooLarge, InvalidRequest, ModelError
from engine.messages import Request, SamplingParams
from engine.process import LocalBackend, ProcessBackend
from tests.process.fakes import AnyBackend, tokens_of, until
from tests.tiny import make_adapter, make_model

PRELOADED = ("one", "two")
ADAPTERS = (*PRELOADED, "three")

TEMPLATE = "{{ messages[0].content }}"  # of `three`

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = tmp_path_factory.mktemp("whole")
    model = make_model("llama", folder / "base")
    for seed, name in enumerate(ADAPTERS):
        make_adapter(model, folder / name, seed + 1, rank=4 + 4 * seed).unload()
    (folder / "three" / "chat_template.jinja").write_text(TEMPLATE)
    return EngineConfig(
        model=ModelConfig(model_id=str(folder / "base"), dtype="float32"),
        adapters=AdapterConfig(
            adapter_source="local", adapter_root=(str(folder),), host_cache_gb=0.02
        ),
        scheduler=SchedulerConfig(max_total_tokens=100),
        memory=MemoryConfig(cpu_memory_gb=0.05, num_threads=1),
    )


async def answers_of(backend: AnyBackend, root: str) -> list[list[int]]:
    """What the base and each adapter say to the same prompt, all asked at once."""

    async def one(name: str | None) -> list[int]:
        lease = await backend.acquire(AdapterRef((f"{root}/{name}",)), None) if name else None
        image, salt = (lease.image, lease.cache_salt) if lease else (None, b"")
        request = Request(
            f"to {name}", [5, 6, 7, 8], SamplingParams(), 20, [], adapter=image, cache_salt=salt
        )
        try:
            return await tokens_of(backend, request)
        finally:
            if lease:
                lease.release()

    return await asyncio.gather(*(one(name) for name in (None, *ADAPTERS)))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def backends(config: EngineConfig) -> AsyncIterator[tuple[LocalBackend, ProcessBackend]]:
    """One of each kind for several tests, with preloaded adapters."""
    adapters = replace(config.adapters, preloaded_adapter_ids=PRELOADED)
    config = replace(config, adapters=adapters)
    local, processes = await LocalBackend.start(config), await ProcessBackend.start(config)
    yield local, processes
    await processes.close()
    await local.close()


async def test_preloaded_adapters_lie_on_the_device(
    backends: tuple[LocalBackend, ProcessBackend],
) -> None:
    for backend in backends:
        await tokens_of(backend, Request("r", [5], SamplingParams(), 5, []))
        await until(lambda backend=backend: len(backend.stats.resident) == len(PRELOADED))
        names = {name.rpartition("/")[2] for name, _, _ in backend.stats.resident}
        assert names == set(PRELOADED)


async def test_processes_say_what_one_process_says(
    backends: tuple[LocalBackend, ProcessBackend],
    config: EngineConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    root = config.adapters.adapter_root[0]
    answers = []
    for backend in backends:
        answers.append(await answers_of(backend, root))
        with pytest.raises(AdapterNotFound):
            await backend.acquire(AdapterRef((f"{root}/none",)), None)
        with pytest.raises(InvalidRequest):
            await tokens_of(backend, Request("bad", [10_000], SamplingParams(), 5, []))
        assert all(a.state in ("ready", "failed") for a in await backend.adapters())
        for name, template in (("two", None), ("three", TEMPLATE)):
            lease = await backend.acquire(AdapterRef((name,)), None)
            lease.release()
            assert (lease.text and lease.text.template) == template
    assert answers[0] == answers[1]
    assert len({tuple(answer) for answer in answers[0]}) == 1 + len(ADAPTERS)


async def test_a_new_exchange_serves_the_same(
    backends: tuple[LocalBackend, ProcessBackend],
    config: EngineConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Killed with preloaded adapters and one in use: all stay in place, and files are read again for others."""
    caplog.set_level(logging.CRITICAL)
    root = config.adapters.adapter_root[0]
    _, backend = backends
    before = await answers_of(backend, root)
    held = await backend.acquire(AdapterRef(("three",)), None)
    for restarts in (1, 2):
        os.kill(backend.pids["exchange"] or 0, signal.SIGKILL)
        assert await answers_of(backend, root) == before
        await until(
            lambda n=restarts: backend.exchange_restarts == n and not backend.exchange_away,
            seconds=60,
        )
        assert await answers_of(backend, root) == before
        again = await backend.acquire(AdapterRef(("three",)), None)
        assert (again.image, again.text) == (held.image, held.text) and again.text is not None
        (await backend.acquire(AdapterRef(("one",)), None)).release()


@pytest.mark.parametrize("kind", [LocalBackend, ProcessBackend])
async def test_preloaded_adapters_must_fit(config: EngineConfig, kind: type[AnyBackend]) -> None:
    adapters = replace(
        config.adapters, preloaded_adapter_ids=PRELOADED, adapter_memory_fraction=0.0
    )
    with pytest.raises(AdapterTooLarge, match="one"):
        await kind.start(replace(config, adapters=adapters))


async def test_missing_model_is_named() -> None:
    config = EngineConfig(model=ModelConfig(model_id="/nowhere/at/all"))
    with pytest.raises(ModelError, match="/nowhere/at/all"):
        await ProcessBackend.start(config)
