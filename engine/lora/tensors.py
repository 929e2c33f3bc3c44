"""Files of tensors: the header first, then any rows of any matrix.

Files are read with `pread` and never mapped. If a file shrinks during reading, because a trainer overwrites it with
the next checkpoint, `pread` gives an error; a mapping would kill the process (SIGBUS).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.errors import RENAME, RESAVE, AdapterIncompatible, AdapterLoadFailed
from engine.files import Changed, OpenFile
from engine.lora.weights import Matrix
from engine.names import shown
from engine.safetensors import read_header

MAX_REASON = 300  # characters of the reason why a header is invalid

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file."""

    dtype: str  # in the spelling of the file
    shape: tuple[int, ...]
    start: int = 0  # bytes from the start of the file


@dataclass(frozen=True, slots=True)
class _FileMatrix:
    """A matrix in a safetensors file."""

    file: SafetensorsFile
    start: int
    shape: tuple[int, int]
    dtype: torch.dtype

    def read(self, start: int, stop: int, out: memoryview) -> None:
        self.file.read_into(out, self.start + start * self.shape[1] * self.dtype.itemsize)


@contextmanager
def reading(file: OpenFile) -> Iterator[None]:
    """Turns errors of the disk into AdapterLoadFailed."""
    try:
        yield
    except Changed as error:
        raise AdapterLoadFailed(f"{file.name} {error.strerror}", hint=RENAME) from None
    except OSError as error:
        raise AdapterLoadFailed(f"cannot read {file.name}: {error.strerror}") from None


class SafetensorsFile:
    """The tensors of an open safetensors file."""

    def __init__(self, file: OpenFile) -> None:
        """Reads the header. Raises AdapterLoadFailed, or AdapterIncompatible if it is not safetensors."""
        self.file = file
        try:
            with reading(file):
                entries, data = read_header(file)
        except ValueError as error:
            why = shown(str(error), MAX_REASON)
            raise AdapterIncompatible(f"{file.name} is damaged: {why}", hint=RESAVE) from None
        self.infos = {
            name: TensorInfo(entry.dtype, entry.shape, data + entry.data_offsets[0])
            for name, entry in entries.items()
        }

    def rename(self, names: Mapping[str, str]) -> None:
        """`names`: new name -> name in the file. Tensors without a new name are dropped."""
        self.infos = {name: self.infos[key] for name, key in names.items()}

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from `offset` on. Raises AdapterLoadFailed if the file is too short or cannot be read."""
        with reading(self.file):
            self.file.read_into(buffer, offset)

    def matrix(self, name: str) -> Matrix:
        info = self.infos[name]
        rows, columns = info.shape
        return _FileMatrix(self, info.start, (rows, columns), DTYPES[info.dtype])

    def verify(self) -> None:
        """Raises AdapterLoadFailed if the file changed since it was opened."""
        with reading(self.file):
            self.file.verify()

    def close(self) -> None:
        self.file.close()
