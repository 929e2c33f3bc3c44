"""Both clients over the server itself, with a backend that says what a test tells it to."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from typing import Any

import pytest

from engine.errors import AdapterIncompatible, OutOfMemory
from lorax import AsyncClient, Client, MergedAdapters, errors
from tests.server.fake import FakeBackend, Start, events_of

SAYING = "Grüße 😀\u2028 aus München!"

Connect = Callable[..., Awaitable[Any]]


@pytest.fixture(params=[Client, AsyncClient], ids=lambda kind: kind.__name__)
async def connect(request: pytest.FixtureRequest, start: Start) -> AsyncIterator[Connect]:
    """Starts a server, and asks it: `ask = await connect(); await ask(lambda client: client.info())`."""
    clients: list[Any] = []

    async def make(server: dict[str, object] | None = None, **options: Any) -> Any:
        url = str((await start(server)).make_url("/"))
        client = request.param(url, **options)
        clients.append(client)

        async def ask(call: Callable[[Any], Any]) -> Any:
            if isinstance(client, Client):
                return await asyncio.to_thread(lambda: _read(call(client)))
            asked = call(client)
            return [part async for part in asked] if inspect.isasyncgen(asked) else await asked

        return ask

    yield make
    for client in clients:
        closed = client.close()
        if closed is not None:
            await closed


def _read(asked: Any) -> Any:
    return list(asked) if inspect.isgenerator(asked) else asked


async def test_the_answer_is_the_servers(
    connect: Connect, start: Start, backend: FakeBackend
) -> None:
    backend.say(SAYING)
    ask = await connect()
    response = await ask(
        lambda client: client.generate(
            "Hi", "pirate", seed=1, decoder_input_details=True, return_k_alternatives=2
        )
    )
    parameters = {
        "adapter_id": "pirate",
        "seed": 1,
        "details": True,
        "decoder_input_details": True,
        "return_k_alternatives": 2,
    }
    raw = await (await start()).post("/generate", json={"inputs": "Hi", "parameters": parameters})
    assert response.model_dump(exclude_unset=True) == await raw.json()
    assert response.generated_text == SAYING
    assert response.details.finish_reason == "eos_token"


async def test_a_stream_is_the_servers(
    connect: Connect, start: Start, backend: FakeBackend
) -> None:
    backend.say(SAYING)
    ask = await connect()
    parts = await ask(lambda client: client.generate_stream("Hi", seed=1, return_k_alternatives=1))
    body = {"inputs": "Hi", "parameters": {"details": True, "seed": 1, "return_k_alternatives": 1}}
    raw = await (await start()).post("/generate_stream", json=body)
    assert [part.model_dump_json(exclude_unset=True) for part in parts] == events_of(
        await raw.read()
    )
    assert "".join(part.token.text for part in parts if not part.token.special) == SAYING
    assert parts[-1].generated_text == SAYING
    assert parts[-1].details.generated_tokens == len(parts)
    assert all(part.generated_text is None for part in parts[:-1])


async def test_parameters_arrive(connect: Connect, backend: FakeBackend) -> None:
    ask = await connect({"max_best_of": 4})
    await ask(
        lambda client: client.generate(
            "Hi",
            do_sample=True,
            top_k=3,
            min_p=0.1,
            frequency_penalty=1.5,
            presence_penalty=-1,
            best_of=3,
        )
    )
    assert len(backend.requests) == 3
    sampling = backend.requests[0].sampling
    assert (sampling.top_k, sampling.min_p) == (3, 0.1)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (1.5, -1)
    await ask(lambda client: client.generate("Hi", priority=-7, max_new_tokens=2))
    assert (backend.requests[-1].priority, backend.requests[-1].max_new_tokens) == (-7, 2)


async def test_merged_adapters(connect: Connect, backend: FakeBackend) -> None:
    merged = MergedAdapters(ids=["a", "b"], weights=[1, 2], merge_strategy="ties", density=0.5)
    ask = await connect()
    await ask(lambda client: client.generate("Hi", merged_adapters=merged))
    recipe = backend.acquired[0][0].recipe
    assert recipe is not None and asdict(recipe)["density"] == 0.5


async def test_tokens_and_keys(connect: Connect, backend: FakeBackend) -> None:
    """With API keys, `api_key` opens the server and `api_token` goes to the adapter's source."""
    ask = await connect({"api_key": ("sk-1",)}, api_key="sk-1")
    await ask(lambda client: client.generate("Hi", adapter_id="pirate", api_token="t-1"))
    assert backend.acquired[0][1] == "t-1"
    ask = await connect({"api_key": ("sk-1",)}, api_key="sk-2")
    with pytest.raises(errors.UnauthorizedError):
        await ask(lambda client: client.info())
    assert await ask(lambda client: client.health())


async def test_facts(connect: Connect, backend: FakeBackend) -> None:
    ask = await connect()
    info = await ask(lambda client: client.info())
    assert (info.model_id, info.max_total_tokens, info.vocab_size) == ("tiny/base", 256, 400)
    tokens = await ask(lambda client: client.tokenize("Hello world", add_special_tokens=False))
    assert "".join("Hello world"[token.start : token.stop] for token in tokens) == "Hello world"
    assert "# TYPE lorax_queue_length gauge" in await ask(lambda client: client.metrics())
    assert "lorax_queue_length" in str(await ask(lambda client: client.metrics("json")))
    assert await ask(lambda client: client.health())
    backend.alive = False
    assert not await ask(lambda client: client.health())


async def test_aliases(connect: Connect) -> None:
    ask = await connect()
    assert (
        await ask(lambda client: client.adapters.set_alias("prod", "org/a@v1"))
    ).previous is None
    changed = await ask(lambda client: client.adapters.set_alias("prod", "org/b", source="hub"))
    assert changed.previous.adapter_id == "org/a@v1"
    assert await ask(lambda client: client.adapters.aliases()) == [
        changed.model_copy(update={"previous": None})
    ]
    assert (await ask(lambda client: client.adapters.remove_alias("prod"))).adapter_id == "org/b"


async def test_errors(connect: Connect, backend: FakeBackend) -> None:
    backend.adapter_errors["other"] = AdapterIncompatible("rank 9 of `q`", hint="use another")
    ask = await connect({"max_concurrent_requests": 2, "max_stop_sequences": 1})
    with pytest.raises(errors.AdapterNotFoundError) as caught:
        await ask(lambda client: client.generate("Hi", adapter_id="missing"))
    assert (caught.value.status, caught.value.field) == (404, "adapter_id")
    with pytest.raises(errors.AdapterIncompatibleError, match=r"rank 9 of `q` \(use another\)"):
        await ask(lambda client: client.generate_stream("Hi", adapter_id="other"))
    with pytest.raises(errors.ValidationError) as wrong:
        await ask(lambda client: client.generate("Hi", stop_sequences=["a", "b"]))
    assert wrong.value.field == "stop"
    backend.fail_after, backend.failure = 1, OutOfMemory("too large")
    with pytest.raises(errors.OutOfMemoryError, match="too large"):
        await ask(lambda client: client.generate_stream("Hi"))


async def cancelled(backend: FakeBackend) -> None:
    async with asyncio.timeout(20):
        while not backend.cancelled:
            await asyncio.sleep(0.005)


async def test_closing_a_stream_cancels_it(connect: Connect, backend: FakeBackend) -> None:
    """The client, and its other connections, stay open."""
    backend.delay, backend.answer = 0.01, lambda request: [5] * 10_000
    ask = await connect()
    kept: list[Any] = []

    async def first(client: AsyncClient) -> None:
        kept.append(client.generate_stream("Hi", max_new_tokens=200))
        await anext(kept[0])
        await kept[0].aclose()

    def first_of_threads(client: Client) -> None:
        kept.append(client.generate_stream("Hi", max_new_tokens=200))
        next(kept[0])
        kept[0].close()

    await ask(lambda client: (first_of_threads if isinstance(client, Client) else first)(client))
    await cancelled(backend)
    assert (await ask(lambda client: client.info())).version


async def test_many_at_once(start: Start, backend: FakeBackend) -> None:
    """More than httpx's own limit of connections, all open at the same time."""
    backend.gate = asyncio.Event()
    url = str((await start()).make_url("/"))
    async with AsyncClient(url) as client:
        asked = [asyncio.create_task(client.generate("Hi", max_new_tokens=1)) for _ in range(120)]
        async with asyncio.timeout(60):
            while len(backend.requests) < 120:
                await asyncio.sleep(0.005)
        backend.gate.set()
        assert len(await asyncio.gather(*asked)) == 120
