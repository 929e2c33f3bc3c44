"""Adapters in S3, or in any object store with its interface: `s3://bucket/folder`.

The server's own credentials are used for every request, so any client may name any adapter that they can read. A
version is a digest of the etags and sizes of its two files, so a replaced adapter is a new version. Both files are
downloaded in ranges, each on the condition that its etag is still the same.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine.adapters.disk_cache import CONFIG_BYTES, DiskCache, NewFile, Transfer
from engine.adapters.ref import AdapterRef
from engine.adapters.remote import changed, first_line, pause, revision_of
from engine.adapters.sources import (
    CONFIG_NAME,
    AdapterFiles,
    Progress,
    Source,
    Version,
    find_single_file,
)
from engine.errors import (
    RAISE_LIMIT,
    RESAVE,
    AdapterError,
    AdapterForbidden,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterTooLarge,
)

T = TypeVar("T")

CONNECT_S, READ_S = 5.0, 20.0  # limits of one connection attempt, and of one wait for data
PART_BYTES = 16 << 20  # larger files are downloaded in parts of this size
THREADS = 4  # parts of one adapter that are downloaded at the same time
MAX_KEYS = 1000  # files of one folder whose names begin with `adapter_`
PIECE_BYTES = 1 << 18
MIN_REVISION = 8  # characters of a digest that name a revision

_NAMING = "give the folder of adapter_config.json as s3://bucket/folder"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")  # no ARN, which names other services
_FORBIDDEN = {
    "AccessDenied",
    "AllAccessDisabled",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
}


@dataclass(frozen=True, slots=True)
class _Object:
    key: str
    etag: str
    size: int


@dataclass(frozen=True, slots=True)
class _Listing:
    """The two files of an adapter."""

    bucket: str
    config: _Object
    weights: _Object

    @property
    def revision(self) -> str:
        return revision_of((one.key, one.etag, one.size) for one in (self.config, self.weights))


class S3Source(Source):
    """See the module. boto3 is imported at the first request."""

    name = "s3"
    prefix = "s3://"

    def __init__(
        self,
        cache: DiskCache,
        *,
        endpoint: str | None = None,
        max_file_bytes: int | None = None,
        ttl_s: float = 60.0,
        attempts: int = 4,
        backoff_s: float = 0.5,
        part_bytes: int = PART_BYTES,
        read_s: float = READ_S,
    ) -> None:
        """`endpoint`: None is AWS, or what AWS's own variables and files say. `max_file_bytes`: limit of a weight
        file. `attempts`: tries per call, `backoff_s` apart, doubling."""
        self.ttl_s = ttl_s
        self._cache = cache
        self._endpoint = endpoint
        self._max_file_bytes = max_file_bytes
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._part_bytes = part_bytes
        self._read_s = read_s
        self._made: Any = None
        self._lock = threading.Lock()

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        listing = self._find(ref)
        size = listing.weights.size
        if self._max_file_bytes is not None and size > self._max_file_bytes:
            raise AdapterTooLarge(
                f"{listing.weights.key} has {size} bytes; the limit is {self._max_file_bytes} bytes",
                field="adapter_id",
                hint=RAISE_LIMIT,
            )
        if listing.config.size > CONFIG_BYTES:
            raise AdapterTooLarge(
                f"{listing.config.key} has {listing.config.size} bytes; the limit is {CONFIG_BYTES} bytes",
                field="adapter_id",
                hint=RESAVE,
            )
        folder = listing.config.key.removesuffix(CONFIG_NAME).strip("/")
        return Version(
            self.name,
            f"{listing.bucket}/{folder}".rstrip("/"),
            revision=listing.revision,
            weights=listing.weights.key.rpartition("/")[2],
            num_bytes=size,
        )

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        def fill(folder: Path, transfer: Transfer) -> None:
            listing = self._list(version.id)
            if listing is None or listing.revision != version.revision:
                raise changed(f"s3://{version.id}")
            transfer.reserve(listing.config.size + listing.weights.size)
            self._download(listing, version.weights, folder, transfer)

        where = str(self._endpoint or self._client().meta.endpoint_url)
        return self._cache.fetch(version, where, progress, fill)

    def _find(self, ref: AdapterRef) -> _Listing:
        """The files of a reference. A folder's name may contain @; else @ is followed by a version's digest."""
        listing = self._list(ref.name)
        if listing is None and ref.revision and (current := self._list(ref.id)) is not None:
            if len(ref.revision) >= MIN_REVISION and current.revision.startswith(ref.revision):
                return current
            raise AdapterNotFound(
                f"{self.prefix}{ref.id} has no revision {ref.revision!r}",
                field="adapter_id",
                hint=f"its current revision is {current.revision}; S3 keeps no other",
            )
        if listing is None:
            raise AdapterNotFound(
                f"there is no {self.prefix}{ref.name}",
                field="adapter_id",
                hint=_NAMING,
            )
        return listing

    def _list(self, path: str) -> _Listing | None:
        """The two files of a folder; None if nothing lies there. Raises AdapterIncompatible if others do."""
        bucket, _, folder = path.partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise AdapterNotFound(
                f"{bucket!r} is not the name of a bucket",
                field="adapter_id",
                hint=_NAMING,
            )
        folder = folder.strip("/")
        start = f"{folder}/" if folder else ""

        def list_keys(prefix: str, limit: int) -> list[_Object]:
            client = self._client()
            answer = client.list_objects_v2(
                Bucket=bucket, Prefix=prefix, Delimiter="/", MaxKeys=limit
            )
            found = answer.get("Contents", [])
            return [_Object(one["Key"], one["ETag"], int(one["Size"])) for one in found]

        files = {
            one.key.removeprefix(start): one
            for one in self._call(path, lambda: list_keys(f"{start}adapter_", MAX_KEYS))
        }
        if not files and not self._call(path, lambda: list_keys(start, 1)):
            return None
        weights = find_single_file(files, f"{self.prefix}{path}")
        return _Listing(bucket, files[CONFIG_NAME], files[weights])

    def _download(self, listing: _Listing, weights: str, folder: Path, transfer: Transfer) -> None:
        """Downloads both files. The first failure ends the other parts."""
        with (
            NewFile(folder / CONFIG_NAME, listing.config.size) as config,
            NewFile(folder / weights, listing.weights.size) as other,
            ThreadPoolExecutor(THREADS, "adapter-s3-part") as pool,
        ):
            parts = [
                pool.submit(self._part, listing.bucket, one, file, start, transfer)
                for one, file in ((listing.config, config), (listing.weights, other))
                for start in range(0, one.size, self._part_bytes)
            ]
            try:
                for part in parts:
                    part.result()
            except BaseException:
                transfer.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _part(
        self, bucket: str, one: _Object, file: NewFile, start: int, transfer: Transfer
    ) -> None:
        """Downloads a part of a file, again after a broken transfer."""
        end = min(start + self._part_bytes, one.size)
        is_whole = end - start == one.size  # botocore checks the checksum of a whole file
        asked = {} if is_whole else {"Range": f"bytes={start}-{end - 1}"}
        path = f"{bucket}/{one.key}"

        def get() -> None:
            answer = self._client().get_object(
                Bucket=bucket, Key=one.key, IfMatch=one.etag, **asked
            )
            body, at = answer["Body"], start
            with contextlib.closing(body), _ended_by(transfer.end_by, body):
                while piece := body.read(PIECE_BYTES):
                    if at + len(piece) > end:
                        break
                    file.write(piece, at)
                    at += len(piece)
                    transfer.wrote(len(piece))
            if at != end or piece:
                raise _CutOff("the answer does not have the length that was listed")

        def get_repeatedly() -> None:
            for attempt in range(1, self._attempts):
                try:
                    return get()
                except _transient():
                    transfer.wrote(0)
                    pause(attempt, self._backoff_s)
            get()

        self._call(path, get_repeatedly)

    def _call(self, path: str, call: Callable[[], T]) -> T:
        """The result of a call; botocore repeats it after transient failures. Raises AdapterError."""
        self._client()  # raises without boto3
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            return call()
        except ClientError as error:
            raise _refused(path, error.response, first_line(error)) from None
        except _transient() as error:
            raise AdapterLoadFailed(
                f"s3://{path}: {first_line(error)}",
                hint="check the network and --s3-endpoint-url, or try again later",
            ) from None
        except (ResponseParserError, KeyError, TypeError, ValueError) as error:
            raise AdapterLoadFailed(
                f"s3://{path}: not an answer of S3: {first_line(error)}",
                hint="check --s3-endpoint-url",
            ) from None
        except BotoCoreError as error:
            raise AdapterForbidden(
                f"cannot read s3://{path}: {first_line(error)}",
                field="adapter_id",
                hint="start the server with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or with AWS_PROFILE",
            ) from None

    def _client(self) -> Any:
        """The client, made once. Raises AdapterLoadFailed without boto3."""
        with self._lock:
            if self._made is None:
                self._made = self._connect()
            return self._made

    def _connect(self) -> Any:
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError:
            raise AdapterLoadFailed(
                "adapters in S3 need the package boto3",
                hint="on the server: pip install 'lorax-engine[s3]'",
            ) from None
        config = Config(
            connect_timeout=CONNECT_S,
            read_timeout=self._read_s,
            max_pool_connections=64,
            retries={"total_max_attempts": self._attempts, "mode": "standard"},
        )
        try:
            return boto3.session.Session().client("s3", endpoint_url=self._endpoint, config=config)
        except (BotoCoreError, ValueError) as error:
            raise AdapterLoadFailed(
                f"cannot use S3: {first_line(error)}",
                hint="check AWS_REGION, AWS_PROFILE and --s3-endpoint-url",
            ) from None


@contextlib.contextmanager
def _ended_by(end_by: float, body: Any) -> Iterator[None]:
    """Ends the body at a time (monotonic). A byte now and then would never reach the limit of one wait."""

    def shut() -> None:
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):
            body._raw_stream.shutdown()

    timer = threading.Timer(max(0.0, end_by - time.monotonic()), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _CutOff(Exception):
    """The body is shorter or longer than the object."""


def _transient() -> tuple[type[Exception], ...]:
    """Failures of the network, after which another try may succeed."""
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    return (
        _CutOff,
        HTTPError,
        exceptions.ConnectionError,
        exceptions.FlexibleChecksumError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
    )


def _refused(path: str, answer: Any, reason: str) -> AdapterError:
    """The error for an answer of S3 that is an error."""
    code = str(answer.get("Error", {}).get("Code", ""))
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status == 412:
        return changed(f"s3://{path}")
    if code == "NoSuchBucket":
        return AdapterNotFound(
            f"there is no bucket {path.partition('/')[0]!r}", field="adapter_id", hint=_NAMING
        )
    if status in (401, 403) or code in _FORBIDDEN:
        return AdapterForbidden(
            f"the server's credentials may not read s3://{path} ({code or status})",
            field="adapter_id",
            hint="grant s3:GetObject and s3:ListBucket to the server's AWS credentials",
        )
    if status == 404:
        return AdapterNotFound(f"there is no s3://{path}", field="adapter_id", hint=_NAMING)
    if status in (301, 307):
        return AdapterLoadFailed(f"s3://{path} is in another region", hint="set AWS_REGION")
    return AdapterLoadFailed(f"S3 refused s3://{path}: {reason}", hint="try again later")
