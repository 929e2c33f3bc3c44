"""Server-sent events: one write for everything that has arrived, a comment when nothing does."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from engine.errors import LoraxError
from engine.server.front import FRONT, STREAM_ERROR, observe
from engine.server.generation import Generation
from engine.server.sequence import Event

KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


async def respond(
    request: web.Request,
    generation: Generation,
    headers: dict[str, str],
    encode: Callable[[list[Event]], bytes],
    end: Callable[[], bytes],
    fail: Callable[[LoraxError], bytes],
) -> web.StreamResponse:
    """Streams a generation.

    The status is sent with the first events, or with the first keep-alive comment: what fails before then raises, and
    gets a status of its own; what fails later is an event. `end` and `fail` make the last bytes.
    """
    front = request.app[FRONT]
    events = await generation.next(front.keep_alive_s)
    response = web.StreamResponse(headers=HEADERS | headers)
    await response.prepare(request)
    try:
        while events is not None:
            if data := encode(events) if events else KEEP_ALIVE:
                await response.write(data)
            events = await generation.next(front.keep_alive_s)
        last = end()
        observe(front, generation)
    except LoraxError as error:
        request[STREAM_ERROR] = error
        last = fail(error)
    if last:
        await response.write(last)
    await response.write_eof()
    return response
