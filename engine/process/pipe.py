"""Frames over a socket pair: four bytes of length, then one msgpack message.

`Frames` splits a byte stream into messages; `Pipe` is an end in an asyncio loop; `Port` is an end in a loop that must
never wait for its reader. End-of-file is the only sign that a peer has ended, and the only request to end.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import struct
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 18
_MAX_READ_BYTES = 1 << 23  # of one call, so that many messages do not delay the engine's steps

logger = logging.getLogger(__name__)
_encoder = msgspec.msgpack.Encoder()


def frame(message: msgspec.Struct) -> bytearray:
    """The message, ready to be sent."""
    buffer = bytearray(_LENGTH.size)
    _encoder.encode_into(message, buffer, _LENGTH.size)
    _LENGTH.pack_into(buffer, 0, len(buffer) - _LENGTH.size)
    return buffer


def read_message(end: socket.socket, kind: type[T]) -> T | None:
    """Waits for one message and reads nothing beyond it; None if the peer ended."""
    length = end.recv(_LENGTH.size, socket.MSG_WAITALL)
    if len(length) < _LENGTH.size:
        return None
    encoded = end.recv(_LENGTH.unpack(length)[0], socket.MSG_WAITALL)
    return msgspec.msgpack.decode(encoded, type=kind)


class Frames(Generic[T]):
    """Bytes in, messages out."""

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """The messages that `data` completes. Raises msgspec.DecodeError for invalid data."""
        self._buffer += data
        messages = []
        start, end = 0, len(self._buffer)
        with memoryview(self._buffer) as view:
            while end - start >= _LENGTH.size:
                body = start + _LENGTH.size
                following = body + _LENGTH.unpack_from(view, start)[0]
                if following > end:
                    break
                with view[body:following] as encoded:
                    messages.append(self._decoder.decode(encoded))
                start = following
        del self._buffer[:start]
        return messages


class Pipe(asyncio.Protocol, Generic[T]):
    """An end in an asyncio loop. `on_end` is called once, when the peer ended or after `close`."""

    def __init__(
        self, kind: Any, on_message: Callable[[T], None], on_end: Callable[[], None]
    ) -> None:
        self._frames: Frames[T] = Frames(kind)
        self._on_message = on_message
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._finished = False

    async def connect(self, end: socket.socket) -> None:
        """Takes ownership of `end`, also if it fails."""
        try:
            await asyncio.get_running_loop().create_connection(lambda: self, sock=end)
        except BaseException:
            end.close()
            raise

    def send(self, message: msgspec.Struct) -> None:
        """Does not wait. Drops the message if the peer has ended or after `finish`."""
        if (transport := self._writable) is not None:
            transport.write(frame(message))

    def finish(self) -> None:
        """Asks the peer to end. Its last messages still arrive."""
        if (transport := self._writable) is not None:
            transport.write_eof()
        self._finished = True

    @property
    def _writable(self) -> asyncio.Transport | None:
        transport = self._transport
        return None if self._finished or transport is None or transport.is_closing() else transport

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._frames.feed(data)
        except msgspec.DecodeError:
            logger.exception("a peer sent an invalid message")
            self.close()
            return
        for message in messages:
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_end()


class Port(Generic[T]):
    """An end in a synchronous loop. Bytes that the peer does not read at once are sent later."""

    def __init__(self, end: socket.socket, kind: Any) -> None:
        self.ended = False  # the peer closed its end
        self._frames: Frames[T] = Frames(kind)
        self._socket = end
        self._socket.setblocking(False)
        self._unsent = bytearray()
        self._poll = select.poll()

    def receive(self, timeout: float | None) -> list[T]:
        """The messages that have arrived; waits `timeout` seconds (None: no limit) for the first bytes."""
        self._flush()
        if timeout != 0:
            events = select.POLLIN | (select.POLLOUT if self._unsent else 0)
            self._poll.register(self._socket, events)
            if not self._poll.poll(None if timeout is None else timeout * 1000):
                return []
            self._flush()
        messages: list[T] = []
        received = 0
        while not self.ended and received < _MAX_READ_BYTES:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            received += len(data)
            self.ended = not data
            messages += self._frames.feed(data)
        return messages

    def send(self, message: msgspec.Struct) -> None:
        """Does not wait."""
        self._unsent += frame(message)
        self._flush()

    def close(self, timeout: float) -> None:
        """Sends the remaining bytes, for at most `timeout` seconds."""
        self._socket.settimeout(timeout)
        try:
            self._socket.sendall(self._unsent)
        except OSError:
            logger.debug("the front ended before the last message")
        self._socket.close()

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except ConnectionError:  # `receive` sees the end
                sent = len(self._unsent)
            del self._unsent[:sent]
