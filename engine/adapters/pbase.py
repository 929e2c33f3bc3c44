"""Adapters of Predibase: `name/version`, resolved by its API to a folder in S3.

The API is asked with each tenant's own token, so a tenant sees only its own adapters. The files are read with the
server's credentials for S3.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlsplit

from engine.adapters.ref import AdapterRef
from engine.adapters.remote import is_transient, pause
from engine.adapters.s3 import S3Source
from engine.adapters.sources import AdapterFiles, Progress, Source, Version, token_hash
from engine.adapters.web import Refused, TooMuch, Web, WebError
from engine.errors import (
    AdapterError,
    AdapterForbidden,
    AdapterLoadFailed,
    AdapterNotFound,
)

API_BYTES = 1 << 20  # limit of one answer
API_SECONDS = 15.0  # limit of one `resolve`'s calls of the API
MAX_PATH = 1024  # characters
_UNFINISHED = ("pending", "queued", "stopping")  # states without files


class PbaseSource(Source):
    """See the module."""

    name = "pbase"

    def __init__(
        self,
        s3: S3Source,
        endpoint: str,
        *,
        token: str | None = None,
        bucket: str | None = None,
        ttl_s: float = 60.0,
        attempts: int = 3,
        backoff_s: float = 0.5,
    ) -> None:
        """`endpoint`: of the API. `token`: for requests without one. `bucket`: of the paths that the API returns; None:
        their first part is the bucket."""
        self.ttl_s = ttl_s
        self._s3 = s3
        self._endpoint = endpoint.rstrip("/")
        self._token = token
        self._bucket = bucket
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._web = Web(self._permit)

    def tenant(self, token: str | None) -> bytes:
        effective = token or self._token
        return token_hash(effective) if effective else b""

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        effective = token or self._token
        if not effective:
            raise AdapterForbidden(
                "Predibase needs a token", field="api_token", hint="send an api_token"
            )
        salt = self.tenant(token)
        try:
            path = self._path(ref, effective)
            found = self._s3.current(AdapterRef((path,), self._s3.name))
        except AdapterLoadFailed as error:
            return self._s3.recall(self.name, ref, salt, error)
        return replace(found, source=self.name, salt=salt, asked=ref.name)

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        return self._s3.fetch(version, None, progress)

    def _permit(self, host: str, port: int) -> bool:
        """The operator named the API's host; redirects, which would carry the token, go nowhere else."""
        if host != urlsplit(self._endpoint).hostname:
            raise Refused(f"a redirect leads to {host}")
        return True

    def _path(self, ref: AdapterRef, token: str) -> str:
        """The adapter's folder, as `bucket/folder`."""
        name, _, version = ref.name.partition("/")
        if not name or "/" in version:
            raise AdapterNotFound(
                f"{ref.name!r} is not an adapter of Predibase",
                field="adapter_id",
                hint="use name/version",
            )
        end_by = time.monotonic() + API_SECONDS
        found = None
        if version:
            url = f"/v2/repos/{quote(name, safe='')}/version/{quote(version, safe='')}"
            found = self._get(url, ref, token, end_by)
        if found is not None:
            return self._located(ref, found)
        query = f"?version={quote(version, safe='')}" if version else ""
        legacy = self._get(
            f"/v1/models/version/name/{quote(name, safe='')}{query}", ref, token, end_by
        )
        if legacy is None:
            raise AdapterNotFound(
                f"there is no {ref.name} at Predibase",
                field="adapter_id",
                hint="use name/version, and check the api_token",
            )
        parts = [legacy.get("uuid"), legacy.get("bestRunID")]
        if not all(isinstance(part, str) and part for part in parts):
            raise self._foreign(ref, "has no uuid and bestRunID")
        return self._in_bucket(f"{parts[0]}/{parts[1]}/artifacts/model/model_weights")

    def _located(self, ref: AdapterRef, answer: dict[str, Any]) -> str:
        """The folder in an answer of the API for repositories."""
        status, path = str(answer.get("status")).lower(), answer.get("adapterPath")
        if status in _UNFINISHED:
            raise AdapterLoadFailed(
                f"{ref.name} is not trained yet (status {status})", hint="try again later"
            )
        if not path:
            raise AdapterLoadFailed(
                f"Predibase has no files of {ref.name} yet", hint="try again later"
            )
        if not isinstance(path, str) or len(path) > MAX_PATH or not path.isprintable():
            raise self._foreign(ref, "has an adapterPath that is not a path")
        return self._in_bucket(path)

    def _in_bucket(self, path: str) -> str:
        if path.startswith(self._s3.prefix):
            return path.removeprefix(self._s3.prefix).rstrip("/")
        return "/".join(filter(None, (self._bucket, path.strip("/"))))

    def _get(self, path: str, ref: AdapterRef, token: str, end_by: float) -> dict[str, Any] | None:
        """A JSON object of the API; None for status 404. Transient failures are retried."""
        failure = ""
        for attempt in range(1, self._attempts + 1):
            try:
                headers = {"Authorization": f"Bearer {token}"}
                with self._web.open(self._endpoint + path, end_by, headers) as answer:
                    body, status = answer.read(API_BYTES), answer.status
            except WebError as error:
                failure = str(error)
            except (Refused, TooMuch, ValueError) as error:
                raise self._foreign(ref, str(error)) from None
            else:
                if status == 404:
                    return None
                if status in (401, 403):
                    raise AdapterForbidden(
                        f"Predibase refused the api_token for {ref.name}", field="api_token"
                    )
                if status == 200:
                    return self._parsed(ref, body)
                failure = f"its answer has status {status}"
                if not is_transient(status):
                    break
            if attempt < self._attempts and time.monotonic() < end_by:
                pause(attempt, self._backoff_s)
        raise AdapterLoadFailed(
            f"Predibase's API failed for {ref.name}: {failure}",
            hint="try again later, or check --predibase-gateway-endpoint",
        )

    def _parsed(self, ref: AdapterRef, body: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._foreign(ref, "is not a JSON object")
        return answer

    def _foreign(self, ref: AdapterRef, why: str) -> AdapterError:
        return AdapterLoadFailed(
            f"Predibase's answer for {ref.name} cannot be used: {why}",
            hint="check --predibase-gateway-endpoint",
        )
