"""Reports of answered requests to the operator's own server (--request-logger-url), as LoRAX sends them.

One POST for each request, with texts: `{tokens, adapter_id, input, output, api_token, model_id}`, and `tenant`. Unlike
LoRAX's, `api_token` is always null: no token of a client leaves this server but to the source of the adapter.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
from aiohttp import ClientError, ClientSession, ClientTimeout

from engine.server.connections import ThrottledWarning
from engine.server.generation import Generation

log = logging.getLogger(__name__)

MAX_WAITING = 32  # reports; further ones are dropped
ATTEMPTS = 3
PAUSE_S = 0.2  # before the second attempt
TIMEOUT_S = 10.0


class RequestReports:
    """Belongs to one event loop."""

    def __init__(self, url: str, model_id: str) -> None:
        self._url, self._model_id = url, model_id
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue(MAX_WAITING)
        self._dropped = ThrottledWarning()

    def add(self, generation: Generation, tenant: str) -> None:
        """Queues the report of an answered request."""
        try:
            self._waiting.put_nowait(msgspec.json.encode(self._report(generation, tenant)))
        except asyncio.QueueFull:
            self._dropped.warn(f"{MAX_WAITING} reports of requests wait: dropped one")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sends reports in the block. Those that wait at its end have TIMEOUT_S in all."""
        task = asyncio.create_task(self._send_all())
        try:
            yield
        finally:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._waiting.join(), TIMEOUT_S)
            task.cancel()
            await asyncio.wait({task})

    def _report(self, generation: Generation, tenant: str) -> dict[str, Any]:
        adapter, text = generation.parameters.adapter, generation.text
        prompts = [text.written(tokens) for tokens in generation.prompts]
        outputs = [finish.text for _, finish in sorted(generation.finished.items())]
        return {
            "tokens": generation.generated_tokens,
            "adapter_id": adapter.name if adapter is not None else "",
            "input": prompts[0] if len(prompts) == 1 else prompts,
            "output": outputs[0] if len(outputs) == 1 else outputs,
            "api_token": None,
            "model_id": self._model_id,
            "tenant": tenant,
        }

    async def _send_all(self) -> None:
        timeout = ClientTimeout(total=TIMEOUT_S)
        async with ClientSession(timeout=timeout, trust_env=True) as session:
            while True:
                report = await self._waiting.get()
                if not await self._send(session, report):
                    self._dropped.warn("a report of a request could not be sent: dropped it")
                self._waiting.task_done()

    async def _send(self, session: ClientSession, report: bytes) -> bool:
        headers = {"Content-Type": "application/json"}
        for attempt in range(ATTEMPTS):
            await asyncio.sleep(PAUSE_S * attempt)
            try:
                async with session.post(self._url, data=report, headers=headers) as answer:
                    if answer.status < 400:
                        return True
                    log.debug("a report was answered with status %d", answer.status)
            except (ClientError, TimeoutError, OSError) as error:
                log.debug("a report could not be sent: %s", type(error).__name__)
        return False
