"""Checksums of downloaded files, as stores list them."""

from __future__ import annotations

import base64
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

_PIECE_BYTES = 1 << 20
_GIT = "git blob"


class _State(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Checksum:
    """What the contents of a file must give."""

    algorithm: str  # one of hashlib's, "git blob", "crc32", or with awscrt "crc32c" or "crc64nvme"
    digest: bytes
    parts: tuple[int, ...] = ()  # bytes; if given, the digest is that of the parts' digests

    def matches(self, fd: int, size: int) -> bool:
        """Whether an open file of `size` bytes has it. Raises OSError."""
        whole = _new(self.algorithm, size)
        if not self.parts:
            for piece in _pieces(fd, 0, size):
                whole.update(piece)
            return whole.digest() == self.digest
        start = 0
        for length in self.parts:
            part = _new(self.algorithm, length)
            for piece in _pieces(fd, start, start + length):
                part.update(piece)
            whole.update(part.digest())
            start += length
        return start == size and whole.digest() == self.digest


def listed(algorithm: str, text: object) -> Checksum | None:
    """A checksum as stores list it, in base64. None for any other text, and without the algorithm's package."""
    try:
        digest = base64.b64decode(text, validate=True)  # type: ignore[arg-type]
        size = len(_new(algorithm, 0).digest())
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    return Checksum(algorithm, digest) if len(digest) == size else None


class _Crc:
    """A cyclic redundancy check with the interface of hashlib."""

    def __init__(self, step: Callable[[bytes, int], int], size: int) -> None:
        self._step = step
        self._size = size  # of the digest
        self._value = 0

    def update(self, data: bytes) -> None:
        self._value = self._step(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._size, "big")


def _new(algorithm: str, size: int) -> _State:
    if algorithm == "crc32":
        return _Crc(zlib.crc32, 4)
    if algorithm in ("crc32c", "crc64nvme"):
        step = getattr(import_module("awscrt.checksums"), algorithm)
        return _Crc(step, 4 if algorithm == "crc32c" else 8)
    if algorithm == _GIT:
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return hashlib.new(algorithm, usedforsecurity=False)


def _pieces(fd: int, start: int, end: int) -> Iterator[bytes]:
    while start < end and (piece := os.pread(fd, min(_PIECE_BYTES, end - start), start)):
        yield piece
        start += len(piece)
