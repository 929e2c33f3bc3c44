"""What every route shares: the parts of the front, the client's token, admission, JSON answers."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from engine.adapters.ref import AdapterRef
from engine.config import EngineConfig
from engine.errors import InvalidRequest, LoraxError, Overloaded
from engine.metrics import Metrics
from engine.server.backend import Backend
from engine.server.generation import Generation, Generator
from engine.server.parameters import resolve_adapter
from engine.server.text import Text

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

NO_TOKENS = (
    "",
    "EMPTY",
    "NONE",
)  # what OpenAI clients send where a key is required and there is none
STREAM_ERROR = web.RequestKey(
    "stream_error", LoraxError
)  # of an answer whose status was sent before


@dataclass(slots=True)
class Front:
    """The parts that routes need."""

    backend: Backend
    text: Text
    config: EngineConfig
    metrics: Metrics
    keep_alive_s: float
    generator: Generator = field(init=False)
    started: float = field(default_factory=time.time)
    num_open: int = 0  # requests that count towards max_concurrent_requests

    def __post_init__(self) -> None:
        self.generator = Generator(self.backend, self.text, self.config, self.metrics)

    def adapter(self, name: str | None, source: str | None) -> AdapterRef | None:
        return resolve_adapter(name, source, self.backend.info.model_id, self.config)


FRONT = web.AppKey("front", Front)


def json_response(
    body: Any, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body),
        status=status,
        headers=headers,
        content_type="application/json",
    )


def token_of(request: web.Request, in_body: str | None) -> str | None:
    """The tenant's token: of the body, else of the header Authorization. Raises InvalidRequest if it cannot be one."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    given = in_body or (token.strip() if scheme.lower() == "bearer" else "")
    if not (given.isascii() and given.isprintable()):
        raise InvalidRequest(
            "the token has characters beyond printable ASCII",
            field="api_token" if in_body else "Authorization",
            hint="send it as it was issued, or leave it out",
        )
    return None if given.upper() in NO_TOKENS else given


def headers_of(front: Front, generation: Generation) -> dict[str, str]:
    """Which machine, model and adapter answer."""
    info = front.backend.info
    headers = {
        "x-compute-type": "cpu" if info.device == "cpu" else "gpu+optimized",
        "x-model-id": header(info.model_id),
        "x-request-id": generation.id,
    }
    adapter = generation.parameters.adapter
    if adapter is not None:
        headers["x-adapter-id"] = header(adapter.name)
        headers["x-adapter-source"] = generation.adapter_source
    return headers


def header(value: str) -> str:
    """`value` as a header can carry it."""
    return value.encode("ascii", "backslashreplace").decode()


def inference(handler: Handler) -> Handler:
    """A route that occupies the engine: admitted or refused at once, counted, timed."""

    @functools.wraps(handler)
    async def admitted(request: web.Request) -> web.StreamResponse:
        front = request.app[FRONT]
        metrics, most = front.metrics, front.config.server.max_concurrent_requests
        metrics.request()
        if front.num_open >= most:
            metrics.failure(Overloaded.error_type)
            raise Overloaded(
                f"{most} requests are open already",
                hint="try again, or start the server with a larger --max-concurrent-requests",
            )
        front.num_open += 1
        start = time.monotonic()
        failed: str | None = "dropped"
        try:
            response = await handler(request)
            error = request.get(STREAM_ERROR)
            failed = None if error is None else error.error_type
            return response
        except LoraxError as error:
            failed = error.error_type
            raise
        except web.HTTPException as error:
            failed = "bad_request" if error.status < 500 else "internal"
            raise
        except ConnectionResetError:
            raise
        except Exception:
            failed = "internal"
            raise
        finally:
            front.num_open -= 1
            if failed is None:
                metrics.success(time.monotonic() - start)
            else:
                metrics.failure(failed)

    return admitted


def observe(front: Front, generation: Generation) -> None:
    """Counts an answered generation: lengths, and where the time went."""
    timings, metrics = generation.timings, front.metrics
    admitted = timings.admitted or timings.validated
    finished = timings.finished or time.monotonic()
    metrics.phase("validation", timings.validated - timings.received)
    metrics.phase("queue", admitted - timings.validated)
    metrics.phase("inference", finished - admitted)
    count = generation.generated_tokens
    metrics.phase("mean_time_per_token", (finished - admitted) / max(1, count))
    metrics.length("input_length", generation.prompt_tokens)
    metrics.length("generated_tokens", count)
    if generation.parameters.max_new_tokens is not None:
        metrics.length("max_new_tokens", generation.parameters.max_new_tokens)
