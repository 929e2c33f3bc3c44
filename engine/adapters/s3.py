"""Adapters in S3, or in any object store with its interface: `s3://bucket/folder`.

The server's own credentials are used for every request, so any client may name any adapter that they can read. A
version is a digest of the etags and sizes of its files, so a replaced adapter is a new version. Files are downloaded in
ranges, each on the condition that the etag is still the same, and then compared with the checksums of the object.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from engine.adapters.checksums import Checksum, listed
from engine.adapters.disk_cache import DiskCache
from engine.adapters.ref import AdapterRef
from engine.adapters.remote import Check, changed, first_line, pause
from engine.adapters.sources import FOLDERS, WEIGHT_NAMES, Version
from engine.adapters.store import Listing, StoredFile, StoreSource, Target
from engine.adapters.transfer import Transfer
from engine.errors import (
    AdapterError,
    AdapterForbidden,
    AdapterLoadFailed,
    AdapterNotFound,
)

T = TypeVar("T")

CONNECT_S, READ_S = 5.0, 20.0  # limits of one connection attempt, and of one wait for data
PART_BYTES = 16 << 20  # larger files are downloaded in parts of this size
THREADS = 4  # parts of one adapter that are downloaded at the same time
MAX_KEYS = 1000  # files of one folder that are looked at
PIECE_BYTES = 1 << 18
MAX_PARTS = 256  # of an object whose parts are compared one by one
MIN_REVISION = 8  # characters of a digest that name a revision

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")  # no ARN, which names other services
_ETAG = re.compile(r'"?(?P<md5>[0-9a-f]{32})(?:-(?P<parts>[0-9]{1,5}))?"?')
_REVISION = re.compile(r"[0-9a-f]{40}")  # a whole digest
_CHECKSUMS = ("sha256", "sha1", "crc64nvme", "crc32c", "crc32")  # the strongest first
_NO_PARTS = (400, 405, 416, 501)  # answers of stores that do not tell the sizes of parts
_FORBIDDEN = {
    "AccessDenied",
    "AllAccessDisabled",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
}


class S3Source(StoreSource):
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
        check: Check | None = None,
    ) -> None:
        """`endpoint`: None is AWS, or what AWS's own variables and files say. `attempts`: tries per call,
        `backoff_s` apart, doubling. For the others see `StoreSource`."""
        super().__init__(cache, max_file_bytes, ttl_s, check)
        self._endpoint = endpoint
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._part_bytes = part_bytes
        self._read_s = read_s
        self._made: Any = None
        self._lock = threading.Lock()

    def _where(self) -> str:
        return str(self._endpoint or self._client().meta.endpoint_url)

    def _find(self, ref: AdapterRef) -> Listing:
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
                hint="give the folder of adapter_config.json as s3://bucket/folder",
            )
        return listing

    def _kept(self, ref: AdapterRef) -> Version | None:
        if not _REVISION.fullmatch(ref.revision or ""):
            return None
        folders = [f"{ref.id.rstrip('/')}/{below}".rstrip("/") for below in FOLDERS]
        versions = [
            Version(self.name, folder, revision=ref.revision or "", weights=name)
            for folder in folders
            for name in WEIGHT_NAMES
        ]
        return next((one for one in versions if self._cache.has(one, self._where())), None)

    def _look(self, folder: str, end_by: float) -> dict[str, StoredFile]:
        return {file.name: file for file in self._keys(folder, "adapter_", MAX_KEYS)}

    def _describe(self, folder: str, name: str, end_by: float) -> StoredFile | None:
        return next((file for file in self._keys(folder, name, 1) if file.name == name), None)

    def _model_listing(self, folder: str, end_by: float) -> dict[str, StoredFile]:
        return {file.name: file for file in self._keys(folder, "", MAX_KEYS) if file.name}

    def _exists(self, folder: str) -> bool:
        return bool(self._keys(folder, "", 1))

    def _keys(self, path: str, name: str, limit: int) -> list[StoredFile]:
        """The first files of a folder whose names begin with `name`."""
        bucket, prefix = _split(path)

        def list_objects() -> list[StoredFile]:
            answer = self._client().list_objects_v2(
                Bucket=bucket, Prefix=prefix + name, Delimiter="/", MaxKeys=limit
            )
            return [
                StoredFile(one["Key"].removeprefix(prefix), one["ETag"], int(one["Size"]))
                for one in answer.get("Contents", [])
            ]

        return self._call(path, list_objects)

    def _download(self, folder: str, file: StoredFile, target: Target, transfer: Transfer) -> None:
        """Downloads a file in parts, several at a time. The first failure ends the others."""
        starts = range(0, file.size, self._part_bytes)
        with ThreadPoolExecutor(THREADS, "adapter-s3-part") as pool:
            parts = [
                pool.submit(self._part, folder, file, target, start, transfer) for start in starts
            ]
            try:
                for part in parts:
                    part.result()
            except BaseException:
                transfer.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _part(
        self, folder: str, file: StoredFile, target: Target, start: int, transfer: Transfer
    ) -> None:
        """Downloads a part of a file, again after a broken transfer."""
        bucket, prefix = _split(folder)
        end = min(start + self._part_bytes, file.size)
        asked = {} if end - start == file.size else {"Range": f"bytes={start}-{end - 1}"}
        path = f"{folder}/{file.name}"

        def get() -> None:
            answer = self._client().get_object(
                Bucket=bucket, Key=prefix + file.name, IfMatch=file.stamp, **asked
            )
            body, at = answer["Body"], start
            try:
                while piece := body.read(PIECE_BYTES):
                    if at + len(piece) > end:
                        break
                    target.write(piece, at)
                    at += len(piece)
                    transfer.wrote(len(piece))
            finally:
                body.close()
            if at != end or piece:
                raise _CutOff("the answer does not have the length that was listed")

        def get_repeatedly() -> None:
            for attempt in range(1, self._attempts):
                try:
                    return get()
                except _transient():
                    pause(attempt, self._backoff_s)
            get()

        self._call(path, get_repeatedly)

    def _checksums(self, folder: str, file: StoredFile) -> Sequence[Checksum]:
        """The checksums of the whole object, else its etag where that is made of MD5."""
        path = f"{folder}/{file.name}"
        head = self._call(
            path, lambda: self._head(folder, file, IfMatch=file.stamp, ChecksumMode="ENABLED")
        )
        # One of parts ends with -5 or the like, so it is none of the object.
        found = [listed(name, head.get(f"Checksum{name.upper()}")) for name in _CHECKSUMS]
        if any(found):
            return [one for one in found if one is not None]
        etag = _ETAG.fullmatch(file.stamp)
        if etag is None or not _is_md5(head, folder):
            return ()
        if etag["parts"] is None:
            return (Checksum("md5", bytes.fromhex(etag["md5"])),)
        return self._parts(folder, file, bytes.fromhex(etag["md5"]), int(etag["parts"]))

    def _parts(self, folder: str, file: StoredFile, md5: bytes, count: int) -> Sequence[Checksum]:
        """The checksum of an object that was uploaded in parts, if the store tells their sizes."""
        from botocore.exceptions import ClientError

        def sizes() -> tuple[int, ...]:
            numbers = range(1, count + 1) if count <= MAX_PARTS else ()
            try:
                heads = [self._head(folder, file, PartNumber=number) for number in numbers]
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] not in _NO_PARTS:
                    raise
                return ()
            return tuple(int(head["ContentLength"]) for head in heads)

        found = self._call(f"{folder}/{file.name}", sizes)
        return (Checksum("md5", md5, found),) if found and sum(found) == file.size else ()

    def _head(self, folder: str, file: StoredFile, **asked: Any) -> Any:
        bucket, prefix = _split(folder)
        return self._client().head_object(Bucket=bucket, Key=prefix + file.name, **asked)

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


def _split(path: str) -> tuple[str, str]:
    """The bucket, and what the keys of a folder begin with. Raises AdapterNotFound for an impossible name."""
    bucket, _, folder = path.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise AdapterNotFound(
            f"{bucket!r} is not the name of a bucket",
            field="adapter_id",
            hint="use s3://bucket/folder",
        )
    folder = folder.strip("/")
    return bucket, f"{folder}/" if folder else ""


def _is_md5(head: Any, folder: str) -> bool:
    """Whether etags are made of the contents' MD5: not for some encryptions, nor in directory buckets."""
    encrypted = head.get("ServerSideEncryption", "AES256") != "AES256"
    bucket = folder.partition("/")[0]
    return not encrypted and "SSECustomerAlgorithm" not in head and not bucket.endswith("--x-s3")


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
        return AdapterNotFound(f"there is no bucket {path.partition('/')[0]!r}", field="adapter_id")
    if status in (401, 403) or code in _FORBIDDEN:
        return AdapterForbidden(
            f"the server's credentials may not read s3://{path} ({code or status})",
            field="adapter_id",
            hint="grant s3:GetObject and s3:ListBucket to the server's AWS credentials",
        )
    if status == 404:
        return AdapterNotFound(f"there is no s3://{path}", field="adapter_id")
    if status in (301, 307):
        return AdapterLoadFailed(f"s3://{path} is in another region", hint="set AWS_REGION")
    return AdapterLoadFailed(f"S3 refused s3://{path}: {reason}", hint="try again later")
