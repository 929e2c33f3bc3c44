"""The open requests of a backend, and the reader of each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

from engine.backend import Reader
from engine.errors import EngineDead, InvalidRequest
from engine.messages import Request, Update
from engine.process.pipe_messages import Cancel, Submit

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Streams:
    """Every open request by its id. `send` sends messages to the engine and does not wait."""

    def __init__(self, send: Callable[[Submit | Cancel], None]) -> None:
        self._send = send
        self._open: dict[str, Reader] = {}
        self._dead: EngineDead | None = None

    def __len__(self) -> int:
        return len(self._open)

    def submit(self, request: Request, reader: Reader) -> None:
        """See `Backend.submit`."""
        if self._dead is not None:
            raise _copy_of(self._dead)
        if request.id in self._open:
            raise InvalidRequest(f"a request with the id {request.id} is open", field="id")
        self._send(Submit(request))
        self._open[request.id] = reader

    def cancel(self, id: str) -> None:
        """See `Backend.cancel`."""
        if id in self._open:
            self._send(Cancel(id))

    def deliver(self, updates: Iterable[Update]) -> None:
        """Passes updates to their readers."""
        for update in updates:
            find = self._open.pop if update.is_last else self._open.get
            reader = find(update.id, None)
            if reader is not None:
                _call(reader.take, update)

    def fail(self, error: EngineDead) -> None:
        """Fails all requests, open and later ones."""
        self._dead = self._dead or error
        readers, self._open = self._open, {}
        for reader in readers.values():
            _call(reader.on_engine_lost, _copy_of(error))


def _call(method: Callable[[T], None], argument: T) -> None:
    """A task boundary: a reader that fails must not affect the others."""
    try:
        method(argument)
    except Exception:
        logger.exception("a request's reader failed")


def _copy_of(error: EngineDead) -> EngineDead:
    """A copy for one reader: a raised exception collects tracebacks."""
    return EngineDead(error.message, field=error.field, hint=error.hint)
