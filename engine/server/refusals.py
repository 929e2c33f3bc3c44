"""Errors as answers: the shape of each family of routes, and what is wrong with requests that are not valid HTTP.

Names and values of headers, paths of unread requests and bodies never go into a message: messages are logged.
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

# Refused before any route is asked: status -> our type of error.
HTTP_ERRORS = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    414: "url_too_long",
    415: "unsupported_encoding",
    417: "expectation_failed",
    431: "headers_too_large",
    501: "unknown_method",
    505: "unsupported_version",
}

REQUEST_LINE = re.compile(rb"([!-~]+) ([!-\xff]+)(?: HTTP/(\d+)\.\d+)?\r?\n?")
TLS_HELLO = b"\x16\x03"
# What the parser says of a request begins with its own words; what it quotes follows a colon and a line's end.
OWN_WORDS = re.compile(r"[A-Za-z0-9 .,`'_-]{1,100}")


def _kind(status: int, error_type: str) -> type[LoraxError]:
    names = {"status": status, "error_type": error_type}
    return cast("type[LoraxError]", type(f"_Http{status}", (LoraxError,), names))


_KINDS = {status: _kind(status, error_type) for status, error_type in HTTP_ERRORS.items()}


def refused(status: int, message: str, hint: str | None = None) -> LoraxError:
    """An error of HTTP itself, which the tree of `engine.errors` does not have."""
    return (_KINDS.get(status) or _kind(status, "http"))(message, hint=hint)


# -- requests that are not valid HTTP


def path_of(head: bytes) -> str:
    """The path of a request whose first bytes are `head`; / if there is none."""
    line = REQUEST_LINE.match(head)
    target = line[2] if line else b"/"
    return target.partition(b"?")[0].decode("ascii", "backslashreplace")


def of_parser(problem: BaseException | None, head: bytes) -> LoraxError:
    """What to answer to a request that the parser refused; `head` is its beginning."""
    first, newline, _ = head.partition(b"\n")
    line = REQUEST_LINE.fullmatch(first.rstrip(b"\r"))
    if isinstance(problem, http_exceptions.LineTooLong):
        if len(first) > MAX_LINE or not newline:
            return refused(414, f"the URL is longer than {MAX_LINE} bytes", "shorten it")
        return refused(431, f"a header is longer than {MAX_LINE} bytes", "shorten it")
    if isinstance(problem, http_exceptions.ContentEncodingError):
        return unsupported_encoding()
    if head.startswith(TLS_HELLO):
        return MalformedRequest(
            "this port speaks HTTP, not HTTPS", hint="use http:// in the address"
        )
    if line and line[3] and int(line[3]) > 1:
        return refused(505, "this HTTP version is not supported", "use HTTP/1.1")
    if isinstance(problem, http_exceptions.BadHttpMethod) and line and line[3]:
        if line[1].decode() in hdrs.METH_ALL:
            return MalformedRequest("what follows the request is not HTTP")
        return refused(501, "this HTTP method is not known", "use GET or POST")
    if isinstance(problem, http_exceptions.BadHttpMethod | http_exceptions.BadStatusLine):
        return MalformedRequest("the first line is not an HTTP request line")
    if isinstance(problem, http_exceptions.InvalidURLError):
        return MalformedRequest("the URL is not valid")
    if isinstance(problem, http_exceptions.InvalidHeader):
        return MalformedRequest("a header is not valid")
    said = str(getattr(problem, "message", "")).partition(":\n")[0]
    if said == "Too many headers received":
        return refused(431, f"the request has more than {MAX_HEADERS} headers", "send fewer")
    if not OWN_WORDS.fullmatch(said):
        said = "cannot be parsed"
    return MalformedRequest(f"the request is not valid HTTP: {said}")


def of_headers(message: RawRequestMessage) -> LoraxError | None:
    """What is wrong with the headers of a request that was parsed."""
    if message.version not in VERSIONS:
        return refused(505, "this HTTP version is not supported", "use HTTP/1.1")
    if message.method == hdrs.METH_CONNECT:
        return refused(501, "this server is no proxy: it does not take CONNECT", "use GET or POST")
    headers = message.headers
    expected = headers.get(hdrs.EXPECT, "")
    if expected and message.version == HttpVersion11 and expected.lower() != "100-continue":
        return refused(417, "Expect has an unknown value", "use 100-continue, or leave it out")
    if headers.get(hdrs.CONTENT_ENCODING, "").lower() not in ENCODINGS:
        return unsupported_encoding()
    return None


def unsupported_encoding() -> LoraxError:
    return refused(
        415, "this Content-Encoding is not supported", "use gzip or deflate, or leave it out"
    )


def of_http(request: web.Request, error: web.HTTPException) -> LoraxError:
    """What aiohttp refuses by itself, in our words."""
    path = printable(request.rel_url.raw_path)
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return refused(405, f"{path} does not take {request.method}", f"use {allowed}")
    if isinstance(error, web.HTTPNotFound):
        return refused(404, f"there is no route {path}", "see docs/api.md")
    return refused(error.status, error.reason)
