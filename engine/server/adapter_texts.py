"""The texts of adapters that bring their own: made when they are needed, the most recently used ones are kept."""

from __future__ import annotations

import asyncio
from functools import partial

from engine.adapters.versions import Lru, share
from engine.messages import AdapterText
from engine.server.templates import Templates
from engine.server.text import Text

MAX_KEPT = 32


class AdapterTexts:
    """Belongs to one event loop. Requests for the same text share its making."""

    def __init__(self, base: Text) -> None:
        self._base = base
        self._templates = Templates()
        self._making: Lru[bytes, asyncio.Task[Text]] = Lru(MAX_KEPT)

    async def of(self, own: AdapterText) -> Text:
        """The base's text with the tokens and the template of an adapter. Raises AdapterIncompatible."""
        task = self._making.get(own.digest)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            make = partial(self._base.adapted, own, self._templates)
            task = asyncio.create_task(self._base.in_thread(make))
            self._making.put(own.digest, task)
        return await share(task)

    def close(self) -> None:
        self._templates.close()
