"""Requests with a grammar: they wait until it is compiled, and their rows get masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from engine.errors import GenerationError, LoraxError
from engine.grammar import Constrained, Grammars
from engine.messages import Request, Update, Usage
from engine.runner.masks import MaskBuffers
from engine.runner.sampler import Masks


class Structured:
    """Belongs to the engine's thread. It costs nothing while no open request has a grammar."""

    def __init__(self, grammars: Grammars, buffers: MaskBuffers) -> None:
        self._grammars, self._buffers = grammars, buffers
        self._waiting: dict[str, Request] = {}  # for their grammars
        self._cancelled: list[Update] = []

    @property
    def any(self) -> bool:
        """Whether an open request has a grammar."""
        return self._grammars.any

    @property
    def has_work(self) -> bool:
        """Whether `add_ready` may have something to do."""
        return bool(self._waiting or self._cancelled)

    def submit(self, request: Request) -> None:
        """The request waits for its grammar; `add_ready` passes it on."""
        self._grammars.open(request.id, request.grammar, request.eos_token_ids)
        self._waiting[request.id] = request

    def cancel(self, id: str) -> bool:
        """Ends a request that waits for its grammar. False: it does not."""
        request = self._waiting.pop(id, None)
        if request is None:
            return False
        self._grammars.close(id)
        usage = Usage(len(request.tokens), 0, 0)
        self._cancelled.append(Update(id, [], finish="cancelled", usage=usage))
        return True

    def add_ready(self, add: Callable[[Request], None]) -> list[Update]:
        """Calls `add` for requests whose grammars have been compiled.

        Returns the last updates of those that failed, and of those that were cancelled.
        """
        if not self.has_work:
            return []
        ended, self._cancelled = self._cancelled, []
        for id, request in list(self._waiting.items()):
            try:
                if not self._grammars.is_ready(id):
                    continue
                del self._waiting[id]
                add(request)
            except LoraxError as error:
                self._waiting.pop(id, None)
                self._grammars.close(id)
                ended.append(Update(id, [], error=error.to_wire()))
        return ended

    def ended(self, updates: Iterable[Update]) -> None:
        """Forgets the requests whose last updates are among these."""
        for update in updates:
            if update.is_last:
                self._grammars.close(update.id)

    def masks(
        self, rows: Sequence[Constrained], fail: Callable[[str, GenerationError], None]
    ) -> Masks:
        """The masks of these rows. Calls `fail` for requests whose grammar cannot be followed."""
        for id, error in self._grammars.fill(rows, self._buffers.take(len(rows))):
            fail(id, error)
        return self._buffers.upload([row.at for row in rows])

    def close(self) -> None:
        self._grammars.shut_down()
