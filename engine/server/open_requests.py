"""The open requests for each adapter (--max-requests-per-adapter)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from engine.adapters.ref import AdapterRef
from engine.errors import Overloaded


class OpenRequests:
    """Counts them. `most`: of one adapter; None: no limit."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._numbers: Counter[AdapterRef] = Counter()

    @contextmanager
    def counted(self, adapter: AdapterRef | None) -> Iterator[None]:
        """One more request for an adapter in the block. Raises Overloaded. None: the base model, without a limit."""
        if adapter is None:
            yield
            return
        number = self._numbers[adapter]
        if self._most is not None and number >= self._most:
            raise Overloaded(
                f"{number} requests for {adapter.name} are open, which is the limit",
                field="adapter_id",
                hint="try again, or start the server with a larger --max-requests-per-adapter",
            )
        self._numbers[adapter] = number + 1
        try:
            yield
        finally:
            self._numbers[adapter] -= 1
            if not self._numbers[adapter]:
                del self._numbers[adapter]
