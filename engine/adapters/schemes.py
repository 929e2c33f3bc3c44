"""Adapters of other stores through fsspec: `gs://`, `abfs://` and whatever else the operator names.

The package of the scheme reads with the server's own credentials. Its calls may block without a limit; the loader's
deadline ends their request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from engine.adapters.disk_cache import CONFIG_BYTES, DiskCache, NewFile, Transfer
from engine.adapters.ref import AdapterRef
from engine.adapters.remote import changed, first_line, pause, revision_of
from engine.adapters.sources import (
    CONFIG_NAME,
    WEIGHT_NAMES,
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
    "last_modified",
    "LastModified",
    "updated",
    "created",
)


class SchemeSource(Source):
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
        self.ttl_s = ttl_s
        self._package = str(known_implementations.get(scheme, {}).get("err", ""))
        self._cache = cache
        self._max_file_bytes = max_file_bytes
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._made: Any = None
        self._lock = threading.Lock()

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        place = ref.name.strip("/")
        files = self._find(place)
        weights = next(name for name in files if name != CONFIG_NAME)
        for name, limit in ((CONFIG_NAME, CONFIG_BYTES), (weights, self._max_file_bytes)):
            size = int(files[name]["size"])
            if limit is not None and size > limit:
                raise AdapterTooLarge(
                    f"{name} of {self.prefix}{place} has {size} bytes; the limit is {limit} bytes",
                    field="adapter_id",
                    hint=RESAVE if name == CONFIG_NAME else RAISE_LIMIT,
                )
        return Version(
            self.name,
            place,
            revision=_revision(files),
            weights=weights,
            num_bytes=int(files[weights]["size"]),
        )

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        def fill(folder: Path, transfer: Transfer) -> None:
            files = self._find(version.id)
            if _revision(files) == version.revision:
                transfer.reserve(sum(int(info["size"]) for info in files.values()))
                for name, info in files.items():
                    with NewFile(folder / name, int(info["size"])) as target:
                        self._download(version.id, name, int(info["size"]), target, transfer)
                files = self._find(version.id)
            if _revision(files) != version.revision:
                raise changed(f"{self.prefix}{version.id}")

        return self._cache.fetch(version, "", progress, fill)

    def _find(self, place: str) -> dict[str, dict[str, Any]]:
        """What the store says about the two files, the configuration first."""
        found: dict[str, dict[str, Any]] = {}
        for name in (CONFIG_NAME, *WEIGHT_NAMES):
            try:
                info = self._call(place, lambda name=name: self._info(place, name))  # type: ignore[misc]
            except AdapterNotFound:
                if name == CONFIG_NAME:
                    raise
                continue
            found[name] = info
            if name != CONFIG_NAME:
                break
        find_single_file(found, f"{self.prefix}{place}")
        return found

    def _info(self, place: str, name: str) -> dict[str, Any]:
        store = self._store()
        store.invalidate_cache()
        info: dict[str, Any] = store.info(f"{place}/{name}")
        size = info.get("size")
        if info.get("type") != "file" or not isinstance(size, int) or _stamp(info) is None:
            raise AdapterLoadFailed(
                f"{self.prefix}{place}/{name} has no size, or nothing that shows when it changed",
                hint="use a store that lists sizes and either etags or times",
            )
        return info

    def _download(
        self, place: str, name: str, size: int, target: NewFile, transfer: Transfer
    ) -> None:
        """Downloads one file, again after a transient failure of the store; those of our own disk are raised."""
        with self._call(place, lambda: self._store().open(f"{place}/{name}", "rb")) as file:
            at = 0
            while at <= size:
                piece = self._call(place, lambda: file.read(PIECE_BYTES))
                if not piece or at + len(piece) > size:
                    break
                target.write(piece, at)
                at += len(piece)
                transfer.wrote(len(piece))
        if piece or at != size:
            raise AdapterLoadFailed(
                f"{self.prefix}{place}/{name} does not have the size that was listed",
                hint="try again later",
            )

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


def _revision(files: dict[str, dict[str, Any]]) -> str:
    return revision_of((name, str(_stamp(info)), info["size"]) for name, info in files.items())
