"""Every error of the client, and the one that an answer of the server means.

    LoraxError
    ├── ValidationError                 a parameter that cannot be served
    ├── BadRequestError
    ├── NotFoundError
    ├── UnprocessableEntityError
    ├── NotSupportedError
    ├── UnauthorizedError               no API key of the server, or an unknown one
    ├── ForbiddenError                  an API key without the right
    ├── OverloadedError                 `retry_after` says when to try again
    ├── RateLimitExceededError
    ├── GenerationError
    │   ├── AdapterError
    │   │   ├── AdapterNotFoundError        also a NotFoundError
    │   │   ├── AdapterForbiddenError       also a ShardNotReadyError
    │   │   ├── AdapterIncompatibleError    also an UnprocessableEntityError
    │   │   ├── AdapterTooLargeError
    │   │   └── AdapterLoadFailedError      also a ShardNotReadyError
    │   └── OutOfMemoryError
    ├── IncompleteGenerationError       a stream that ended too early
    ├── EngineDeadError                 the server has lost its engine
    ├── ShardNotReadyError
    ├── ShardTimeoutError
    ├── ServerUnreachableError          also a ConnectionError
    ├── ServerTimeoutError              also a TimeoutError
    └── UnknownError

LoRAX reports every failure of an adapter as a GenerationError, and clients of 0.7 raise some as the classes named
"also" above. Code that catches either catches the adapter errors here, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MAX_MESSAGE = 2000  # characters of a server's message that are kept


class LoraxError(Exception):
    """Base of all. The attributes describe the server's answer, if there was one."""

    status: int | None = None
    error_type: str = ""
    field: str | None = None  # the parameter that is wrong
    retry_after: float | None = None  # seconds
    request_id: str | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)


class ValidationError(LoraxError):
    pass


class BadRequestError(LoraxError):
    pass


class NotFoundError(LoraxError):
    pass


class UnprocessableEntityError(LoraxError):
    pass


class NotSupportedError(LoraxError):
    def __init__(self, model_id: str) -> None:
        super().__init__(f"model {model_id!r} cannot be used with this client")


class UnauthorizedError(LoraxError):
    pass


class ForbiddenError(LoraxError):
    pass


class OverloadedError(LoraxError):
    pass


class RateLimitExceededError(LoraxError):
    pass


class ShardNotReadyError(LoraxError):
    pass


class ShardTimeoutError(LoraxError):
    pass


class GenerationError(LoraxError):
    pass


class AdapterError(GenerationError):
    pass


class AdapterNotFoundError(AdapterError, NotFoundError):
    pass


class AdapterForbiddenError(AdapterError, ShardNotReadyError):
    pass


class AdapterIncompatibleError(AdapterError, UnprocessableEntityError):
    pass


class AdapterTooLargeError(AdapterError):
    pass


class AdapterLoadFailedError(AdapterError, ShardNotReadyError):
    pass


class OutOfMemoryError(GenerationError):
    pass


class IncompleteGenerationError(LoraxError):
    pass


class EngineDeadError(LoraxError):
    pass


class ServerUnreachableError(LoraxError, ConnectionError):
    pass


class ServerTimeoutError(LoraxError, TimeoutError):
    pass


class UnknownError(LoraxError):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(f"status {code}: {message}")


_BY_TYPE: Mapping[str, type[LoraxError]] = {
    "validation": ValidationError,
    "malformed_request": BadRequestError,
    "unauthorized": UnauthorizedError,
    "forbidden": ForbiddenError,
    "overloaded": OverloadedError,
    "generation": GenerationError,
    "adapter": AdapterError,
    "adapter_not_found": AdapterNotFoundError,
    "adapter_forbidden": AdapterForbiddenError,
    "adapter_incompatible": AdapterIncompatibleError,
    "adapter_too_large": AdapterTooLargeError,
    "adapter_load_failed": AdapterLoadFailedError,
    "out_of_memory": OutOfMemoryError,
    "incomplete_generation": IncompleteGenerationError,
    "engine_dead": EngineDeadError,
    "healthcheck": EngineDeadError,
}
_BY_STATUS: Mapping[int, type[LoraxError]] = {
    400: BadRequestError,
    401: UnauthorizedError,
    403: ShardNotReadyError,
    404: NotFoundError,
    422: UnprocessableEntityError,
    424: ShardNotReadyError,
    429: RateLimitExceededError,
    504: ShardTimeoutError,
}


def parse_error(
    status_code: int, payload: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> LoraxError:
    """The error of an answer with the JSON `payload`. `headers`: of the answer, by their lower-case names."""
    headers = headers or {}
    message = str(payload.get("error") or "the server sent no message")[:MAX_MESSAGE]
    if trace := headers.get("x-b3-traceid"):
        message += f": Trace ID: {trace}"
    error_type = str(payload.get("error_type") or "")
    kind = _BY_TYPE.get(error_type) or _BY_STATUS.get(status_code)
    error = UnknownError(message, status_code) if kind is None else kind(message)
    error.status, error.error_type = status_code, error_type
    if (field := payload.get("field")) is not None:
        error.field = str(field)
    error.retry_after = _seconds(headers.get("retry-after", ""))
    error.request_id = headers.get("x-request-id")
    return error


def _seconds(text: str) -> float | None:
    """A number of seconds; None for a date, which Retry-After may be, too."""
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
