"""Files of tensors: the header first, then any rows of any matrix.

Files are never mapped, safetensors read with `pread`: a file that shrinks while it is read, as when a trainer writes
the next checkpoint over it, is an error here and would be the death of the process (SIGBUS) under a mapping.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from engine.errors import AdapterIncompatible, AdapterLoadFailed
from engine.lora.weights import Matrix, TensorMatrix

MAX_HEADER_BYTES = 16 << 20
RENAME = "write adapters under another name and rename them when complete"
RESAVE = "save the adapter again with PEFT's save_pretrained (safetensors)"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file."""

    dtype: str  # as the file spells it
    shape: tuple[int, ...]
    start: int = 0  # bytes from the start of the file


class TensorFile(Protocol):
    """An open file of tensors."""

    infos: dict[str, TensorInfo]

    def matrix(self, name: str) -> Matrix: ...

    def verify(self) -> None:
        """Raises AdapterLoadFailed if the file changed since it was opened."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _FileMatrix:
    """A matrix in a safetensors file."""

    file: SafetensorsFile
    start: int
    shape: tuple[int, int]
    dtype: torch.dtype

    def read(self, start: int, stop: int, out: memoryview) -> None:
        self.file.read_into(out, self.start + start * self.shape[1] * self.dtype.itemsize)


class SafetensorsFile:
    """The safetensors format: an 8-byte length, a JSON header, then the tensors' bytes."""

    def __init__(self, path: Path) -> None:
        """Raises AdapterLoadFailed if the file cannot be read, AdapterIncompatible if it is not safetensors."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise AdapterLoadFailed(f"cannot open {path.name}: {error.strerror}") from None
        try:
            self._stamp = _stamp(self._fd)
            self.infos = self._read_header()
        except BaseException:
            self.close()
            raise

    def _damaged(self, why: str) -> AdapterIncompatible:
        return AdapterIncompatible(f"{self.path.name} is damaged: {why}", hint=RESAVE)

    def _read_header(self) -> dict[str, TensorInfo]:
        size = self._stamp[0]
        if size < 8:
            raise self._damaged(f"it has {size} bytes")
        prefix = bytearray(8)
        self.read_into(prefix, 0)
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise self._damaged(f"its header is said to have {length} bytes")
        text = bytearray(length)
        self.read_into(text, 8)
        try:
            header = json.loads(bytes(text))
            "".join(header).encode()  # half a surrogate pair is no name
            header.pop("__metadata__", None)
            return {
                str(name): self._info(name, entry, 8 + length) for name, entry in header.items()
            }
        except (
            ArithmeticError,
            AttributeError,
            KeyError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise self._damaged(f"its header cannot be read ({error})") from None

    def _info(self, name: str, entry: dict[str, Any], data: int) -> TensorInfo:
        shape = tuple(int(size) for size in entry["shape"])
        first, last = (int(offset) for offset in entry["data_offsets"])
        dtype = str(entry["dtype"])
        if not 0 <= first <= last or data + last > self._stamp[0] or min(shape, default=0) < 0:
            raise ValueError(f"{name} lies outside the file")
        if dtype in DTYPES and last - first != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{name} has {last - first} bytes for the shape {list(shape)}")
        return TensorInfo(dtype, shape, data + first)

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fills `buffer` from `offset` on. Raises AdapterLoadFailed if the file ends or fails."""
        view, done = memoryview(buffer), 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise AdapterLoadFailed(f"cannot read {self.path.name}: {error.strerror}") from None
            if not count:
                raise AdapterLoadFailed(
                    f"{self.path.name} became shorter while it was read",
                    hint=RENAME,
                )
            done += count

    def matrix(self, name: str) -> Matrix:
        info = self.infos[name]
        rows, columns = info.shape
        return _FileMatrix(self, info.start, (rows, columns), DTYPES[info.dtype])

    def verify(self) -> None:
        if _stamp(self._fd) != self._stamp:
            raise _changed(self.path)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class PickleFile:
    """A `.bin` of torch.save, read whole: only tensors are unpickled, never code."""

    _SPELLING = {dtype: name for name, dtype in DTYPES.items()}

    def __init__(self, path: Path) -> None:
        """Raises AdapterIncompatible for a file that holds anything but tensors, or an old format."""
        self.path = path
        try:
            with path.open("rb") as file:
                stamp = _stamp(file.fileno())
                try:
                    loaded = self._loaded(file)
                finally:  # whatever came of it
                    if _stamp(file.fileno()) != stamp:
                        raise _changed(path)
        except OSError as error:
            raise AdapterLoadFailed(f"cannot read {path.name}: {error.strerror}") from None
        if not isinstance(loaded, dict) or not all(map(_is_plain, loaded.values())):
            raise AdapterIncompatible(f"{path.name} is not a dictionary of tensors", hint=RESAVE)
        self._tensors: dict[str, Tensor] = {str(name): value for name, value in loaded.items()}
        self.infos = {
            name: TensorInfo(self._SPELLING.get(value.dtype, str(value.dtype)), tuple(value.shape))
            for name, value in self._tensors.items()
        }

    def _loaded(self, file: BinaryIO) -> object:
        name = self.path.name
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, zipfile.BadZipFile):
            raise AdapterIncompatible(
                f"{name} holds more than tensors and is not unpickled", hint=RESAVE
            ) from None
        except Exception as error:  # a boundary: what is in the file may fail in any way
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            why = str(error).split("\n", 1)[0]
            raise AdapterIncompatible(f"{name} cannot be read: {why}", hint=RESAVE) from None

    def matrix(self, name: str) -> Matrix:
        return TensorMatrix(self._tensors[name])

    def verify(self) -> None:
        """Nothing to do: it was read when it was opened."""

    def close(self) -> None:
        self._tensors = {}


def _stamp(fd: int) -> tuple[int, int]:
    """What of a file changes when it is written to."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def _changed(path: Path) -> AdapterLoadFailed:
    return AdapterLoadFailed(
        f"{path.name} changed while it was read",
        hint=RENAME,
    )


def _is_plain(value: object) -> bool:
    """A tensor whose elements are there, one beside the other."""
    return (
        isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    )


def open_tensors(path: Path) -> TensorFile:
    """Opens a weight file by its suffix."""
    return PickleFile(path) if path.suffix == ".bin" else SafetensorsFile(path)
