"""Adapters in folders of web servers, `https://host/folder`: only on hosts that the operator listed.

Redirects may lead to listed hosts only. A host listed by name must have public addresses; a host listed as an IP
address may be private. No token is sent.
"""

from __future__ import annotations

import ipaddress
import ssl
import time
from collections.abc import Callable, Iterable
from email.message import Message
from typing import TypeVar
from urllib.parse import quote, urlsplit

from engine.adapters.disk_cache import DiskCache
from engine.adapters.remote import Check, changed, is_transient, pause
from engine.adapters.sources import CONFIG_NAME
from engine.adapters.store import StoredFile, StoreSource, Target
from engine.adapters.transfer import Transfer
from engine.adapters.web import Answer, Refused, Web, WebError
from engine.errors import (
    AdapterForbidden,
    AdapterLoadFailed,
    ConfigError,
)

T = TypeVar("T")

_ANSWERS = (200, 404, 410)  # the file is there, or it is not


class HttpsSource(StoreSource):
    """See the module."""

    name = "https"
    prefix = "https://"
    sought = CONFIG_NAME

    def __init__(
        self,
        cache: DiskCache,
        hosts: Iterable[str],
        *,
        max_file_bytes: int | None = None,
        ttl_s: float = 60.0,
        attempts: int = 3,
        backoff_s: float = 0.5,
        context: ssl.SSLContext | None = None,
        check: Check | None = None,
    ) -> None:
        """`hosts`: `host` (port 443) or `host:port`. Raises ConfigError for other texts."""
        super().__init__(cache, max_file_bytes, ttl_s, check)
        self._hosts = dict(map(_parse_host, hosts))
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._web = Web(self._permit, context)

    def _permit(self, host: str, port: int) -> bool:
        if (host, port) not in self._hosts:
            raise Refused(f"{host}:{port} is not in --adapter-hosts")
        return self._hosts[host, port]

    def _describe(self, folder: str, name: str, end_by: float) -> StoredFile | None:
        def read(answer: Answer) -> StoredFile | None:
            if answer.status != 200:
                return None
            return _described(folder, name, answer.headers)

        return self._get("HEAD", folder, name, end_by, read)

    def _download(self, folder: str, file: StoredFile, target: Target, transfer: Transfer) -> None:
        def write(answer: Answer) -> None:
            if answer.status != 200 or _described(folder, file.name, answer.headers) != file:
                raise changed(f"https://{folder}")
            at = 0
            for piece in answer.pieces:
                if at + len(piece) > file.size:
                    raise WebError("the answer is longer than its Content-Length")
                target.write(piece, at)
                at += len(piece)
                transfer.wrote(len(piece))
            if at != file.size:
                raise WebError("the answer was cut off")

        self._get("GET", folder, file.name, transfer.end_by, write)

    def _get(
        self, method: str, place: str, name: str, end_by: float, use: Callable[[Answer], T]
    ) -> T:
        """Uses the answer, again after transient failures. `use` sees the statuses of _ANSWERS only."""
        failure = ""
        for attempt in range(1, self._attempts + 1):
            try:
                with self._web.open(_url(place, name), end_by, {}, method) as answer:
                    if answer.status in _ANSWERS:
                        return use(answer)
                    status = answer.status
            except WebError as error:
                failure = str(error)
            except Refused as error:
                raise AdapterForbidden(
                    f"https://{place} may not be read: {error}",
                    field="adapter_id",
                    hint="the operator lists the hosts in --adapter-hosts",
                ) from None
            else:
                if status in (401, 403):
                    raise AdapterForbidden(
                        f"https://{place} may not be read (status {status})",
                        field="adapter_id",
                        hint="its files must be readable without a token",
                    )
                failure = f"the answer has status {status}"
                if not is_transient(status):
                    break
            if time.monotonic() >= end_by:
                break
            if attempt < self._attempts:
                pause(attempt, self._backoff_s)
        raise AdapterLoadFailed(f"https://{place}: {failure}", hint="try again later")


def _parse_host(text: str) -> tuple[tuple[str, int], bool]:
    """Host and port of a setting, and whether the address may be private."""
    try:
        parts = urlsplit(f"https://{text}")
        host, port = parts.hostname or "", parts.port or 443
    except ValueError:
        host, port = "", 0
    if not host or parts.netloc != text or "@" in text:
        raise ConfigError(
            f"--adapter-hosts {text!r} is not a host",
            field="adapter_hosts",
            hint="use host or host:port",
        )
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return (host, port), False
    return (host, port), True


def _url(place: str, name: str) -> str:
    host, _, folder = place.partition("/")
    return f"https://{host}/{quote(f'{folder}/{name}'.lstrip('/'))}"


def _described(place: str, name: str, headers: Message) -> StoredFile:
    stamp = headers.get("ETag") or headers.get("Last-Modified")
    length = headers.get("Content-Length") or ""
    if not stamp or not length.isascii() or not length.isdigit():
        raise AdapterLoadFailed(
            f"the server of https://{place} sends no Content-Length, or neither ETag nor Last-Modified",
            hint="use a web server that serves plain files",
        )
    return StoredFile(name, stamp, int(length))
