"""Writes matrices of an adapter's file into the data of an image: converted, transposed, padded and checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.errors import AdapterIncompatible
from engine.lora.weights import Matrix
from engine.ops.layout import padded, row_stride
from engine.ops.matrices import ELEMENTS, Piece, write_matrices

CHUNK_BYTES = 1 << 20  # largest piece that is read or converted at once


class Writer:
    """Writes matrices into the data of an image, in batches."""

    def __init__(self, data: Tensor, dtype: torch.dtype, pause: Callable[[], None]) -> None:
        """`data` [bytes] uint8."""
        self._data, self._dtype, self._pause = data, dtype, pause
        self._read = bytearray(CHUNK_BYTES)
        self._used = 0  # bytes of `_read`
        self._pieces: list[Piece] = []
        self._modules: list[str] = []  # module of each piece, for messages

    def straight(self, matrix: Matrix, offset: int, module: str) -> int:
        """Writes the rows of a matrix. Returns the offset after them."""
        rows, columns = matrix.shape
        return self._write(matrix, offset, (rows, columns), module, transposed=False)

    def transposed(self, matrix: Matrix, offset: int, module: str) -> int:
        """Writes the columns of a matrix as rows. Returns the offset after them."""
        rows, columns = matrix.shape
        return self._write(matrix, offset, (columns, rows), module, transposed=True)

    def _write(
        self,
        matrix: Matrix,
        offset: int,
        shape: tuple[int, int],
        module: str,
        transposed: bool,
    ) -> int:
        """`shape`: number of rows in the image and their length. Rows are padded with zeros."""
        size, stride = self._dtype.itemsize, row_stride(shape[1], self._dtype.itemsize)
        end = offset + shape[0] * stride * size
        if stride > shape[1]:
            values = self._data[offset:end].view(self._dtype).view(shape[0], stride)
            values[:, shape[1] :].zero_()
        rows, columns = matrix.shape
        element = ELEMENTS.index(matrix.dtype)
        num_bytes = columns * matrix.dtype.itemsize  # per row in the file
        done = 0
        while done < rows:
            count = min((len(self._read) - self._used) // num_bytes, rows - done)
            if not count:
                self._reserve(num_bytes)
                continue
            stop = self._used + count * num_bytes
            matrix.read(done, done + count, memoryview(self._read)[self._used : stop])
            target = offset + done * size * (1 if transposed else stride)
            piece = Piece(
                self._used,
                count,
                columns,
                element=element,
                target=target,
                stride=stride,
                transposed=transposed,
            )
            self._pieces.append(piece)
            self._modules.append(module)
            self._used = padded(stop)
            done += count
        return end

    def _reserve(self, num_bytes: int) -> None:
        """Writes the batch, so that `num_bytes` more can be read."""
        self.flush()
        if num_bytes > len(self._read):
            self._read = bytearray(num_bytes)

    def flush(self) -> None:
        """Writes the batch."""
        if not self._pieces:
            return
        source = torch.frombuffer(self._read, dtype=torch.uint8)
        bad = write_matrices(source, self._data, self._pieces, self._dtype)
        if bad is not None:
            module, dtype = self._modules[bad], str(self._dtype).removeprefix("torch.")
            raise AdapterIncompatible(
                f"{module} has values that are not finite in {dtype}",
                field=module,
                hint="check whether the training diverged, or serve with a wider --dtype",
            )
        self._pieces, self._modules, self._used = [], [], 0
        self._pause()
