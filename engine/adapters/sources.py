"""Where adapters come from: a reference and a token in, open files out.

A source works in two steps. Both block and run in threads. `resolve` finds the exact version that a reference means
and whether the caller may see it; it is called again when `ttl_s` has passed. `fetch` opens that version's files.
A new source (an object store) is one class that derives from `Source` and one line in `registry.make_sources`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from engine.adapters.ref import AdapterRef
from engine.adapters.text_files import TEXT_FILES, check_size
from engine.errors import (
    RENAME,
    RESAVE,
    AdapterError,
    AdapterForbidden,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
)
from engine.files import Closable, NotRegular, OpenFile, Outside, remedy
from engine.names import MAX_SHOWN, shown
from engine.safetensors import read_index

CONFIG_NAME = "adapter_config.json"
INDEX_NAME = "adapter_model.safetensors.index.json"
WEIGHT_NAMES = (
    "adapter_model.safetensors",
    INDEX_NAME,
    "adapter_model.bin",
)  # the preferred one first
# Where Ludwig puts the files: below the folder of a training run, and below that of LudwigModel.save.
LUDWIG = ("model/model_weights/", "model_weights/")
FOLDERS = ("", *LUDWIG)

Progress = Callable[[int, int], None]  # bytes done, total bytes (0: unknown)

_SAVE_WITH_PEFT = "save the adapter with PEFT's save_pretrained"
_FULL_MODEL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_POINTER = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"
_BLANK = b" \t\r\n\xef\xbb\xbf"  # white space and the mark of UTF-8
_MAX_START_BYTES = 256
_NOT_PULLED = (
    "a Git LFS pointer, not the file itself",
    "run `git lfs pull` in the adapter's folder",
)
_WEB_PAGE = (
    "a web page, not the file itself",
    "download it again from the link to the file itself, logged in if it is private",
)
_TORCH_SAVE = ("a zip file of torch.save, not safetensors", f"rename it to {WEIGHT_NAMES[-1]}")


@dataclass(frozen=True, slots=True)
class Version:
    """One exact version of an adapter that the caller may see."""

    source: str  # name of the source
    id: str  # of the repository, or the folder's real path
    revision: str  # commit, or a fingerprint of the files
    weights: str  # path of the weight file, or of its index, below the folder
    cache: str = ""  # folder of downloads that it belongs to
    salt: bytes = b""  # the tenant's cache salt; empty for public adapters
    num_bytes: int | None = None  # size of the weights according to the source
    texts: tuple[str, ...] = field(default=(), compare=False)  # paths of TEXT_FILES, for `fetch`
    asked: str = field(default="", compare=False)  # the name that was resolved
    unconfirmed: bool = field(default=False, compare=False)  # its source did not answer


@dataclass(frozen=True, slots=True)
class AdapterFiles(Closable):
    """An adapter on disk, its files open. A context manager; `close` may be called twice."""

    folder: Path
    config: OpenFile
    weights: OpenFile  # the only weight file, or the index of several
    revision: str  # commit, or a fingerprint of the files
    shards: tuple[OpenFile, ...] = ()  # the files that the index names
    texts: tuple[OpenFile, ...] = ()  # those of TEXT_FILES that exist

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self._all)

    def close(self) -> None:
        for file in self._all:
            file.close()

    @property
    def _all(self) -> tuple[OpenFile, ...]:
        return (self.config, self.weights, *self.shards, *self.texts)


class Source(Protocol):
    """See the module. Implementations derive from it for the defaults."""

    name: str  # in `adapter_source`, in answers and in metrics
    prefix: str = ""  # ids that start with it belong to this source; it is removed before `resolve`
    selectable: bool = True  # a request may name it as `adapter_source`
    searched: bool = False  # adapters whose request names no source are looked up here
    downloads: bool = True  # `fetch` keeps copies on this machine
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
    """The weight file among `names`, or the index of several: a path below the adapter's folder.

    Raises AdapterIncompatible if these are not the files of a PEFT adapter.
    """
    present = set(names)
    for folder in FOLDERS:
        if folder + CONFIG_NAME in present:
            for name in WEIGHT_NAMES:
                if folder + name in present:
                    return folder + name
    raise _not_an_adapter(present, where)


def _not_an_adapter(present: set[str], where: str) -> AdapterIncompatible:
    """What the files are instead, and the remedy."""
    field, what, hint = CONFIG_NAME, f"has no {CONFIG_NAME}", _SAVE_WITH_PEFT
    nested = sorted(name for name in present if name.endswith(f"/{CONFIG_NAME}"))
    if "adapters.safetensors" in present:
        field, what = "adapters.safetensors", "is an mlx-lm adapter"
        hint = "merge it into the base model with mlx_lm.fuse and serve the result with --model-id"
    elif not present.isdisjoint(folder + CONFIG_NAME for folder in FOLDERS):
        field, what = (
            WEIGHT_NAMES[0],
            f"has neither {', '.join(WEIGHT_NAMES[:-1])} nor {WEIGHT_NAMES[-1]}",
        )
    elif not present.isdisjoint(folder + name for folder in FOLDERS for name in _FULL_MODEL):
        what, hint = (
            "is a whole model, not an adapter",
            "serve it as the base model, with --model-id",
        )
    elif nested:
        what += " of its own"
        hint = f"request the adapter in {shown(nested[0].removesuffix('/' + CONFIG_NAME))}, from an --adapter-root"
    return AdapterIncompatible(f"{where} {what}", field=field, hint=hint)


def config_of(weights: str) -> str:
    """The configuration next to a weight file; both are paths below the adapter's folder."""
    return str(PurePosixPath(weights).with_name(CONFIG_NAME))


def shard_names(index: OpenFile) -> list[str]:
    """The files that an index names, all in its own folder. Raises AdapterIncompatible or AdapterLoadFailed."""
    try:
        return sorted(set(read_index(index).values()))
    except ValueError as error:
        raise damaged(index.name, str(error)) from None
    except OSError as error:
        raise _unreadable(index.name, error) from None


def damaged(index: str, why: str) -> AdapterIncompatible:
    """The error for an index that cannot be used."""
    return AdapterIncompatible(
        f"{index} is damaged: {shown(why, MAX_SHOWN * 2)}", field=INDEX_NAME, hint=RESAVE
    )


def list_files(folder: Path) -> list[str]:
    """Names of the files in a folder, those of Ludwig's layouts included. Raises OSError."""
    names = os.listdir(folder)
    if CONFIG_NAME not in names:
        for below in LUDWIG:
            with suppress(OSError):
                names += [below + name for name in os.listdir(folder / below)]
    return names


def open_folder(folder: Path) -> AdapterFiles:
    """The files of a folder anywhere on disk, symbolic links followed. Raises as `open_files`."""
    weights = _weights_in(folder, folder.name)
    return open_files(folder / config_of(weights), folder / weights)


def _weights_in(folder: Path, where: str) -> str:
    try:
        return find_weights(list_files(folder), where)
    except OSError as error:
        raise _unreadable(f"the folder {where}", error) from None


class LocalSource(Source):
    """Folders below the roots that the operator named. The check applies to the real path, links followed."""

    name = "local"
    searched = True
    downloads = False
    ttl_s = 1.0

    def __init__(self, roots: Iterable[str | Path]) -> None:
        self.roots = tuple(Path(root).expanduser().resolve() for root in roots)

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        folder = self._folder(ref)
        weights = _weights_in(folder, self._below(folder))
        with self._open(folder, weights) as files:
            return Version(self.name, str(folder), files.revision, weights)

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        files = self._open(Path(version.id), version.weights)
        if files.revision == version.revision:
            return files
        files.close()
        name = self._below(Path(version.id))
        raise AdapterLoadFailed(f"{name} changed during loading", hint=RENAME)

    def _open(self, folder: Path, weights: str) -> AdapterFiles:
        try:
            return open_files(folder / config_of(weights), folder / weights, self.roots)
        except AdapterForbidden as error:
            raise self._forbidden(f"{self._below(folder)}/{error.field or weights}") from None

    def _below(self, folder: Path) -> str:
        """A real folder's path below its root, for messages: clients need not know the rest."""
        roots = [root for root in self.roots if folder.is_relative_to(root)]
        return str(folder.relative_to(roots[0])) if roots else folder.name

    def _folder(self, ref: AdapterRef) -> Path:
        """The real folder. A path outside the roots is forbidden, whether it exists or not."""
        names = [ref.name, ref.id] if ref.revision else [ref.id]  # a folder's name may contain @
        seen_outside = False
        for name in names:
            for root in self.roots:
                try:
                    folder = (root / name).resolve()  # ~ is a name like any other
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
            f"there is no folder {ref.name} below an --adapter-root",
            field="adapter_id",
            hint="give the folder's path below an --adapter-root, or start the server with another --adapter-root",
        )

    def _allowed(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self.roots)

    def _forbidden(self, name: str) -> AdapterError:
        return AdapterForbidden(
            f"{name} is outside every --adapter-root",
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
    """Opens an adapter's files: configuration, weights, the shards if `weights` is an index, and those of TEXT_FILES.

    Their real paths must lie in `roots` (None: anywhere). `revision`: None uses the files' fingerprints. Raises
    AdapterForbidden (`field`: the file's name), AdapterIncompatible, AdapterTooLarge or AdapterLoadFailed.
    """
    roots = None if roots is None else tuple(roots)
    with ExitStack() as stack:
        opened = [stack.enter_context(_open(path, roots)) for path in (config, weights)]
        names = shard_names(opened[1]) if weights.name == INDEX_NAME else []
        shards = [stack.enter_context(_open(weights.with_name(name), roots)) for name in names]
        paths = filter(Path.exists, map(config.with_name, TEXT_FILES))
        texts = [stack.enter_context(_open(path, roots)) for path in paths]
        for file in texts:
            check_size(file.name, file.size)
        stack.pop_all()
    made_of = "-".join(file.fingerprint for file in (*opened, *shards, *texts))
    if shards or texts:
        made_of = hashlib.sha256(made_of.encode()).hexdigest()
    return AdapterFiles(
        config.parent, opened[0], opened[1], revision or made_of, tuple(shards), tuple(texts)
    )


def _open(path: Path, roots: tuple[Path, ...] | None) -> OpenFile:
    try:
        file = OpenFile(path, roots)
    except NotRegular:
        raise AdapterIncompatible(
            f"{path.name} is not a regular file",
            field=path.name,
            hint="put the file itself in its place",
        ) from None
    except Outside:
        raise AdapterForbidden(
            f"{path.name} leads out of the adapter folders",
            field=path.name,
            hint="put the file itself in its place",
        ) from None
    except OSError as error:
        raise _unreadable(path.name, error) from None
    with ExitStack() as stack:
        stack.callback(file.close)
        what, hint = _mistaken(file)
        if what:
            raise AdapterIncompatible(f"{path.name} is {what}", field=path.name, hint=hint)
        stack.pop_all()
    return file


def _unreadable(name: str, error: OSError) -> AdapterLoadFailed:
    return AdapterLoadFailed(f"cannot read {name}: {error.strerror}", hint=remedy(error))


def _mistaken(file: OpenFile) -> tuple[str, str]:
    """What was saved under the name instead, and the remedy; empty texts if nothing is known to be wrong."""
    start = bytearray(min(file.size, _MAX_START_BYTES))
    with suppress(OSError):  # it is read again
        file.read_into(start, 0)
    if start.startswith(_POINTER):
        return _NOT_PULLED
    if b"\0" not in start and start.lstrip(_BLANK).startswith(b"<"):  # lengths have zeros
        return _WEB_PAGE
    if start.startswith(_ZIP) and file.name.endswith(".safetensors"):
        return _TORCH_SAVE
    return "", ""
