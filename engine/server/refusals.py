"""Errors of HTTP itself: invalid requests, and those that no route takes.

Messages are logged, so they never contain names or values of headers, paths of invalid requests, or bodies.
"""

from __future__ import annotations

import re
from typing import cast

from aiohttp import HttpVersion10, HttpVersion11, hdrs, http_exceptions, web
from aiohttp.http import RawRequestMessage

from engine.errors import LoraxError, MalformedRequest
from engine.logs import printable

MAX_LINE = 8190  # bytes of a request line, and of one header
MAX_HEADERS = 128
VERSIONS = (HttpVersion10, HttpVersion11)
ENCODINGS = ("gzip", "deflate", "identity", "")

# Status -> type of the errors that come before any route.
HTTP_ERRORS = {
    403: "origin_forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    414: "url_too_long",
    415: "unsupported_encoding",
    417: "expectation_failed",
    431: "headers_too_large",
    501: "unknown_method",
    503: "shutting_down",
    505: "unsupported_version",
}

REQUEST_LINE = re.compile(rb"([!-~]+) ([!-\xff]+)(?: HTTP/(\d+)\.\d+)?\r?\n?")
TLS_HELLO = b"\x16\x03"
# The parser's messages begin with its own words; quoted bytes follow a colon and a line break.
OWN_WORDS = re.compile(r"[A-Za-z0-9 .,`'_-]{1,100}")


def _kind(status: int, error_type: str) -> type[LoraxError]:
    names = {"status": status, "error_type": error_type}
    return cast("type[LoraxError]", type(f"_Http{status}", (LoraxError,), names))


_KINDS = {status: _kind(status, error_type) for status, error_type in HTTP_ERRORS.items()}


def refused(status: int, message: str, hint: str | None = None) -> LoraxError:
    """An error of HTTP itself; `engine.errors` has no classes for these."""
    return (_KINDS.get(status) or _kind(status, "http"))(message, hint=hint)


# -- requests that are not valid HTTP


def path_of(head: bytes) -> str:
    """The path of a request whose first bytes are `head`; / if it has none."""
    line = REQUEST_LINE.match(head)
    target = line[2] if line else b"/"
    return target.partition(b"?")[0].decode("ascii", "backslashreplace")


def parser_error(problem: BaseException | None, head: bytes) -> LoraxError:
    """The error of a request that the parser refused; `head` is its beginning."""
    first, newline, _ = head.partition(b"\n")
    line = REQUEST_LINE.fullmatch(first.rstrip(b"\r"))
    if isinstance(problem, http_exceptions.LineTooLong):
        if len(first) > MAX_LINE or not newline:
            return refused(
                414, f"the URL is longer than {MAX_LINE} bytes, which is the limit", "shorten it"
            )
        return refused(
            431, f"a header is longer than {MAX_LINE} bytes, which is the limit", "shorten it"
        )
    if isinstance(problem, http_exceptions.ContentEncodingError):
        return unsupported_encoding()
    if head.startswith(TLS_HELLO):
        return MalformedRequest("this port takes HTTP, not HTTPS", hint="use http:// in the URL")
    if line and line[3] and int(line[3]) > 1:
        return refused(505, "this version of HTTP is not supported", "use HTTP/1.1")
    if isinstance(problem, http_exceptions.BadHttpMethod) and line and line[3]:
        if line[1].decode() in hdrs.METH_ALL:
            return MalformedRequest("the bytes after the request are not HTTP")
        return refused(501, "this HTTP method is unknown", "use GET or POST")
    if isinstance(problem, http_exceptions.BadHttpMethod | http_exceptions.BadStatusLine):
        return MalformedRequest("the first line is not an HTTP request line")
    if isinstance(problem, http_exceptions.InvalidURLError):
        return MalformedRequest("the URL is not valid")
    if isinstance(problem, http_exceptions.InvalidHeader):
        return MalformedRequest("a header is not valid")
    said = str(getattr(problem, "message", "")).partition(":\n")[0]
    if said == "Too many headers received":
        return refused(
            431,
            f"the request has more than {MAX_HEADERS} headers, which is the limit",
            "send fewer",
        )
    if not OWN_WORDS.fullmatch(said):
        said = "it cannot be parsed"
    return MalformedRequest(f"the request is not valid HTTP: {said}")


def headers_error(message: RawRequestMessage) -> LoraxError | None:
    """The error of a valid request whose headers ask for what is not supported."""
    if message.version not in VERSIONS:
        return refused(505, "this version of HTTP is not supported", "use HTTP/1.1")
    if message.method == hdrs.METH_CONNECT:
        return refused(
            501, "CONNECT is not supported: this server is not a proxy", "use GET or POST"
        )
    headers = message.headers
    expected = headers.get(hdrs.EXPECT, "")
    if expected and message.version == HttpVersion11 and expected.lower() != "100-continue":
        return refused(
            417, "the value of Expect is not supported", "use 100-continue, or leave it out"
        )
    if headers.get(hdrs.CONTENT_ENCODING, "").lower() not in ENCODINGS:
        return unsupported_encoding()
    return None


def unsupported_encoding() -> LoraxError:
    return refused(
        415, "this Content-Encoding is not supported", "use gzip or deflate, or leave it out"
    )


def routing_error(request: web.Request, error: web.HTTPException) -> LoraxError:
    """An error of aiohttp's router, in our words."""
    path = printable(request.rel_url.raw_path)
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return refused(405, f"{path} does not take {request.method}", f"use {allowed}")
    if isinstance(error, web.HTTPNotFound):
        return refused(404, f"there is no route {path}", "see docs/api.md")
    return refused(error.status, error.reason)
