"""Pickles of torch.save as safetensors: converted once in a sandbox, then stored on disk by content."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.errors import (
    RENAME,
    RESAVE,
    WAIT,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterTooLarge,
)
from engine.files import Changed, OpenFile, sync_folder
from engine.names import shown
from engine.safetensors import MAX_HEADER_BYTES, read_header
from engine.sandbox.call import Limits
from engine.sandbox.parent import POLL_S, CannotRun, Crashed, LimitReached, SandboxError, run
from engine.sandbox.tasks.convert import max_tensor_bytes

FOLDER = "lorax-converted"
TASK = "engine.sandbox.tasks.convert"
MAX_REASON = 300  # characters of a refusal
MAX_REFUSED = 512  # files whose refusal is remembered
_MEMORY_BYTES = 512 << 20  # beyond the file's own size, which is mapped
_CPU_S = 5
_BYTES_PER_S = 32 << 20  # of a slow disk and processor
_WALL_FACTOR = 10  # the child runs at low priority
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP}
_ZIP_END_BYTES = 22 + (1 << 16)  # the end of a zip's directory and the longest comment
_TEMPORARY = ".tmp"

logger = logging.getLogger(__name__)


class Converter:
    """Converts into a folder of `cache`, or into a private folder if that is not writable.

    Whoever limits the folder may remove files from it, the least recently used first: their time of access is that of
    the last use. Thread-safe. Refusals are remembered by the file's SHA-256; failures of the machine are not.
    """

    def __init__(
        self,
        cache: Path,
        max_bytes: int | None = None,
        *,
        folder: str = FOLDER,
        kept: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """`max_bytes`: larger files are refused before they are read. `kept` is called with the size of each file that
        was added to the folder."""
        self._max_bytes = max_bytes
        self._folder = cache / folder
        self._kept = kept
        self._private: Path | None = None
        self._refused: dict[bytes, str] = {}  # digest -> reason
        self._busy: set[bytes] = set()
        self._changed = threading.Condition()

    def readable(self, file: OpenFile, pause: Callable[[], None] = lambda: None) -> OpenFile:
        """`file` itself, or an open safetensors file with the same tensors if it is a `.bin`."""
        return self.convert(file, pause) if is_pickle(file) else file

    def convert(self, file: OpenFile, pause: Callable[[], None] = lambda: None) -> OpenFile:
        """The safetensors file, open: converted before, or now.

        `pause` is called repeatedly and may raise. Raises AdapterIncompatible for a file that cannot be served,
        AdapterLoadFailed for a failure of the disk or the machine, and AdapterTooLarge.
        """
        if self._max_bytes is not None and file.size > self._max_bytes:
            raise AdapterTooLarge(
                f"{file.name} has {file.size} bytes; the limit is {self._max_bytes}",
                hint="raise --host-cache-gb",
            )
        try:
            if _is_truncated(file):
                raise AdapterLoadFailed(f"{file.name} is incomplete: it ends early", hint=WAIT)
            digest = file.sha256(pause)
            with self._exclusive(digest, pause):
                if (refused := self._refused.get(digest)) is not None:
                    raise AdapterIncompatible(f"{file.name} {refused}", hint=RESAVE)
                return self._find(digest) or self._create_converted(file, digest, pause)
        except Changed as error:
            raise AdapterLoadFailed(f"{file.name} {error.strerror}", hint=RENAME) from None
        except OSError as error:
            raise AdapterLoadFailed(f"cannot convert {file.name}: {error.strerror}") from None

    def close(self) -> None:
        """Removes the private folder, if there is one."""
        with self._changed:
            private, self._private = self._private, None
        if private is not None:
            atexit.unregister(self.close)
            shutil.rmtree(private, ignore_errors=True)

    @contextlib.contextmanager
    def _exclusive(self, digest: bytes, pause: Callable[[], None]) -> Iterator[None]:
        """One thread at a time converts the same contents."""
        with self._changed:
            while digest in self._busy:
                self._changed.wait(POLL_S)
                pause()
            self._busy.add(digest)
        try:
            yield
        finally:
            with self._changed:
                self._busy.discard(digest)
                self._changed.notify_all()

    def _find(self, digest: bytes) -> OpenFile | None:
        """The file that was converted before, if it is complete."""
        for folder in filter(None, (self._private, self._folder)):
            try:
                file = OpenFile(folder / _name(digest), [folder.resolve()])
            except OSError:
                continue
            if _is_complete(file):
                _touch(file)
                return file
            file.close()
        return None

    def _create_converted(
        self, file: OpenFile, digest: bytes, pause: Callable[[], None]
    ) -> OpenFile:
        folder, path, fd = self._temporary()
        try:
            self._run(file, fd, digest, pause)
            os.fsync(fd)
            made = OpenFile(path, [folder.resolve()])
            with contextlib.ExitStack() as held:
                held.callback(made.close)
                if not _is_complete(made):
                    raise self._refuse(file, digest, "cannot be converted")
                _touch(made)
                os.rename(path, folder / _name(digest))
                sync_folder(folder)
                if folder == self._folder:
                    self._kept(made.size)  # it may remove this file too: it stays open
                held.pop_all()
            made.path = folder / _name(digest)
            return made
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            os.close(fd)

    def _run(self, file: OpenFile, target: int, digest: bytes, pause: Callable[[], None]) -> None:
        cpu_s = _CPU_S + file.size // _BYTES_PER_S
        limits = Limits(
            cpu_s=cpu_s,
            wall_s=_WALL_FACTOR * cpu_s,
            memory_bytes=file.size + _MEMORY_BYTES,
            file_bytes=max_tensor_bytes(file.size) + MAX_HEADER_BYTES + 8,
        )
        try:
            answer = run(TASK, {"source": file.fd, "target": target}, {}, limits, pause)
        except SandboxError as error:
            file.verify()  # a file that changes while it is read may fail in any way
            if _is_transient(error):
                raise AdapterLoadFailed(f"cannot convert {file.name}: {error}") from None
            if isinstance(error, LimitReached):
                raise self._refuse(file, digest, f"{error} to read") from None
            raise self._refuse(file, digest, f"cannot be read: {error}") from None
        file.verify()
        if "failed" in answer:
            raise AdapterLoadFailed(f"cannot convert {file.name}: {answer['failed']}")
        if "refused" in answer:
            raise self._refuse(file, digest, shown(str(answer["refused"]), MAX_REASON))

    def _refuse(self, file: OpenFile, digest: bytes, why: str) -> AdapterIncompatible:
        """Remembers and returns the error."""
        error = AdapterIncompatible(f"{file.name} {why}", hint=RESAVE)
        with self._changed:
            self._refused[digest] = why
            if len(self._refused) > MAX_REFUSED:
                del self._refused[next(iter(self._refused))]
        return error

    def _temporary(self) -> tuple[Path, Path, int]:
        """A writable folder, and a new file in it: path and descriptor, locked while it is in use."""
        if self._private is None:
            try:
                return self._folder, *_create(self._folder)
            except OSError as error:
                if error.errno not in _UNWRITABLE:
                    raise
                reason = error.strerror
            with self._changed:
                if self._private is None:
                    self._private = Path(tempfile.mkdtemp(prefix=f"{FOLDER}-"))
                    atexit.register(self.close)
                    logger.warning(
                        "%s cannot be written (%s): adapters saved as .bin are converted again after each start",
                        self._folder,
                        reason,
                    )
        return self._private, *_create(self._private)


def is_pickle(file: OpenFile) -> bool:
    """Whether the file is a pickle of torch.save, by its name."""
    return file.path.suffix == ".bin"


def _is_truncated(file: OpenFile) -> bool:
    """Whether the file is empty, or a zip without its directory, which torch.save writes last."""
    start = bytearray(min(file.size, 4))
    file.read_into(start, 0)
    if start and start != b"PK\x03\x04":
        return False
    end = bytearray(min(file.size, _ZIP_END_BYTES))
    file.read_into(end, file.size - len(end))
    found = end.rfind(b"PK\x05\x06")
    return found < 0 or found + 22 > len(end)


def _name(digest: bytes) -> str:
    return f"{digest.hex()}.safetensors"


def _is_transient(error: SandboxError) -> bool:
    """Whether another try may succeed. SIGBUS: a mapped file could not be read."""
    if isinstance(error, Crashed):
        return error.signal == signal.SIGBUS
    return isinstance(error, CannotRun) or (
        isinstance(error, LimitReached) and error.limit == "wall"
    )


def _is_complete(file: OpenFile) -> bool:
    try:
        entries, start = read_header(file)
    except (ValueError, OSError):
        return False
    return start + max((e.data_offsets[1] for e in entries.values()), default=0) == file.size


def _touch(file: OpenFile) -> None:
    """Notes the time of use. The time of the last change stays."""
    with contextlib.suppress(OSError):
        os.utime(file.fd, ns=(time.time_ns(), os.fstat(file.fd).st_mtime_ns))


def _create(folder: Path) -> tuple[Path, int]:
    """A new file, locked. Removes unfinished files of processes that have ended."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"*{_TEMPORARY}"):
        _remove_stale(path)
    while True:
        path = folder / f"{secrets.token_hex(8)}{_TEMPORARY}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # without locks, `_remove_stale` removes nothing
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # another process removed it between the two calls


def _remove_stale(path: Path) -> None:
    """Removes a file that no process has locked."""
    with contextlib.suppress(OSError), OpenFile(path) as file:
        fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
