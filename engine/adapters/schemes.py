"""Adapters of other stores through fsspec: `gs://`, `abfs://` and whatever else the operator names.

The package of the scheme reads with the server's own credentials. Its calls may block without a limit; the loader's
deadline ends their request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from engine.adapters.checksums import Checksum, listed
from engine.adapters.disk_cache import DiskCache
from engine.adapters.remote import Check, changed, first_line, pause
from engine.adapters.sources import Version
from engine.adapters.store import StoredFile, StoreSource, Target
from engine.adapters.transfer import Transfer
from engine.errors import (
    AdapterError,
    AdapterForbidden,
    AdapterLoadFailed,
    AdapterNotFound,
    ConfigError,
)

T = TypeVar("T")

PIECE_BYTES = 1 << 20
# Schemes with a source of their own, or that would open the server's own disk.
_INSTEAD = {
    "file": "use --adapter-root",
    "local": "use --adapter-root",
    "http": "use --adapter-hosts, with https",
    "https": "use --adapter-hosts",
    "hf": "use the source hub",
    "s3": "use the source s3",
    "s3a": "use the source s3",
}
# Schemes that read through others, so also from the server's own disk.
_WRAPPERS = {
    "blockcache",
    "cached",
    "dask",
    "data",
    "dir",
    "filecache",
    "generic",
    "git",
    "libarchive",
    "reference",
    "simplecache",
    "tar",
    "zip",
}
# What stores say of a file that changes with its contents, in the order of preference.
_STAMPS = (
    "etag",
    "ETag",
    "generation",
    "md5Hash",
    "content_md5",
    "mtime",
    "modificationTime",
    "last_modified",
    "LastModified",
    "updated",
    "created",
)


class SchemeSource(StoreSource):
    """The adapters of one scheme. See the module."""

    def __init__(
        self,
        scheme: str,
        cache: DiskCache,
        *,
        max_file_bytes: int | None = None,
        ttl_s: float = 60.0,
        attempts: int = 3,
        backoff_s: float = 0.5,
        check: Check | None = None,
    ) -> None:
        """`scheme`: without `://`. its package is imported at the first request. Raises ConfigError for a scheme
        that fsspec does not have, that has a source of its own, or that wraps other schemes."""
        from fsspec.registry import known_implementations, registry

        known = {*known_implementations, *registry} - _WRAPPERS
        if scheme in _INSTEAD or scheme not in known:
            raise ConfigError(
                f"--adapter-schemes {scheme!r} cannot be used",
                field="adapter_schemes",
                hint=_INSTEAD.get(
                    scheme, "name a scheme of fsspec without ://, such as gs or abfs"
                ),
            )
        self.name = scheme
        self.prefix = f"{scheme}://"
        super().__init__(cache, max_file_bytes, ttl_s, check)
        self._package = str(known_implementations.get(scheme, {}).get("err", ""))
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._made: Any = None
        self._lock = threading.Lock()

    def _describe(self, folder: str, name: str, end_by: float) -> StoredFile | None:
        info = self._info(folder, name)
        return None if info is None else self._stored(folder, name, info)

    def _model_listing(self, folder: str, end_by: float) -> dict[str, StoredFile]:
        infos = self._call(folder, lambda: self._store().ls(folder, detail=True))
        named = {str(info["name"]).rpartition("/")[2]: info for info in infos}
        return {
            name: self._stored(folder, name, info)
            for name, info in named.items()
            if info.get("type") == "file"
        }

    def _stored(self, folder: str, name: str, info: dict[str, Any]) -> StoredFile:
        size, stamp = info.get("size"), _stamp(info)
        if info.get("type") != "file" or not isinstance(size, int) or stamp is None:
            raise AdapterLoadFailed(
                f"{self.prefix}{folder}/{name} has no size, or nothing that shows when it changed",
                hint="use a store that lists sizes and either etags or times",
            )
        return StoredFile(name, stamp, size)

    def _info(self, folder: str, name: str) -> dict[str, Any] | None:
        """What the store says of a file; None if it does not exist."""

        def ask() -> dict[str, Any]:
            store = self._store()
            store.invalidate_cache()
            info: dict[str, Any] = store.info(f"{folder}/{name}")
            return info

        try:
            return self._call(folder, ask)
        except AdapterNotFound:
            return None

    def _download(self, folder: str, file: StoredFile, target: Target, transfer: Transfer) -> None:
        """Downloads one file, again after a transient failure of the store; those of our own disk are raised."""
        path = f"{folder}/{file.name}"
        with self._call(folder, lambda: self._store().open(path, "rb")) as opened:
            at = 0
            while at <= file.size:
                piece = self._call(folder, lambda: opened.read(PIECE_BYTES))
                if not piece or at + len(piece) > file.size:
                    break
                target.write(piece, at)
                at += len(piece)
                transfer.wrote(len(piece))
        if piece or at != file.size:
            raise AdapterLoadFailed(
                f"{self.prefix}{path} does not have the size that was listed",
                hint="try again later",
            )

    def _checksums(self, folder: str, file: StoredFile) -> Sequence[Checksum]:
        """The MD5 that Google Cloud Storage and some others list."""
        info = self._info(folder, file.name) or {}
        found = listed("md5", info.get("md5Hash"))
        return () if found is None else (found,)

    def _confirm(self, version: Version) -> None:
        listing = self._list(version.id)
        if listing is None or listing.revision != version.revision:
            raise changed(f"{self.prefix}{version.id}")

    def _call(self, place: str, call: Callable[[], T]) -> T:
        """The result of a call of the store, repeated after failures that may be transient. Raises AdapterError."""
        failure: Exception | None = None
        for attempt in range(1, self._attempts + 1):
            try:
                return call()
            except AdapterError:
                raise
            except FileNotFoundError:
                raise AdapterNotFound(
                    f"there is no adapter in {self.prefix}{place}",
                    field="adapter_id",
                    hint="give the folder of adapter_config.json",
                ) from None
            except PermissionError:
                raise AdapterForbidden(
                    f"the server's credentials may not read {self.prefix}{place}",
                    field="adapter_id",
                    hint="give the server credentials that may read it",
                ) from None
            except Exception as error:  # a boundary: each store has exceptions of its own
                failure = error
            if attempt < self._attempts:
                pause(attempt, self._backoff_s)
        assert failure is not None, "there is at least one attempt"
        reason = first_line(failure)
        raise AdapterLoadFailed(f"{self.prefix}{place}: {reason}", hint="try again later")

    def _store(self) -> Any:
        """The file system of fsspec, made once. Raises AdapterLoadFailed without its package."""
        import fsspec

        with self._lock:
            if self._made is None:
                try:
                    self._made = fsspec.filesystem(
                        self.name, skip_instance_cache=True, use_listings_cache=False
                    )
                except ImportError:
                    raise AdapterLoadFailed(
                        f"{self.prefix} needs a package that is not installed",
                        hint=f"on the server: {self._package}",
                    ) from None
            return self._made


def _stamp(info: dict[str, Any]) -> str | None:
    return next((f"{key}={info[key]}" for key in _STAMPS if info.get(key)), None)
