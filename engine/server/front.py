"""What every route shares: the parts of the front, the client's token, bodies, admission."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from aiohttp import web
from msgspec import Struct

from engine.adapters.ref import AdapterRef
from engine.backend import Backend
from engine.config import EngineConfig
from engine.errors import InvalidRequest, LoraxError, Overloaded
from engine.metrics import Metrics
from engine.server.bodies import Bodies
from engine.server.generation import Generation, Generator
from engine.server.parameters import resolve_adapter
from engine.server.schemas import decode, ignored
from engine.server.text import Text

log = logging.getLogger(__name__)

Body = TypeVar("Body", bound=Struct)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BodyHandler = Callable[[web.Request, Body], Awaitable[web.StreamResponse]]

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
    bodies: Bodies
    keep_alive_s: float
    generator: Generator = field(init=False)
    started: float = field(default_factory=time.time)
    num_open: int = 0  # requests that count towards max_concurrent_requests
    end_by: float | None = None  # by time.monotonic(), once the server was told to end

    def __post_init__(self) -> None:
        self.generator = Generator(self.backend, self.text, self.config, self.metrics)

    def adapter(self, name: str | None, source: str | None) -> AdapterRef | None:
        return resolve_adapter(name, source, self.backend.info.model_id, self.config)


FRONT = web.AppKey("front", Front)


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


def with_body(shape: type[Body]) -> Callable[[BodyHandler[Body]], Handler]:
    """A route with a JSON body of `shape`, which is read completely before anything else happens."""

    def decorate(handler: BodyHandler[Body]) -> Handler:
        @functools.wraps(handler)
        async def read(request: web.Request) -> web.StreamResponse:
            return await handler(request, await _read(request, shape, lambda: None))

        return read

    return decorate


async def _read(request: web.Request, shape: type[Body], admit: Callable[[], None]) -> Body:
    """The body of `request`; `admit` is called once it has arrived, before it is parsed."""
    async with request.app[FRONT].bodies.read(request) as raw:
        admit()
        body = decode(raw, shape)
        if log.isEnabledFor(logging.DEBUG) and (unknown := ignored(raw, shape)):
            log.debug("ignored parameters that are not known: %s", ", ".join(unknown))
        return body


def inference(shape: type[Body]) -> Callable[[BodyHandler[Body]], Handler]:
    """A route that occupies the engine: once its body is there it is admitted or refused; counted, timed."""

    def decorate(handler: BodyHandler[Body]) -> Handler:
        @functools.wraps(handler)
        async def admitted(request: web.Request) -> web.StreamResponse:
            place = _Place(request.app[FRONT])
            request.app[FRONT].metrics.request()
            try:
                body = await _read(request, shape, place.take)
                response = await handler(request, body)
                error = request.get(STREAM_ERROR)
                place.failed = None if error is None else error.error_type
                return response
            except LoraxError as error:
                place.failed = error.error_type
                raise
            except web.HTTPException as error:
                place.failed = "bad_request" if error.status < 500 else "internal"
                raise
            except ConnectionResetError:
                raise
            except Exception:
                place.failed = "internal"
                raise
            finally:
                place.leave()

        return admitted

    return decorate


@dataclass(slots=True)
class _Place:
    """One of the max_concurrent_requests, from the end of the body to the end of the answer."""

    front: Front
    failed: str | None = "dropped"
    taken: bool = False
    start: float = field(default_factory=time.monotonic)

    def take(self) -> None:
        most = self.front.config.server.max_concurrent_requests
        if self.front.num_open >= most:
            raise Overloaded(
                f"{most} requests are open already",
                hint="try again, or start the server with a larger --max-concurrent-requests",
            )
        self.front.num_open += 1
        self.taken = True
        self.start = time.monotonic()

    def leave(self) -> None:
        self.front.num_open -= self.taken
        if self.failed is None:
            self.front.metrics.success(time.monotonic() - self.start)
        else:
            self.front.metrics.failure(self.failed)


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
