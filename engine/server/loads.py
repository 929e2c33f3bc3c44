"""The loads that clients ask for outside of generations, and their limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import Overloaded

MAX_OPEN = 16


class Loads:
    """The open loads of one server."""

    def __init__(self) -> None:
        self.num_open = 0

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """One load. Raises Overloaded."""
        if self.num_open >= MAX_OPEN:
            raise Overloaded(
                f"{MAX_OPEN} adapters are being loaded, pinned or set as aliases, which is the limit",
                hint="try again",
            )
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1
