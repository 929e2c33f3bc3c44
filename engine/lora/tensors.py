"""Files of tensors: the header first, then any rows of any matrix.

Safetensors are read with `pread` and never mapped: a file that shrinks while it is read, as when a trainer writes
the next checkpoint over it, is an error here and would be the death of the process (SIGBUS) under a mapping.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.errors import AdapterIncompatible, AdapterLoadFailed
from engine.lora.weights import Matrix, TensorMatrix

MAX_HEADER_BYTES = 16 << 20
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
            self._stamp = self._stat()
            self.infos = self._read_header()
        except BaseException:
            self.close()
            raise

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

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
            header.pop("__metadata__", None)
            return {
                str(name): self._info(name, entry, 8 + length) for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
                    hint="write adapters under another name and rename them when complete",
                )
            done += count

    def matrix(self, name: str) -> Matrix:
        info = self.infos[name]
        rows, columns = info.shape
        return _FileMatrix(self, info.start, (rows, columns), DTYPES[info.dtype])

    def verify(self) -> None:
        if self._stat() != self._stamp:
            raise AdapterLoadFailed(
                f"{self.path.name} changed while it was read",
                hint="write adapters under another name and rename them when complete",
            )

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class PickleFile:
    """A `.bin` of torch.save: only tensors are unpickled, never code, and they are mapped, not read."""

    _SPELLING = {dtype: name for name, dtype in DTYPES.items()}

    def __init__(self, path: Path) -> None:
        """Raises AdapterIncompatible for a file that holds anything but tensors, or an old format."""
        self.path = path
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError as error:
            raise AdapterLoadFailed(f"cannot open {path.name}: {error.strerror}") from None
        except (RuntimeError, ValueError, EOFError, KeyError, TypeError) as error:
            raise AdapterIncompatible(f"{path.name} cannot be read: {error}", hint=RESAVE) from None
        except (pickle.UnpicklingError, zipfile.BadZipFile):
            raise AdapterIncompatible(
                f"{path.name} holds more than tensors and is not unpickled", hint=RESAVE
            ) from None
        if not isinstance(loaded, dict) or not all(
            isinstance(value, Tensor) for value in loaded.values()
        ):
            raise AdapterIncompatible(f"{path.name} is not a dictionary of tensors", hint=RESAVE)
        self._tensors: dict[str, Tensor] = {str(name): value for name, value in loaded.items()}
        self.infos = {
            name: TensorInfo(self._SPELLING.get(value.dtype, str(value.dtype)), tuple(value.shape))
            for name, value in self._tensors.items()
        }

    def matrix(self, name: str) -> Matrix:
        return TensorMatrix(self._tensors[name])

    def verify(self) -> None:
        """Nothing to do: the mapping shows what it shows."""

    def close(self) -> None:
        self._tensors = {}


def open_tensors(path: Path) -> TensorFile:
    """Opens a weight file by its suffix."""
    return PickleFile(path) if path.suffix == ".bin" else SafetensorsFile(path)
