"""Adapters in folders of web servers, `https://host/folder`: only on hosts that the operator listed.

Redirects may lead to listed hosts only. A host listed by name must have public addresses; a host listed as an IP
address may be private. No token is sent.
"""

from __future__ import annotations

import ipaddress
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlsplit

from engine.adapters.disk_cache import CONFIG_BYTES, DiskCache, NewFile, Transfer
from engine.adapters.ref import AdapterRef
from engine.adapters.remote import changed, is_transient, pause, revision_of
from engine.adapters.sources import (
    CONFIG_NAME,
    WEIGHT_NAMES,
    AdapterFiles,
    Progress,
    Source,
    Version,
    find_single_file,
)
from engine.adapters.web import Answer, Refused, Web, WebError
from engine.errors import (
    RAISE_LIMIT,
    RESAVE,
    AdapterForbidden,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterTooLarge,
    ConfigError,
)

T = TypeVar("T")

RESOLVE_S = 30.0  # limit of one `resolve`


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    stamp: str  # changes with the contents
    size: int


class HttpsSource(Source):
    """See the module."""

    name = "https"
    prefix = "https://"

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
    ) -> None:
        """`hosts`: `host` (port 443) or `host:port`. Raises ConfigError for other texts."""
        self.ttl_s = ttl_s
        self._hosts = dict(map(_parse_host, hosts))
        self._cache = cache
        self._max_file_bytes = max_file_bytes
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._web = Web(self._permit, context)

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        place = ref.name.rstrip("/")
        config, weights = self._find(place)
        for file, limit in ((config, CONFIG_BYTES), (weights, self._max_file_bytes)):
            if limit is not None and file.size > limit:
                raise AdapterTooLarge(
                    f"{file.name} of https://{place} has {file.size} bytes; the limit is {limit} bytes",
                    field="adapter_id",
                    hint=RESAVE if file is config else RAISE_LIMIT,
                )
        return Version(
            self.name,
            place,
            revision=_revision(config, weights),
            weights=weights.name,
            num_bytes=weights.size,
        )

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        def fill(folder: Path, transfer: Transfer) -> None:
            config, weights = self._find(version.id)
            if _revision(config, weights) != version.revision:
                raise changed(f"https://{version.id}")
            transfer.reserve(config.size + weights.size)
            for file in (config, weights):
                with NewFile(folder / file.name, file.size) as target:
                    self._download(version.id, file, target, transfer)

        return self._cache.fetch(version, "", progress, fill)

    def _permit(self, host: str, port: int) -> bool:
        if (host, port) not in self._hosts:
            raise Refused(f"{host}:{port} is not in --adapter-hosts")
        return self._hosts[host, port]

    def _find(self, place: str) -> tuple[_File, _File]:
        """What the server says about the two files."""
        end_by = time.monotonic() + RESOLVE_S
        config = self._ask(place, CONFIG_NAME, end_by)
        if config is None:
            raise AdapterNotFound(
                f"there is no {CONFIG_NAME} in https://{place}",
                field="adapter_id",
                hint="give the folder of adapter_config.json",
            )
        found = {CONFIG_NAME: config}
        for name in WEIGHT_NAMES:
            if (file := self._ask(place, name, end_by)) is not None:
                found[name] = file
                break
        return config, found[find_single_file(found, f"https://{place}")]

    def _ask(self, place: str, name: str, end_by: float) -> _File | None:
        """One file as the server describes it; None if it does not exist."""

        def read(answer: Answer) -> _File | None:
            if answer.status == 404:
                return None
            return _described(place, name, answer.headers)

        return self._get("HEAD", place, name, end_by, read)

    def _download(self, place: str, file: _File, target: NewFile, transfer: Transfer) -> None:
        def write(answer: Answer) -> None:
            if answer.status != 200 or _described(place, file.name, answer.headers) != file:
                raise changed(f"https://{place}")
            at = 0
            for piece in answer.pieces:
                if at + len(piece) > file.size:
                    raise WebError("the answer is longer than its Content-Length")
                target.write(piece, at)
                at += len(piece)
                transfer.wrote(len(piece))
            if at != file.size:
                raise WebError("the answer was cut off")

        self._get("GET", place, file.name, transfer.end_by, write)

    def _get(
        self, method: str, place: str, name: str, end_by: float, use: Callable[[Answer], T]
    ) -> T:
        """Uses the answer, again after transient failures. `use` sees the statuses 200 and 404 only."""
        failure = ""
        for attempt in range(1, self._attempts + 1):
            try:
                with self._web.open(_url(place, name), end_by, {}, method) as answer:
                    if answer.status in (200, 404):
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


def _described(place: str, name: str, headers: Message) -> _File:
    stamp = headers.get("ETag") or headers.get("Last-Modified")
    length = headers.get("Content-Length") or ""
    if not stamp or not length.isascii() or not length.isdigit():
        raise AdapterLoadFailed(
            f"the server of https://{place} sends no Content-Length, or neither ETag nor Last-Modified",
            hint="use a web server that serves plain files",
        )
    return _File(name, stamp, int(length))


def _revision(*files: _File) -> str:
    return revision_of((file.name, file.stamp, file.size) for file in files)
