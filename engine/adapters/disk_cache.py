"""Downloaded adapters on disk: one folder per version, at most `max_bytes` together, the least recently used go first.

A version is downloaded into a temporary folder that is renamed when it is complete, so an entry is never half written,
whenever the process is killed. Sizes are read from disk, and temporary folders without an owner are removed, so the
budget stays correct after a kill. Several processes may share the folder. Removing an entry harms no reader: adapters
are read through descriptors. A small file per name notes the version that it last meant, for use while its source is
away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.adapters.sources import CONFIG_NAME, AdapterFiles, Progress, Version, open_files
from engine.adapters.transfer import Stopped, TooSlow, Transfer
from engine.errors import AdapterError, AdapterLoadFailed, AdapterTooLarge
from engine.files import FULL, OpenFile, sync_folder

FOLDER = "lorax-downloads"
_TEMPORARY = ".tmp"
_NOTE = ".ref"
_FILES = "*.safetensors"
_LOCK = ".lock"
_RESCAN_S = 30.0  # the sizes on disk are read again after this time
_KEPT = 0.9  # part of the budget that stays when entries are removed, so that it happens rarely

logger = logging.getLogger(__name__)


Fill = Callable[[Path, Transfer], None]  # reserves room and writes the files into a folder


@dataclass(frozen=True, slots=True)
class Usage:
    """What lies on disk."""

    num_bytes: int = 0  # of entries, and of downloads in progress
    capacity: int = 0  # bytes; 0: no limit
    folders: frozenset[Path] = frozenset()  # of downloads
    num_entries: int = 0  # downloads, and other files that count


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    used: float  # time of the last use
    num_bytes: int


class DiskCache:
    """See the module. Thread-safe. Writes nothing before the first download."""

    def __init__(
        self,
        cache: Path,
        max_bytes: int = 0,
        max_seconds: float = 600.0,
        folder: str = FOLDER,
        files: str | None = None,
    ) -> None:
        """Entries lie in `folder` of `cache`. `max_bytes` 0: no limit. `max_seconds`: limit of one download. `files`:
        another folder of `cache`; its safetensors files count too, and are removed like entries."""
        self.folder = cache / folder
        self.num_removed = 0  # entries, to make room
        self._files = cache / files if files else None
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._used: int | None = None  # bytes on disk, as last read plus what was added since
        self._scanned = 0.0  # time.monotonic()
        self._busy: set[str] = set()
        self._changed = threading.Condition()

    def fetch(self, version: Version, where: str, progress: Progress, fill: Fill) -> AdapterFiles:
        """The files of a version, open: from disk, or after `fill` has downloaded them.

        `where`: what else the contents depend on, such as the endpoint. Concurrent calls download once. Raises
        AdapterError; `fill` may also raise OSError, TooSlow or Stopped.
        """
        end_by = time.monotonic() + self._max_seconds
        name = _name(version, where)
        with self._exclusive(name, end_by):
            if (files := self._open(name, version)) is not None:
                self._note(version, where, name)
                return files
            self._fill(name, version, end_by, progress, fill)
            files = self._open(name, version)
        if files is None:
            raise AdapterLoadFailed(
                f"{version.id} was removed from the download cache during loading", hint="try again"
            )
        self._note(version, where, name)
        return files

    def keep(self, version: Version, where: str, progress: Progress, fill: Fill) -> Path:
        """As `fetch`, for files of any names: the folder with what `fill` has written."""
        end_by = time.monotonic() + self._max_seconds
        name = _name(version, where)
        with self._exclusive(name, end_by):
            if not (self.folder / name).is_dir():
                self._fill(name, version, end_by, progress, fill)
        return self.folder / name

    def link(self, name: str, entry: Path) -> None:
        """Makes a link to an entry, or moves it there. Raises OSError."""
        with self._temporary() as folder:
            os.symlink(entry.name, folder / name)
            os.rename(folder / name, self.folder / name)

    def _fill(
        self, name: str, version: Version, end_by: float, progress: Progress, fill: Fill
    ) -> None:
        transfer = Transfer(end_by, progress, self._make_room)
        try:
            self._add(name, transfer, fill)
        except (TooSlow, Stopped) as error:
            raise AdapterLoadFailed(
                f"{version.id}: {error.strerror}",
                hint="raise --adapter-load-timeout-s, or try again later",
            ) from None
        except OSError as error:
            raise self._unwritable(error) from None

    def grew(self, num_bytes: int) -> None:
        """Counts a new file in the folder of `files`, and removes others if needed."""
        with self._changed:
            if self._used is not None:
                self._used += num_bytes
        with contextlib.suppress(OSError):  # the file is complete, so its request is served
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(0)

    def usage(self) -> Usage:
        """Reads the disk. Raises OSError."""
        entries, used = self._scan()
        folders = frozenset(one.path for one in entries if one.path.parent == self.folder)
        return Usage(used, self._max_bytes, folders, len(entries))

    def has(self, version: Version, where: str) -> bool:
        """Whether a version is on disk."""
        return (self.folder / _name(version, where)).is_dir()

    def recall(self, source: str, where: str, asked: str, salt: bytes = b"") -> Version | None:
        """The version on disk that a name meant when its files were last fetched; None if it is gone."""
        note = _read_note(self.folder / _note_name(source, where, asked, salt))
        if note is None or not (self.folder / note.entry).is_dir():
            return None
        return Version(
            source,
            note.id,
            revision=note.revision,
            weights=note.weights,
            salt=salt,
            asked=asked,
            unconfirmed=True,
        )

    def _note(self, version: Version, where: str, entry: str) -> None:
        """Notes what a name means, for `recall`."""
        path = self.folder / _note_name(version.source, where, version.asked, version.salt)
        note = _Note(entry, version.id, version.revision, version.weights)
        if not version.asked or _read_note(path) == note:
            return
        with contextlib.suppress(OSError), self._temporary() as folder:
            (folder / path.name).write_bytes(msgspec.json.encode(note))
            os.rename(folder / path.name, path)

    def _open(self, name: str, version: Version) -> AdapterFiles | None:
        folder = self.folder / name
        if not folder.is_dir():
            return None
        try:
            root = self.folder.resolve()
            files = open_files(
                folder / CONFIG_NAME, folder / version.weights, [root], version.revision
            )
        except AdapterError as error:  # removed a moment ago, or damaged
            logger.debug("%s: %s", folder, error)
            return None
        with contextlib.suppress(OSError):
            os.utime(folder)
        return files

    def _add(self, name: str, transfer: Transfer, fill: Fill) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._temporary() as folder:
            fill(folder, transfer)
            target = self.folder / name
            with contextlib.suppress(FileNotFoundError):  # a damaged entry
                _discard(target)
            try:
                os.rename(folder, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
                    raise
            sync_folder(self.folder)
        with self._changed:
            if self._used is not None:
                self._used += transfer.total

    @contextlib.contextmanager
    def _exclusive(self, name: str, end_by: float) -> Iterator[None]:
        """One thread at a time downloads the same version."""
        with self._changed:
            while name in self._busy:
                if not self._changed.wait(end_by - time.monotonic()):
                    raise AdapterLoadFailed("the download took too long", hint="try again later")
            self._busy.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._busy.discard(name)
                self._changed.notify_all()

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A new folder, locked while this process lives. It is removed unless it was renamed."""
        while True:
            path = self.folder / f"{secrets.token_hex(8)}{_TEMPORARY}"
            path.mkdir()
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process removed it
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_ours = path.is_dir()
            except BlockingIOError:
                is_ours = False
            except OSError:  # without locks, `_remove_stale` removes nothing
                is_ours = True
            if is_ours:
                break
            os.close(fd)  # another process removes it
        try:
            yield path
        finally:
            os.close(fd)
            shutil.rmtree(path, ignore_errors=True)

    def _make_room(self, num_bytes: int) -> None:
        """Removes stale temporaries, and entries until `num_bytes` more fit into the budget."""
        with self._changed:
            recent = time.monotonic() - self._scanned < _RESCAN_S
            fits = not self._max_bytes or (self._used or 0) + num_bytes <= self._max_bytes
            if self._used is not None and recent and fits:
                return
            if self._max_bytes and num_bytes > self._max_bytes:
                raise AdapterTooLarge(
                    f"the adapter has {num_bytes} bytes; the disk cache is limited to {self._max_bytes} bytes",
                    field="adapter_id",
                    hint="raise --adapter-disk-cache-gb",
                )
            with _locked(self.folder / _LOCK):
                entries, used = self._scan()
                if self._max_bytes and used + num_bytes > self._max_bytes:
                    goal = max(0, int(self._max_bytes * _KEPT) - num_bytes)
                    for entry in sorted(entries, key=lambda one: one.used):
                        if used <= goal:
                            break
                        with contextlib.suppress(OSError):
                            _discard(entry.path)
                            used -= entry.num_bytes
                            self.num_removed += 1
            self._used, self._scanned = used, time.monotonic()

    def _scan(self) -> tuple[list[_Entry], int]:
        """The complete entries, and the bytes of these and of downloads in progress."""
        entries, used = [], 0
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            with contextlib.suppress(OSError):  # another process removes it
                if path.name == _LOCK or (path.suffix == _TEMPORARY and _remove_stale(path)):
                    continue
                if path.suffix == _NOTE:
                    note = _read_note(path)
                    if note is None or not (self.folder / note.entry).is_dir():
                        path.unlink()
                    continue
                num_bytes = sum(file.stat().st_size for file in path.iterdir())
                used += num_bytes
                if path.suffix != _TEMPORARY:
                    entries.append(_Entry(path, path.stat().st_mtime, num_bytes))
        for path in self._files.glob(_FILES) if self._files else ():
            with contextlib.suppress(OSError):
                status = path.stat()
                used += status.st_size
                entries.append(_Entry(path, status.st_atime, status.st_size))
        return entries, used

    def _unwritable(self, error: OSError) -> AdapterLoadFailed:
        if error.errno in FULL:
            return AdapterLoadFailed(
                "the disk of the download cache is full",
                hint="free disk space, or lower --adapter-disk-cache-gb",
            )
        return AdapterLoadFailed(
            f"cannot write the download cache: {error.strerror or error}",
            hint="set --huggingface-hub-cache to a folder that can be written",
        )


class _Note(msgspec.Struct, frozen=True):
    """What a name meant."""

    entry: str  # the folder
    id: str
    revision: str
    weights: str


def _read_note(path: Path) -> _Note | None:
    try:
        with OpenFile(path) as file:
            return msgspec.json.decode(file.read(), type=_Note)
    except (OSError, ValueError):
        return None


def _name(version: Version, where: str) -> str:
    parts = (version.source, where, version.id, version.revision, version.weights)
    return _digest(*parts, salt=version.salt)


def _note_name(source: str, where: str, asked: str, salt: bytes) -> str:
    return _digest(source, where, asked, salt=salt) + _NOTE


def _digest(*parts: str, salt: bytes) -> str:
    parts_of_bytes = [part.encode("utf-8", "surrogateescape") for part in parts]
    joined = b"".join(len(part).to_bytes(4, "big") + part for part in parts_of_bytes)
    return hashlib.sha256(joined + salt).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. Where the file system has no locks, the processes may remove a little more."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _discard(path: Path) -> None:
    """Removes a file, or a folder: under another name first, so that it is never seen half removed."""
    if not path.is_dir():
        path.unlink()
        return
    trash = path.with_name(f"{secrets.token_hex(8)}{_TEMPORARY}")
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def remove_stale(folder: Path) -> None:
    """Removes the temporary folders that killed processes left in a cache's `folder`."""
    for path in folder.glob(f"*{_TEMPORARY}"):
        _remove_stale(path)


def _remove_stale(path: Path) -> bool:
    """Removes a temporary folder that no process has locked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
