"""Frames and the two kinds of ends."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from engine.messages import Update
from engine.process.pipe import Frames, Pipe, Port, frame, read_message
from engine.process.pipe_messages import Cancel, FromShard, Submit, ToShard, Updates
from tests.process.fakes import request

MESSAGES = [Submit(request("a", list(range(n)))) for n in (1, 70_000, 0, 3)] + [Cancel("b")]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("seed", range(20))
def test_frames_however_they_are_cut(seed: int) -> None:
    chance = random.Random(seed)
    data = b"".join(bytes(frame(message)) for message in MESSAGES)
    frames: Frames[Submit | Cancel] = Frames(ToShard)
    got = []
    while data:
        size = chance.choice((1, 2, 3, 5, 1000, 100_000))
        got += frames.feed(data[:size])
        data = data[size:]
    assert got == MESSAGES


def test_first_message_is_read_alone(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    ours.sendall(frame(Cancel("a")) + frame(Cancel("b")))
    ours.shutdown(socket.SHUT_WR)
    assert [read_message(theirs, Cancel) for _ in range(3)] == [Cancel("a"), Cancel("b"), None]


def test_port_waits_for_nobody(ends: tuple[socket.socket, socket.socket]) -> None:
    """What an unwilling reader does not take is kept and arrives in order."""
    ours, theirs = ends
    port: Port[Submit | Cancel] = Port(ours, ToShard)
    sent = [Updates([Update(f"{n} {'x' * 100_000}", [])]) for n in range(100)]
    started = time.monotonic()
    for message in sent:
        port.send(message)
        assert port.receive(0) == []
    assert time.monotonic() - started < 1
    got: list[Updates] = []

    def read() -> None:
        frames: Frames[Updates] = Frames(FromShard)
        while len(got) < len(sent):
            got.extend(frames.feed(theirs.recv(1 << 16)))
        theirs.close()

    reader = threading.Thread(target=read)
    reader.start()
    while not port.ended:
        port.receive(1)  # wakes to write, too
    reader.join()
    assert got == sent


def test_port_waits_as_long_as_it_is_told(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    port: Port[Submit | Cancel] = Port(ours, ToShard)
    started = time.monotonic()
    assert port.receive(0.05) == []
    assert time.monotonic() - started > 0.04
    theirs.sendall(frame(Cancel("a")) + frame(Cancel("b")))
    assert port.receive(None) == [Cancel("a"), Cancel("b")]
    theirs.close()
    assert port.receive(None) == [] and port.ended
    port.send(Updates([]))  # to nobody
    port.close(0.1)


async def test_pipe_ends_with_a_peer_that_talks_nonsense(
    ends: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL")
    ours, theirs = ends
    ended = asyncio.Event()
    pipe: Pipe[msgspec.Struct] = Pipe(FromShard, lambda message: None, ended.set)
    await pipe.connect(ours)
    theirs.sendall(frame(Updates([])) + b"\x03\x00\x00\x00abc")
    await asyncio.wait_for(ended.wait(), 5)
    pipe.send(Cancel("to nobody"))
    pipe.finish()
