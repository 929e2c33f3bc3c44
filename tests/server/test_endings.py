"""How sequences end, told update by update: who is cancelled, when the adapter is given back, what is still read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from engine.adapters.ref import AdapterRef
from engine.backend import Reader
from engine.config import EngineConfig, ServerConfig
from engine.errors import EngineDead, GenerationError, LoraxError
from engine.messages import EngineInfo, EngineStats, Request, TokenOutput, Update, Usage
from engine.metrics import Metrics
from engine.server.events import Finish, Token
from engine.server.generation import Generation, Generator
from engine.server.parameters import Parameters
from engine.server.text import Text
from tests.engine_info import INFO
from tests.server.fake import FakeBackend, FakeLease

ADAPTER = AdapterRef(("lora",))


@dataclass
class Hand:
    """An engine moved by hand, with the adapters of a fake one."""

    text: Text
    info: EngineInfo = INFO
    stats: EngineStats = EngineStats()
    readers: dict[str, Reader] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)
    leases: list[FakeLease] = field(default_factory=list)
    refuse_from: int | None = None  # requests, from which on submitting fails

    def submit(self, request: Request, reader: Reader) -> None:
        if self.refuse_from is not None and len(self.readers) >= self.refuse_from:
            raise EngineDead("no more")
        self.readers[request.id] = reader

    def cancel(self, id: str) -> None:
        self.cancelled.append(id)

    async def acquire(self, ref: AdapterRef, token: str | None, tenant: str = "") -> FakeLease:
        lease = await FakeBackend(self.text).acquire(ref, token)
        self.leases.append(lease)
        return lease

    def say(self, choice: int, text: str = "", **last: object) -> None:
        """An update of the sequence of that choice."""
        id, reader = list(self.readers.items())[choice]
        if "finish" in last or "error" in last:
            self.ended.add(id)
        tokens = self.text._tokenizer.encode(text, add_special_tokens=False).ids
        reader.take(Update(id, [TokenOutput(token) for token in tokens], **last))  # type: ignore[arg-type]

    def end(self, choice: int, finish: str = "length") -> None:
        self.say(choice, finish=finish, usage=Usage(1, 0, 1))

    def die(self) -> None:
        for id, reader in self.readers.items():
            if id not in self.ended:
                self.ended.add(id)
                reader.on_engine_lost(EngineDead("gone"))

    @property
    def released(self) -> list[int]:
        return [lease.num_released for lease in self.leases]


@pytest.fixture
def hand(text: Text) -> Hand:
    return Hand(text)


@pytest.fixture
def generator(hand: Hand, text: Text) -> Generator:
    config = EngineConfig(server=ServerConfig(max_best_of=4))
    return Generator(hand, text, config, Metrics())  # type: ignore[arg-type]


@asynccontextmanager
async def opened(
    generator: Generator, prompts: list, parameters: Parameters
) -> AsyncIterator[Generation]:
    """A generation whose engine dies when the test fails: otherwise it would wait for the engine's last word."""
    async with asyncio.timeout(5), generator.open(prompts, parameters) as generation:
        try:
            yield generation
        except BaseException:
            generator.backend.die()  # type: ignore[attr-defined]
            raise


async def read(generation: Generation) -> tuple[str, list[LoraxError]]:
    """All text of the first choice, and the error at the end."""
    text = ""
    try:
        while (events := await generation.next(1)) is not None:
            assert events
            text += "".join(
                one.delta for one in events if isinstance(one, Token | Finish) and not one.choice
            )
    except LoraxError as error:
        return text, [error]
    return text, []


async def test_a_stop_cancels_while_others_run(hand: Hand, generator: Generator) -> None:
    """Once, at once; what still comes of it is nobody's; and the adapter is held for both."""
    parameters = Parameters(adapter=ADAPTER, stop=["two"])
    async with opened(generator, ["x", "y"], parameters) as generation:
        hand.say(0, "one two")
        ids = list(hand.readers)
        assert hand.cancelled == ids[:1]
        hand.say(0, "two three")
        hand.end(0, "cancelled")
        assert hand.cancelled == ids[:1] and hand.released == [0]
        assert (generator.num_open, generator.idle.is_set()) == (1, False)
        hand.end(1)
        assert hand.released == [1]
        assert (generator.num_open, generator.idle.is_set()) == (0, True)
        assert await read(generation) == ("one ", [])
        assert [generation.finished[choice].reason for choice in (0, 1)] == [
            "stop_sequence",
            "length",
        ]
    assert hand.cancelled == ids[:1] and hand.released == [1]


async def test_an_error_of_the_engine_ends_the_lease(hand: Hand, generator: Generator) -> None:
    """The first error is told, after all text; the other sequence is cancelled when the reader leaves."""
    errors = [GenerationError("first"), GenerationError("second")]
    async with opened(generator, ["x", "y"], Parameters(adapter=ADAPTER)) as generation:
        hand.say(0, "Hello")
        hand.say(1, error=errors[0].to_wire())
        assert not hand.cancelled and generator.num_open == 1
        hand.say(0, error=errors[1].to_wire())
        text, found = await read(generation)
        assert (text, str(found[0])) == ("Hello", "first")
    assert not hand.cancelled and hand.released == [1] and generator.idle.is_set()


async def test_leaving_waits_for_the_last_word(hand: Hand, generator: Generator) -> None:
    leaving = asyncio.Event()

    async def client() -> None:
        async with generator.open(["x", "y"], Parameters(adapter=ADAPTER)):
            leaving.set()

    task = asyncio.create_task(client())
    await leaving.wait()
    await asyncio.sleep(0.01)
    assert sorted(hand.cancelled) == sorted(hand.readers) and not task.done()
    hand.end(1, "cancelled")
    await asyncio.sleep(0.01)
    assert not task.done() and hand.released == [0]
    hand.end(0, "cancelled")
    await asyncio.wait_for(task, 5)
    assert hand.released == [1]


@pytest.mark.parametrize("dies", [False, True])
async def test_a_reader_that_is_cancelled_while_it_leaves(
    hand: Hand, generator: Generator, dies: bool
) -> None:
    """Nobody waits any more, and the adapter still goes back with the engine's last word."""

    async def client() -> None:
        async with generator.open(["x"], Parameters(adapter=ADAPTER)):
            pass

    task = asyncio.create_task(client())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    assert hand.cancelled == list(hand.readers) and hand.released == [0]
    assert generator.num_open == 1
    if dies:
        hand.die()
    else:
        hand.end(0, "cancelled")
    assert hand.released == [1] and generator.num_open == 0


async def test_the_engine_dies_while_it_lets_go_of_a_stopped_one(
    hand: Hand, generator: Generator
) -> None:
    """It had its answer."""
    async with opened(generator, ["x"], Parameters(adapter=ADAPTER, stop=["two"])) as generation:
        hand.say(0, "one two")
        hand.die()
        assert await read(generation) == ("one ", [])
    assert hand.released == [1] and generator.idle.is_set()


async def test_the_first_is_cancelled_when_the_second_is_refused(
    hand: Hand, generator: Generator
) -> None:
    hand.refuse_from = 1

    async def client() -> None:
        async with generator.open(["x", "y"], Parameters(adapter=ADAPTER)):
            raise AssertionError("is not opened")

    task = asyncio.create_task(client())
    await asyncio.sleep(0.01)
    assert hand.cancelled == list(hand.readers) and len(hand.readers) == 1
    hand.end(0, "cancelled")
    with pytest.raises(EngineDead, match="no more"):
        await asyncio.wait_for(task, 5)
    assert hand.released == [1] and generator.num_open == 0


async def test_when_it_was_admitted(hand: Hand, generator: Generator) -> None:
    """By the first sequence that was."""
    async with opened(generator, ["x", "y"], Parameters()) as generation:
        hand.say(1, "a", admitted=7.0)
        hand.say(0, "a", admitted=9.0)
        assert generation.timings.admitted == 7.0
        hand.end(0)
        hand.end(1)
