"""Files that strangers may have written: opened once, without waiting, and read through the descriptor alone.

A path says nothing for certain: between a look at it and an open another file, a link or a pipe may take its place. So
the descriptor is opened first and decides: it must be a regular file, and its real path must lie where the caller
allows. What is read afterwards is that file, whatever happens to its name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

DESCRIPTORS = Path("/proc/self/fd")
_PIECE_BYTES = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)
_FREE = "free disk space"
_ACCESS = "give the user that runs the server access to it"
_LINKS = "check that the file exists and where its links lead"
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_REMEDIES = {
    **dict.fromkeys(FULL, _FREE),
    **dict.fromkeys((errno.EACCES, errno.EPERM), _ACCESS),
    **dict.fromkeys(_LOST, _LINKS),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.EROFS: "mount the file system for writing, or use another folder",
}


class NotRegular(OSError):
    """It is a folder, a pipe, a socket or a device."""


class Outside(OSError):
    """Its real path lies outside every folder that the caller allows."""


class Changed(OSError):
    """It was written to, or became shorter, since it was opened."""


class Closable:
    """A context manager that closes itself."""

    __slots__ = ()

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class OpenFile(Closable):
    """A regular file, open for reading. A context manager; `close` may be called twice."""

    def __init__(self, path: Path, roots: Iterable[Path] | None = None) -> None:
        """Opens `path`, links followed. `roots`: real folders, in one of which the file must lie; None: anywhere.

        Raises NotRegular, Outside or another OSError, and never waits for a pipe's other end.
        """
        self.path = path
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            self.fd = os.open(path, flags)
        except ValueError as error:  # a null character
            raise OSError(0, str(error), str(path)) from None
        try:
            status = os.fstat(self.fd)
            if not stat.S_ISREG(status.st_mode):
                raise NotRegular(0, "not a regular file", str(path))
            self.size = status.st_size
            self.stamp = _stamp(status)
            if roots is not None and not _lies_in(self.fd, path, status, roots):
                raise Outside(0, "outside the folders that may be read", str(path))
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The last part of the path, for messages."""
        return self.path.name

    @property
    def fingerprint(self) -> str:
        """Changes whenever the file is written, or another takes its place."""
        return "{:x}.{:x}.{:x}".format(*self.stamp)

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fills `buffer` from `offset` on. Raises Changed if the file ends before, or another OSError."""
        view, done = memoryview(buffer), 0
        while done < len(view):
            count = os.preadv(self.fd, [view[done:]], offset + done)
            if not count:
                raise Changed(0, "became shorter while it was read", str(self.path))
            done += count

    def read(self) -> bytes:
        """The whole file as it was when it was opened. The caller has looked at `size`."""
        buffer = bytearray(self.size)
        self.read_into(buffer, 0)
        self.verify()
        return bytes(buffer)

    def sha256(self, pause: Callable[[], None] = lambda: None) -> bytes:
        """SHA-256 of the contents; `pause` is called between pieces and may raise."""
        state, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
        for start in range(0, self.size, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, self.size - start)]
            self.read_into(piece, start)
            state.update(piece)
            pause()
        self.verify()
        return state.digest()

    def verify(self) -> None:
        """Raises Changed if the file was written to since it was opened."""
        if _stamp(os.fstat(self.fd)) != self.stamp:
            raise Changed(0, "changed while it was read", str(self.path))

    def close(self) -> None:
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _lies_in(fd: int, path: Path, status: os.stat_result, roots: Iterable[Path]) -> bool:
    """Where the system does not say which path a descriptor has, the path is resolved anew: to the same file."""
    try:
        real = Path(os.readlink(DESCRIPTORS / str(fd)))
    except OSError:
        real = path.resolve()
        if not os.path.samestat(real.stat(), status):
            return False
    return any(real.is_relative_to(root) for root in roots)


def sync_folder(folder: Path) -> None:
    """Makes new names in the folder survive a power cut."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remedy(error: OSError) -> str:
    """What the operator can do about an error of a file system."""
    return _REMEDIES.get(error.errno or 0, "check the file system, then try again")


def is_local(error: OSError) -> bool:
    """Whether it is an error of this machine's file systems that another try will meet again, not of a network."""
    return error.errno in _REMEDIES and error.errno not in _LOST
