"""Where adapters come from: a reference and a token in, open files out.

A source works in two steps. Both block and run in threads. `resolve` finds the exact version that a reference means
and whether the caller may see it; it is called again when `ttl_s` has passed. `fetch` opens that version's two files.
A new source (an object store) is one class that derives from `Source` and one line in `registry.make_sources`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.adapters.ref import AdapterRef
from engine.errors import (
    RENAME,
    AdapterError,
    AdapterForbidden,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
)
from engine.files import Closable, NotRegular, OpenFile, Outside

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")  # the preferred one first

Progress = Callable[[int, int], None]  # bytes done, total bytes (0: unknown)

_SAVE_WITH_PEFT = "save the adapter with PEFT's save_pretrained"


@dataclass(frozen=True, slots=True)
class Version:
    """One exact version of an adapter that the caller may see."""

    source: str  # name of the source
    id: str  # of the repository, or the folder's real path
    revision: str  # commit, or a fingerprint of the files
    weights: str  # name of the weight file
    cache: str = ""  # folder of downloads that it belongs to
    salt: bytes = b""  # the tenant's cache salt; empty for public adapters
    num_bytes: int | None = None  # size of the weight file according to the source


@dataclass(frozen=True, slots=True)
class AdapterFiles(Closable):
    """An adapter on disk, its two files open. A context manager; `close` may be called twice."""

    folder: Path
    config: OpenFile
    weights: OpenFile
    revision: str  # commit, or a fingerprint of the files

    def close(self) -> None:
        self.config.close()
        self.weights.close()


class Source(Protocol):
    """See the module. Implementations derive from it for the defaults."""

    name: str  # in `adapter_source`, in answers and in metrics
    prefix: str = ""  # ids that start with it belong to this source; it is removed before `resolve`
    selectable: bool = True  # a request may name it as `adapter_source`
    searched: bool = False  # adapters whose request names no source are looked up here
    ttl_s: float = 60.0  # seconds until `resolve` is called again for the same reference and tenant

    def names(self) -> list[str]:
        """Adapters that /adapters lists before their first request."""
        return []

    def tenant(self, token: str | None) -> bytes:
        """A digest of the token. `resolve` gives equal answers to tenants with equal digests."""
        return b""

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        """Raises AdapterNotFound, AdapterForbidden, AdapterIncompatible or AdapterLoadFailed."""
        ...

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        """The files, open; the caller closes them. Raises as `resolve`."""
        ...


def token_hash(token: str) -> bytes:
    """The digest that stands for a token in keys and salts. The token itself is not stored."""
    return hashlib.blake2b(token.encode(), digest_size=16).digest()


def find_weights(names: Iterable[str], where: str) -> str:
    """The weight file among `names`. Raises AdapterIncompatible if these are not the files of a PEFT adapter."""
    present = set(names)
    if CONFIG_NAME not in present:
        raise AdapterIncompatible(
            f"{where} has no {CONFIG_NAME}",
            field=CONFIG_NAME,
            hint=_SAVE_WITH_PEFT,
        )
    for name in WEIGHT_NAMES:
        if name in present:
            return name
    raise AdapterIncompatible(
        f"{where} has neither {' nor '.join(WEIGHT_NAMES)}",
        field=WEIGHT_NAMES[0],
        hint=_SAVE_WITH_PEFT,
    )


def open_folder(folder: Path) -> AdapterFiles:
    """The files of a folder anywhere on disk, symbolic links followed. Raises as `open_files`."""
    return open_files(folder / CONFIG_NAME, folder / _weights_in(folder))


def _weights_in(folder: Path) -> str:
    try:
        return find_weights(os.listdir(folder), str(folder))
    except OSError as error:
        raise AdapterLoadFailed(f"cannot read {folder}: {error.strerror}") from None


class LocalSource(Source):
    """Folders below the roots that the operator named. The check applies to the real path, links followed."""

    name = "local"
    searched = True
    ttl_s = 1.0

    def __init__(self, roots: Iterable[str | Path]) -> None:
        self.roots = tuple(Path(root).expanduser().resolve() for root in roots)

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        folder = self._folder(ref)
        weights = _weights_in(folder)
        with self._open(folder, weights) as files:
            return Version(self.name, str(folder), files.revision, weights)

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        files = self._open(Path(version.id), version.weights)
        if files.revision == version.revision:
            return files
        files.close()
        raise AdapterLoadFailed(f"{files.folder} changed during loading", hint=RENAME)

    def _open(self, folder: Path, weights: str) -> AdapterFiles:
        try:
            return open_files(folder / CONFIG_NAME, folder / weights, self.roots)
        except AdapterForbidden as error:
            raise self._forbidden(error.field or weights) from None

    def _folder(self, ref: AdapterRef) -> Path:
        """The real folder. A path outside the roots is forbidden, whether it exists or not."""
        names = [ref.name, ref.id] if ref.revision else [ref.id]  # a folder's name may contain @
        seen_outside = False
        for name in names:
            for root in self.roots:
                try:
                    folder = (root / Path(name).expanduser()).resolve()
                    exists = folder.is_dir()
                except (OSError, RuntimeError):  # a loop of links, a name too long
                    continue
                if not self._allowed(folder):
                    seen_outside = True
                elif exists:
                    if name != ref.name:
                        raise AdapterNotFound(
                            f"{ref.id} is a local folder; it has no revision {ref.revision!r}",
                            field="adapter_id",
                            hint="leave the revision out",
                        )
                    return folder
        if seen_outside:
            raise self._forbidden(ref.name)
        raise AdapterNotFound(
            f"there is no folder {ref.name} in {self.described}",
            field="adapter_id",
            hint="give the folder's path below an --adapter-root, or start the server with another --adapter-root",
        )

    @property
    def described(self) -> str:
        """The roots, for messages."""
        return ", ".join(map(str, self.roots)) or "any --adapter-root (none is set)"

    def _allowed(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self.roots)

    def _forbidden(self, name: str) -> AdapterError:
        return AdapterForbidden(
            f"{name} is outside every --adapter-root ({self.described})",
            field="adapter_id",
            hint="start the server with --adapter-root for its folder",
        )


class DemoSource(LocalSource):
    """The adapters that come with the demo model. They are found by their plain names only."""

    name = "demo"
    selectable = False
    ttl_s = 3600.0

    def __init__(self, folder: Path) -> None:
        super().__init__([folder])

    def names(self) -> list[str]:
        """See `Source.names`."""
        return sorted(path.parent.name for path in self.roots[0].glob(f"*/{CONFIG_NAME}"))

    def _folder(self, ref: AdapterRef) -> Path:
        known = self.names()
        if ref.name in known:
            return self.roots[0] / ref.name
        raise AdapterNotFound(
            f"the demo has no adapter {ref.name!r}",
            field="adapter_id",
            hint=f"it has {', '.join(known)}" if known else "its adapters are not installed",
        )


def open_files(
    config: Path,
    weights: Path,
    roots: Iterable[Path] | None = None,
    revision: str | None = None,
) -> AdapterFiles:
    """Opens an adapter's two files. Their real paths must lie in `roots` (None: anywhere).

    `revision`: None uses the files' fingerprints. Raises AdapterForbidden (`field`: the path),
    AdapterIncompatible or AdapterLoadFailed.
    """
    roots = None if roots is None else tuple(roots)
    opened = _open(config, roots)
    try:
        other = _open(weights, roots)
    except BaseException:
        opened.close()
        raise
    made_of = f"{opened.fingerprint}-{other.fingerprint}"
    return AdapterFiles(config.parent, opened, other, revision or made_of)


def _open(path: Path, roots: tuple[Path, ...] | None) -> OpenFile:
    try:
        return OpenFile(path, roots)
    except NotRegular:
        raise AdapterIncompatible(f"{path} is not a regular file", field=path.name) from None
    except Outside:
        raise AdapterForbidden(
            f"{path} leads out of the adapter folders", field=str(path)
        ) from None
    except OSError as error:
        raise AdapterLoadFailed(f"cannot read {path}: {error.strerror}") from None
