"""Who hears what of open requests."""

from __future__ import annotations

import logging

import msgspec
import pytest

from engine.errors import EngineDead, GenerationError, InvalidRequest, LoraxError
from engine.messages import TokenOutput, Update
from engine.process.pipe_messages import Cancel, Submit
from engine.process.streams import Streams
from tests.process.fakes import request


class Ear:
    """A reader that keeps what it hears; a broken one raises then."""

    def __init__(self, *, broken: bool = False) -> None:
        self.heard: list[Update | LoraxError] = []
        self.broken = broken

    def take(self, update: Update) -> None:
        self.heard.append(update)
        if self.broken:
            raise RuntimeError("a broken ear")

    def on_engine_lost(self, error: LoraxError) -> None:
        self.heard.append(error)
        if self.broken:
            raise RuntimeError("a broken ear")


@pytest.fixture
def sent() -> list[Submit | Cancel]:
    return []


@pytest.fixture
def streams(sent: list[Submit | Cancel]) -> Streams:
    return Streams(sent.append)


def update(id: str, **last: object) -> Update:
    return Update(id, [TokenOutput(5)], **last)  # type: ignore[arg-type]


ENDS = [
    update("a", finish="length"),
    update("a", finish="cancelled"),
    update("a", error=GenerationError("broken").to_wire()),
]


@pytest.mark.parametrize("end", ENDS)
def test_nothing_comes_after_the_last_update(
    streams: Streams, sent: list[Submit | Cancel], end: Update
) -> None:
    """The id is free again, nobody is cancelled, and a death of the engine is for those that are still open."""
    first, second = Ear(), Ear()
    streams.submit(request("a", [1]), first)
    streams.deliver([update("a"), end])
    assert first.heard == [update("a"), end] and not len(streams)
    streams.cancel("a")
    streams.deliver([update("a")])
    streams.submit(request("a", [1]), second)
    streams.fail(EngineDead("gone"))
    assert first.heard == [update("a"), end]
    assert [type(news) for news in second.heard] == [EngineDead]
    assert [type(message) for message in sent] == [Submit, Submit]


def test_each_hears_its_own(streams: Streams) -> None:
    ears = {name: Ear() for name in "abc"}
    for name, ear in ears.items():
        streams.submit(request(name, [1]), ear)
    news = [update(name) for name in ("c", "a", "c", "stranger", "b", "a")]
    streams.deliver(news)
    for name, ear in ears.items():
        assert ear.heard == [one for one in news if one.id == name]


def test_an_open_id_is_refused(streams: Streams, sent: list[Submit | Cancel]) -> None:
    first, second = Ear(), Ear()
    streams.submit(request("a", [1]), first)
    with pytest.raises(InvalidRequest):
        streams.submit(request("a", [1]), second)
    streams.deliver([update("a")])
    assert len(first.heard) == 1 and not second.heard and len(sent) == 1


def test_every_reader_gets_an_error_of_its_own(streams: Streams) -> None:
    """A raised exception keeps a traceback; and who comes later is told at once."""
    ears = [Ear() for _ in range(3)]
    for number, ear in enumerate(ears):
        streams.submit(request(str(number), [1]), ear)
    streams.fail(EngineDead("gone", hint="look"))
    streams.fail(EngineDead("again"))
    errors = [ear.heard for ear in ears]
    assert all(len(heard) == 1 for heard in errors) and not len(streams)
    assert len({id(heard[0]) for heard in errors}) == 3
    assert {str(heard[0]) for heard in errors} == {"gone (look)"}
    with pytest.raises(EngineDead, match="gone"):
        streams.submit(request("late", [1]), Ear())


def test_what_cannot_be_sent_is_not_open() -> None:
    def send(message: Submit | Cancel) -> None:
        msgspec.msgpack.encode(message)  # as a pipe does

    streams, ear, bad = Streams(send), Ear(), Ear()
    streams.submit(request("good", [1]), ear)
    with pytest.raises(OverflowError):
        streams.submit(request("bad", [1 << 70]), bad)
    assert len(streams) == 1
    streams.fail(EngineDead("gone"))
    assert len(ear.heard) == 1 and not bad.heard


def test_a_reader_that_fails_is_no_matter_of_the_others(
    streams: Streams, caplog: pytest.LogCaptureFixture
) -> None:
    broken, good = Ear(broken=True), Ear()
    streams.submit(request("a", [1]), broken)
    streams.submit(request("b", [1]), good)
    with caplog.at_level(logging.ERROR):
        streams.deliver([update("a"), update("b")])
        streams.fail(EngineDead("gone"))
    assert len(broken.heard) == len(good.heard) == 2
    assert caplog.text.count("RuntimeError: a broken ear") == 2
