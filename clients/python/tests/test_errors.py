"""The class of each error, by the names of lorax-client and by the server's types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from clients.python.tests.conftest import Ask
from engine.errors import error_classes
from lorax import errors
from lorax.errors import LoraxError, UnknownError, parse_error

# (status, error_type) -> class, as lorax-client 0.7 has them.
LORAX = [
    (424, "generation", "GenerationError"),
    (500, "incomplete_generation", "IncompleteGenerationError"),
    (429, "overloaded", "OverloadedError"),
    (422, "validation", "ValidationError"),
    (400, "", "BadRequestError"),
    (403, "", "ShardNotReadyError"),
    (424, "", "ShardNotReadyError"),
    (504, "", "ShardTimeoutError"),
    (404, "", "NotFoundError"),
    (429, "", "RateLimitExceededError"),
    (422, "", "UnprocessableEntityError"),
    (500, "", "UnknownError"),
    (502, "nonsense", "UnknownError"),
]


@pytest.mark.parametrize(("status", "error_type", "name"), LORAX)
def test_classes_of_lorax_client(status: int, error_type: str, name: str) -> None:
    error = parse_error(status, {"error": "so", "error_type": error_type})
    assert type(error) is getattr(errors, name) and isinstance(error, LoraxError)
    assert str(error) == (f"status {status}: so" if name == "UnknownError" else "so")


NOT_OF_A_REQUEST = {"LoraxError", "ModelError", "ConfigError"}


@pytest.mark.parametrize("name", sorted(error_classes()))
def test_the_servers_errors(name: str) -> None:
    """Each type has a class, which code for lorax-client catches as it did."""
    cls = error_classes()[name]
    body = {"error": "so", "error_type": cls.error_type}
    error = parse_error(cls.status, body)
    assert isinstance(error, UnknownError) == (name in NOT_OF_A_REQUEST)
    if name.startswith("Adapter"):
        assert isinstance(error, errors.AdapterError) and isinstance(error, errors.GenerationError)
        if cls.status in (403, 404, 422, 424) and name != "AdapterError":
            assert isinstance(error, type(parse_error(cls.status, {"error": "so"})))


def test_what_an_answer_says() -> None:
    body = {"error": "x" * 5000, "error_type": "overloaded", "field": "adapter_id"}
    headers = {"retry-after": "1.5", "x-request-id": "abc", "x-b3-traceid": "t1"}
    error = parse_error(429, body, headers)
    assert str(error) == "x" * 2000 + ": Trace ID: t1"
    assert (error.status, error.error_type, error.field) == (429, "overloaded", "adapter_id")
    assert (error.retry_after, error.request_id) == (1.5, "abc")


@pytest.mark.parametrize("after", ["", "nan", "-1", "inf", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_other_values_of_retry_after(after: str) -> None:
    assert parse_error(429, {}, {"retry-after": after}).retry_after is None


def test_errors_of_the_connection_are_pythons_too() -> None:
    assert issubclass(errors.ServerUnreachableError, ConnectionError)
    assert issubclass(errors.ServerTimeoutError, TimeoutError)
    assert str(errors.ServerUnreachableError("so")) == str(errors.ServerTimeoutError("so")) == "so"


CALLS: list[Callable[[Any], Any]] = [
    lambda client: client.generate("x"),
    lambda client: client.generate_stream("x"),
    lambda client: client.embed("x"),
    lambda client: client.classify("x"),
    lambda client: client.classify_batch(["x"]),
    lambda client: client.tokenize("x"),
    lambda client: client.info(),
    lambda client: client.metrics(),
    lambda client: client.adapters.list(),
    lambda client: client.adapters.prefetch("x"),
]


@pytest.mark.parametrize("call", CALLS)
async def test_every_call_raises_them(asking: Callable[..., Ask], call: Any) -> None:
    body = {"error": "try again", "error_type": "overloaded"}
    ask = asking(lambda request: httpx.Response(429, json=body, headers={"Retry-After": "1"}))
    with pytest.raises(errors.OverloadedError, match="try again") as caught:
        await ask(call)
    assert caught.value.retry_after == 1.0


@pytest.mark.parametrize("content", [b"<html>Bad Gateway</html>", b"", b"[]", b"null"])
async def test_answers_of_a_gateway(asking: Callable[..., Ask], content: bytes) -> None:
    ask = asking(lambda request: httpx.Response(502, content=content))
    with pytest.raises(UnknownError, match="status 502") as caught:
        await ask(lambda client: client.generate("x"))
    assert caught.value.status == 502


@pytest.mark.parametrize("content", [b"<html>", b"{}", b"[]", b"[1]", b'[{"text": "x"}]'])
async def test_another_server(asking: Callable[..., Ask], content: bytes) -> None:
    ask = asking(lambda request: httpx.Response(200, content=content))
    with pytest.raises(UnknownError, match="check the base URL"):
        await ask(lambda client: client.generate("x"))


async def test_a_redirect(asking: Callable[..., Ask]) -> None:
    """Tokens do not follow to another address."""
    ask = asking(lambda request: httpx.Response(308, headers={"Location": "https://lorax"}))
    with pytest.raises(UnknownError, match="moved to https://lorax"):
        await ask(lambda client: client.generate("x", api_token="t"))
