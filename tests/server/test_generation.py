"""The pipeline without HTTP: equalities between the ways to the same text."""

from __future__ import annotations

import asyncio
import random

import pytest

from engine.adapters.ref import AdapterRef
from engine.config import EngineConfig, ServerConfig
from engine.errors import AdapterNotFound, EngineDead, GenerationError, InvalidRequest
from engine.metrics import Metrics
from engine.server.events import Event, Finish, PromptLogprobs, Token
from engine.server.generation import Generator
from engine.server.parameters import Parameters
from engine.server.text import Text
from tests.server.fake import EOS, FakeBackend

GREEDY = Parameters(max_new_tokens=40)
ADAPTER = AdapterRef(("lora",))


@pytest.fixture
def generator(backend: FakeBackend, text: Text) -> Generator:
    config = EngineConfig(server=ServerConfig(max_best_of=4))
    return Generator(backend, text, config, Metrics())


async def idle(backend: FakeBackend) -> None:
    async with asyncio.timeout(5):
        while backend.open:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    backend.check_idle()


async def collect(generator: Generator, prompts: list, parameters: Parameters) -> list[Event]:
    async with generator.open(prompts, parameters) as generation:
        found: list[Event] = []
        while (events := await generation.next()) is not None:
            assert events
            found += events
    await idle(generator.backend)
    return found


def deltas(events: list[Event], choice: int = 0) -> str:
    return "".join(
        event.delta
        for event in events
        if not isinstance(event, PromptLogprobs) and event.choice == choice
    )


def finish_of(events: list[Event]) -> Finish:
    (finish,) = [event for event in events if isinstance(event, Finish)]
    return finish


@pytest.mark.parametrize("burst", [1, 3, 100])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("seed", range(12))
async def test_deltas_are_the_text_is_the_decoded_tokens(
    generator: Generator, backend: FakeBackend, text: Text, seed: int, burst: int, bare: bool
) -> None:
    backend.burst, backend.bare_finish = burst, bare
    chosen = random.Random(seed)
    if seed < 6:
        tokens = [chosen.randrange(4, 400) for _ in range(30)]
    else:
        tokens = text._tokenizer.encode("né 😀👨‍👩‍👧 漢字 xyz").ids[: chosen.randrange(5, 40)]
    backend.answer = lambda request: tokens
    events = await collect(generator, ["Hello"], GREEDY)
    expected = text.decode(tokens, generator.backend.requests[0].tokens)
    assert deltas(events) == finish_of(events).text == expected
    assert [event.id for event in events if isinstance(event, Token)] == [*tokens, EOS]
    assert finish_of(events).reason == "eos_token"
    assert finish_of(events).usage.generated_tokens == len(tokens) + 1


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("seed", range(60))
async def test_stop_sequences_are_found_anywhere(
    generator: Generator, backend: FakeBackend, text: Text, seed: int, keep: bool
) -> None:
    """Streamed = not streamed = cut out of the decoded whole, for stops that begin and end inside tokens."""
    chosen = random.Random(seed)
    sample = "".join(chosen.choices(["Hello ", "wörld", "😀", "漢字", "ab", "aab", "\n"], k=12))
    tokens = text._tokenizer.encode(sample, add_special_tokens=False).ids
    start = chosen.randrange(len(sample) - 1)
    stops = [sample[start : start + chosen.randrange(1, 7)], "never seen"]
    backend.answer, backend.burst = lambda request: tokens, chosen.choice([1, 2, 7])
    parameters = Parameters(stop=stops, keep_stop=keep)
    events = await collect(generator, ["x"], parameters)
    at = sample.find(stops[0])
    expected = sample[: at + len(stops[0])] if keep else sample[:at]
    finish = finish_of(events)
    assert deltas(events) == finish.text == expected
    assert finish.reason == "stop_sequence"
    count = sum(isinstance(event, Token) for event in events)
    assert finish.usage.generated_tokens == count <= len(tokens)
    assert text.decode(tokens[:count]).startswith(sample[: at + len(stops[0])].rstrip("\ufffd"))
    assert text.decode(tokens[: count - 1]).find(stops[0]) == -1
    ended_early = count < len(tokens)
    if ended_early and backend.burst == 1:
        assert backend.cancelled == [backend.requests[0].id]


async def test_what_looked_like_a_stop_comes_out_at_the_end(
    generator: Generator, backend: FakeBackend
) -> None:
    backend.say("one two STO")
    events = await collect(generator, ["x"], Parameters(stop=["STOP"]))
    assert deltas(events) == finish_of(events).text == "one two STO"


async def test_a_special_token_can_be_a_stop_sequence(
    generator: Generator, backend: FakeBackend, text: Text
) -> None:
    ids = text._tokenizer.encode("one<|im_start|>two", add_special_tokens=False).ids
    backend.answer = lambda request: ids
    events = await collect(generator, ["x"], Parameters(stop=["<|im_start|>"]))
    assert finish_of(events).reason == "stop_sequence"
    assert deltas(events) == finish_of(events).text == "one"


async def test_best_of_has_a_seed_for_each(generator: Generator, backend: FakeBackend) -> None:
    parameters = Parameters(sample=True, seed=7, best_of=3, logprobs=True, max_new_tokens=20)
    events = await collect(generator, ["x", [5, 6]], parameters)
    seeds = [request.sampling.seed for request in backend.requests]
    assert seeds[0] == 7 and len(set(seeds[:3])) == 3 and seeds[:3] == seeds[3:]
    assert {event.choice for event in events} == set(range(6))
    assert [request.tokens for request in backend.requests[3:]] == [[5, 6]] * 3
    backend.requests.clear()
    await collect(generator, ["x", [5, 6]], parameters)
    assert [request.sampling.seed for request in backend.requests] == seeds


async def test_one_lease_serves_all_sequences(generator: Generator, backend: FakeBackend) -> None:
    parameters = Parameters(adapter=ADAPTER, api_token="t", sample=True, best_of=3)
    await collect(generator, ["x", "y"], parameters)
    assert backend.acquired == [(ADAPTER, "t")]
    assert len(backend.leases) == 1
    assert {request.adapter for request in backend.requests} == {backend.leases[0].image}
    assert {request.cache_salt for request in backend.requests} == {b"salt"}


async def test_the_lease_ends_with_the_engines_work(
    generator: Generator, backend: FakeBackend
) -> None:
    """A reader that is slow, or gone, does not keep the adapter."""
    async with generator.open(["x"], Parameters(adapter=ADAPTER)) as generation:
        await asyncio.sleep(0.05)
        assert backend.leases[0].num_released == 1
        assert isinstance((await generation.next() or [])[-1], Finish)


async def test_a_stop_is_answered_before_the_engine_lets_go(
    generator: Generator, backend: FakeBackend
) -> None:
    """And the adapter is held until it has."""
    backend.say("one two three")
    backend.let_go = 0.2
    parameters = Parameters(adapter=ADAPTER, stop=["two"])
    async with generator.open(["x"], parameters) as generation:
        while await generation.next() is not None:
            pass
    assert backend.open and generator.num_open
    assert not backend.leases[0].num_released
    await idle(backend)
    assert not generator.num_open and generator.idle.is_set()


async def test_leaving_early_waits_for_the_engine(
    generator: Generator, backend: FakeBackend
) -> None:
    backend.let_go, backend.delay = 0.1, 0.01
    async with generator.open(["x"], Parameters(adapter=ADAPTER)) as generation:
        await generation.next()
    assert backend.cancelled
    backend.check_idle()


async def test_leaving_at_once_cancels(generator: Generator, backend: FakeBackend) -> None:
    async with generator.open(["x"], Parameters(adapter=ADAPTER)):
        pass
    backend.check_idle()
    assert len(backend.cancelled) == 1 and not generator.num_open


async def test_leaving_early_cancels(generator: Generator, backend: FakeBackend) -> None:
    backend.delay = 0.01
    async with generator.open(["x"], Parameters(adapter=ADAPTER, best_of=2)) as generation:
        await generation.next()
    backend.check_idle()
    assert len(backend.cancelled) == 2
    assert backend.leases[0].num_released


async def test_cancelled_while_it_waits_for_the_adapter(
    generator: Generator, backend: FakeBackend
) -> None:
    backend.acquire_delay = 10
    task = asyncio.create_task(collect(generator, ["x"], Parameters(adapter=ADAPTER)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    backend.check_idle()
    assert not backend.requests


async def test_silence_is_an_empty_list(generator: Generator, backend: FakeBackend) -> None:
    backend.first_delay = 0.05
    async with generator.open(["x"], GREEDY) as generation:
        assert await generation.next(0.01) == []
        assert await generation.next(5)


@pytest.mark.parametrize("fail_after", [0, 3])
async def test_a_failure_comes_after_what_arrived(
    generator: Generator, backend: FakeBackend, fail_after: int
) -> None:
    backend.fail_after = fail_after
    found: list[Event] = []
    with pytest.raises(EngineDead):
        async with generator.open(["x"], Parameters(adapter=ADAPTER)) as generation:
            while (events := await generation.next()) is not None:
                found += events
    assert len(found) == fail_after
    backend.check_idle()


async def test_the_engines_own_cancellation_is_an_error(
    generator: Generator, backend: FakeBackend
) -> None:
    backend.finish = "cancelled"
    with pytest.raises(GenerationError):
        await collect(generator, ["x"], GREEDY)


async def test_truncation_keeps_the_end(generator: Generator, backend: FakeBackend) -> None:
    whole = await generator.text.encode("Hello world, how are you?")
    await collect(generator, ["Hello world, how are you?"], Parameters(truncate=3))
    assert backend.requests[0].tokens == whole[-3:]


async def test_no_eos_where_it_is_ignored(generator: Generator, backend: FakeBackend) -> None:
    await collect(generator, ["x"], Parameters(ignore_eos=True))
    await collect(generator, ["x"], Parameters())
    assert [request.eos_token_ids for request in backend.requests] == [[], [1, 3]]


async def test_room_is_what_the_prompt_leaves(generator: Generator, backend: FakeBackend) -> None:
    await collect(generator, [[5] * 100], Parameters())
    assert backend.requests[0].max_new_tokens == 156


@pytest.mark.parametrize(
    ("prompt", "parameters", "field"),
    [
        ([5] * 201, Parameters(), "inputs"),
        ([], Parameters(), "inputs"),
        ([400], Parameters(), "inputs"),
        ([-1], Parameters(), "inputs"),
        ([5] * 200, Parameters(max_new_tokens=57), "max_new_tokens"),
    ],
)
async def test_prompts_that_do_not_fit(
    generator: Generator,
    backend: FakeBackend,
    prompt: list[int],
    parameters: Parameters,
    field: str,
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await collect(generator, [prompt], parameters)
    assert caught.value.field == field
    assert not backend.requests


async def test_too_many_sequences(generator: Generator) -> None:
    with pytest.raises(InvalidRequest, match="1026 sequences"):
        await collect(generator, ["x"] * 513, Parameters(sample=True, best_of=2))


async def test_an_unknown_adapter(generator: Generator, backend: FakeBackend) -> None:
    with pytest.raises(AdapterNotFound):
        await collect(generator, ["x"], Parameters(adapter=AdapterRef(("missing",))))
    backend.check_idle()


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        (Parameters(), 0.0),
        (Parameters(sample=True), 1.0),
        (Parameters(sample=True, temperature=0.0), 0.0),
        (Parameters(sample=True, temperature=1e-9), 0.0),
        (Parameters(sample=True, temperature=0.5), 0.5),
        (Parameters(temperature=0.5), 0.0),
    ],
)
async def test_temperature(
    generator: Generator, backend: FakeBackend, parameters: Parameters, temperature: float
) -> None:
    events = await collect(generator, ["x"], parameters)
    assert backend.requests[0].sampling.temperature == temperature
    assert (finish_of(events).seed is None) == (temperature == 0)
