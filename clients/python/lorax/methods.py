"""Makes a function that builds a call into a method of a client, so that each call is written once for both."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from functools import update_wrapper
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from lorax.calls import Call
from lorax.types import StreamResponse

P = ParamSpec("P")
T = TypeVar("T")


class Asks(Protocol):
    def _ask(self, call: Call[T]) -> T: ...


class AsyncAsks(Protocol):
    async def _ask(self, call: Call[T]) -> T: ...


class Streams(Protocol):
    def _stream(self, call: Call[None]) -> Generator[StreamResponse, None, None]: ...


class AsyncStreams(Protocol):
    def _stream(self, call: Call[None]) -> AsyncGenerator[StreamResponse, None]: ...


def asks(make: Callable[P, Call[T]]) -> Callable[Concatenate[Asks, P], T]:
    """The method that waits for the answer."""

    def method(self: Asks, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._ask(make(*args, **kwargs))

    _describe(method, make)
    return method


def async_asks(
    make: Callable[P, Call[T]],
) -> Callable[Concatenate[AsyncAsks, P], Coroutine[Any, Any, T]]:
    """As `asks`, for asyncio."""

    async def method(self: AsyncAsks, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._ask(make(*args, **kwargs))

    _describe(method, make)
    return method


def streams(
    make: Callable[P, Call[None]],
) -> Callable[Concatenate[Streams, P], Generator[StreamResponse, None, None]]:
    """The method that answers piece by piece. It checks its arguments at once, and sends when the first is read."""

    def method(
        self: Streams, /, *args: P.args, **kwargs: P.kwargs
    ) -> Generator[StreamResponse, None, None]:
        return self._stream(make(*args, **kwargs))

    _describe(method, make)
    return method


def async_streams(
    make: Callable[P, Call[None]],
) -> Callable[Concatenate[AsyncStreams, P], AsyncGenerator[StreamResponse, None]]:
    """As `streams`, for asyncio."""

    def method(
        self: AsyncStreams, /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncGenerator[StreamResponse, None]:
        return self._stream(make(*args, **kwargs))

    _describe(method, make)
    return method


def _describe(method: Callable[..., Any], make: Callable[..., Any]) -> None:
    """Gives `method` the name, the text and the parameters of `make`, for `help` and for editors."""
    update_wrapper(method, make)
    own = inspect.signature(make)
    parameters = [
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY),
        *own.parameters.values(),
    ]
    empty = inspect.Signature.empty
    method.__signature__ = own.replace(parameters=parameters, return_annotation=empty)  # type: ignore[attr-defined]
