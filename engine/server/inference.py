"""Serves any response format: reads the body, admits, parses, generates, streams or answers at once, and counts."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from aiohttp import web

from engine.errors import LoraxError
from engine.server.access import TENANT, context_of
from engine.server.decoding import ignored_fields
from engine.server.formats import Format, Formatter, GenerationRequest
from engine.server.front import FRONT, Front
from engine.server.generation import Generation
from engine.server.keys import Tenant
from engine.server.request_log import log_request
from engine.server.responses import json_response
from engine.server.times import times_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

GATEWAY_TENANT = "x-predibase-tenant"  # a header of LoRAX
IGNORED_FIELDS = "x-lorax-ignored-fields"
KEEP_ALIVE = b": keep-alive\n\n"
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


def handler_of(format: Format) -> Handler:
    """The route of a format. A request is admitted or refused once its body has arrived; it is counted and timed."""

    async def handle(request: web.Request) -> web.StreamResponse:
        front = request.app[FRONT]
        named = "" if front.keys.required else request.headers.get(GATEWAY_TENANT, "")
        admission = _Admission(front, request.get(TENANT), request.path, named)
        front.metrics.request()
        try:
            asked = await _parse(request, format, admission)
            response, error = await _respond(request, asked, admission)
            admission.failed = None if error is None else error.error_type
            return response
        except LoraxError as error:
            admission.failed = error.error_type
            raise
        except web.HTTPException as error:
            admission.failed = "bad_request" if error.status < 500 else "internal"
            raise
        except ConnectionResetError:
            raise
        except Exception:
            admission.failed = "internal"
            raise
        finally:
            admission.end()

    return handle


@dataclass(slots=True)
class _Admission:
    """One of max_concurrent_requests, from the end of the body to the end of the answer."""

    front: Front
    tenant: Tenant | None
    route: str
    named: str  # the tenant that a gateway names; only logged
    generation: Generation | None = None  # once it is open
    failed: str | None = "dropped"  # type of the error; None: answered in full
    admitted: bool = False
    start: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """Raises Overloaded."""
        self.front.places.take(self.tenant)
        self.admitted = True
        self.start = time.monotonic()

    def end(self) -> None:
        if self.admitted:
            self.front.places.leave(self.tenant)
        seconds = time.monotonic() - self.start
        tenant = self.tenant.name if self.tenant else self.named
        log_request(self.route, tenant, self.generation, self.failed, seconds)
        if self.failed is None:
            self.front.metrics.success(seconds)
            if self.front.reports is not None and self.generation is not None:
                self.front.reports.add(self.generation, tenant)
        else:
            self.front.metrics.failure(self.failed)


async def _parse(request: web.Request, format: Format, admission: _Admission) -> GenerationRequest:
    """Reads the body. It is freed on return, before the generation."""
    front = request.app[FRONT]
    context = context_of(request)
    async with front.bodies.read(request) as body:
        admission.begin()
        asked = format.parse(body, context)
        if format.body is not None and (names := ignored_fields(body, format.body)):
            asked = replace(asked, headers={**asked.headers, IGNORED_FIELDS: ", ".join(names)})
        return asked


async def _respond(
    request: web.Request, asked: GenerationRequest, admission: _Admission
) -> tuple[web.StreamResponse, LoraxError | None]:
    """Generates and answers. The error is of a stream that failed after its status was sent."""
    front = request.app[FRONT]
    prompts, parameters, tenant = asked.prompts, asked.parameters, request.get(TENANT)
    async with front.generator.open(prompts, parameters, asked.id, tenant) as generation:
        admission.generation = generation
        formatter = asked.formatter(generation, generation.text)
        headers = {**_headers(front, generation), **asked.headers}
        if asked.stream:
            return await _stream(request, generation, formatter, headers)
        answer = formatter.answer(await generation.collect())
        _observe(front, generation)
        headers |= times_of(generation)
    return json_response(answer.body, headers={**headers, **answer.headers}), None


async def _stream(
    request: web.Request, generation: Generation, formatter: Formatter, headers: dict[str, str]
) -> tuple[web.StreamResponse, LoraxError | None]:
    """Server-sent events: one write for all that has arrived, and a comment after a silence.

    The status is sent with the first events or the first comment. An error before that is raised and has a status of
    its own; an error after it becomes the formatter's last bytes.
    """
    front, failed = request.app[FRONT], None
    events = await generation.next(front.keep_alive_s)
    response = web.StreamResponse(headers=STREAM_HEADERS | headers)
    await response.prepare(request)
    try:
        while events is not None:
            if data := formatter.events(events) if events else KEEP_ALIVE:
                await response.write(data)
            events = await generation.next(front.keep_alive_s)
        last = formatter.end()
        _observe(front, generation)
    except LoraxError as error:
        failed, last = error, formatter.failure(error)
    if last:
        await response.write(last)
    await response.write_eof()
    return response, failed


def _headers(front: Front, generation: Generation) -> dict[str, str]:
    """The machine, the model and the adapter that answer."""
    info = front.backend.info
    headers = {
        "x-compute-type": "cpu" if info.device == "cpu" else "gpu+optimized",
        "x-model-id": _ascii(info.model_id),
        "x-request-id": generation.id,
    }
    adapter = generation.parameters.adapter
    if adapter is not None:
        headers["x-adapter-id"] = _ascii(adapter.name)
        merged = info.merged_adapter
        headers["x-adapter-source"] = merged.source if merged else generation.adapter_source
    return headers


def _ascii(value: str) -> str:
    """`value` with escapes for characters that a header cannot have."""
    return value.encode("ascii", "backslashreplace").decode()


def _observe(front: Front, generation: Generation) -> None:
    """Records an answered generation: times of its phases, and lengths."""
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
    metrics.length("skipped_tokens", 0)
    metrics.length("input_count", len(generation.prompts))
    if generation.parameters.max_new_tokens is not None:
        metrics.length("max_new_tokens", generation.parameters.max_new_tokens)
