"""One download: its limits, and the files that it writes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from engine.adapters.sources import Progress

CONFIG_BYTES = 8 << 20  # limit of adapter_config.json


class TooSlow(OSError):
    """The download takes longer than allowed."""


class Stopped(OSError):
    """Another part of the same download has failed."""


class Transfer:
    """One download: its deadline, its room on disk and its progress. Thread-safe."""

    def __init__(self, end_by: float, progress: Progress, make_room: Callable[[int], None]) -> None:
        """`end_by`: by time.monotonic()."""
        self.total = 0  # bytes
        self.end_by = end_by
        self._progress = progress
        self._make_room = make_room
        self._done = 0
        self._lock = threading.Lock()
        self._stopped = False

    def reserve(self, num_bytes: int) -> None:
        """Removes other entries until this download fits into the budget. Raises AdapterTooLarge."""
        self._make_room(num_bytes)
        self.total = num_bytes

    def wrote(self, count: int) -> None:
        """Counts bytes that were written. Raises TooSlow at the deadline, and Stopped."""
        if time.monotonic() > self.end_by:
            raise TooSlow(0, "the download took too long")
        if self._stopped:
            raise Stopped(0, "the download was stopped")
        with self._lock:
            self._done += count
            self._progress(self._done, self.total)

    def stop(self) -> None:
        """Ends the threads of this download at their next piece."""
        self._stopped = True


class NewFile:
    """A file that several threads may fill. A context manager; complete when it ends without an error."""

    def __init__(self, path: Path, size: int) -> None:
        """Reserves `size` bytes on disk. Raises OSError if the disk is full."""
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            if size:
                os.posix_fallocate(self.fd, 0, size)
        except BaseException:
            os.close(self.fd)
            raise

    def write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self.fd, view, offset)
            view, offset = view[count:], offset + count

    def truncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                os.fsync(self.fd)
        finally:
            os.close(self.fd)
