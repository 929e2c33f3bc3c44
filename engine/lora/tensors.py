"""Files of tensors: the header first, then any rows of any matrix.

Files are read with `pread` and never mapped. If a file shrinks during reading, because a trainer overwrites it with
the next checkpoint, `pread` gives an error; a mapping would kill the process (SIGBUS).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.errors import RENAME, RESAVE, WAIT, AdapterIncompatible, AdapterLoadFailed
from engine.files import Changed, OpenFile, remedy
from engine.lora.weights import Matrix
from engine.names import shown
from engine.safetensors import Incomplete, read_header, read_index

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
    start: int  # bytes from the start of the file
    file: OpenFile


@dataclass(frozen=True, slots=True)
class _FileMatrix:
    """A matrix in a safetensors file."""

    file: OpenFile
    start: int
    shape: tuple[int, int]
    dtype: torch.dtype

    def read(self, start: int, stop: int, out: memoryview) -> None:
        with reading(self.file):
            self.file.read_into(out, self.start + start * self.shape[1] * self.dtype.itemsize)


@contextmanager
def reading(file: OpenFile) -> Iterator[None]:
    """Turns errors of the disk into AdapterLoadFailed."""
    try:
        yield
    except Changed as error:
        raise AdapterLoadFailed(f"{file.name} {error.strerror}", hint=RENAME) from None
    except OSError as error:
        raise AdapterLoadFailed(
            f"cannot read {file.name}: {error.strerror}", hint=remedy(error)
        ) from None


@contextmanager
def _parsing(file: OpenFile) -> Iterator[None]:
    """Turns errors of the disk and of the format into AdapterError."""
    try:
        with reading(file):
            yield
    except Incomplete as error:
        why = shown(str(error), MAX_REASON)
        raise AdapterLoadFailed(f"{file.name} is incomplete: {why}", hint=WAIT) from None
    except ValueError as error:
        why = shown(str(error), MAX_REASON)
        raise AdapterIncompatible(f"{file.name} is damaged: {why}", hint=RESAVE) from None


class SafetensorsFile:
    """The tensors of an open safetensors file; of several, if it is the index of a sharded one."""

    def __init__(self, file: OpenFile, shards: Sequence[OpenFile] = ()) -> None:
        """Reads the headers. `shards`: the files that an index names.

        Raises AdapterLoadFailed, or AdapterIncompatible if a file is not safetensors.
        """
        self.files = (file, *shards)
        self.infos: dict[str, TensorInfo] = {}
        for one in shards or (file,):
            with _parsing(one):
                entries, data = read_header(one)
            for name, entry in entries.items():
                if name in self.infos:
                    raise AdapterIncompatible(
                        f"two files have the tensor {shown(name)}", hint=RESAVE
                    )
                self.infos[name] = TensorInfo(
                    entry.dtype, entry.shape, data + entry.data_offsets[0], one
                )
        if shards:
            self._check_index(file)

    def _check_index(self, index: OpenFile) -> None:
        with _parsing(index):
            listed = read_index(index)
        for name, shard in listed.items():
            info = self.infos.get(name)
            if info is None or info.file.name != shard:
                raise AdapterIncompatible(
                    f"{shown(shard)} lacks the tensor {shown(name)} that {index.name} lists",
                    hint=RESAVE,
                )

    def rename(self, names: Mapping[str, str]) -> None:
        """`names`: new name -> name in the file. Tensors without a new name are dropped."""
        self.infos = {name: self.infos[key] for name, key in names.items()}

    def matrix(self, name: str) -> Matrix:
        info = self.infos[name]
        rows, columns = info.shape
        return _FileMatrix(info.file, info.start, (rows, columns), DTYPES[info.dtype])

    def vector(self, name: str) -> Matrix:
        """A tensor [N] as a matrix [1, N]."""
        info = self.infos[name]
        (size,) = info.shape
        return _FileMatrix(info.file, info.start, (1, size), DTYPES[info.dtype])

    def verify(self) -> None:
        """Raises AdapterLoadFailed if a file changed since it was opened."""
        for file in self.files:
            with reading(file):
                file.verify()

    def close(self) -> None:
        for file in self.files:
            file.close()
