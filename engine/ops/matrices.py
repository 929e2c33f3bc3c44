"""Writes matrices of an adapter's file into its image: rounds, checks for values that are not finite, transposes.

The compiled function writes a batch of pieces in one call without the GIL, so that several adapters are written in
parallel. Without it, the reference is used.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.ops.extension import cpu_function

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of a piece


class Piece(NamedTuple):
    """Rows of one matrix. Byte offsets are multiples of the elements' sizes."""

    source: int  # bytes from the start of the source
    rows: int
    columns: int
    element: int  # index into ELEMENTS
    target: int  # bytes from the start of the image to where the first element goes
    stride: int  # elements of the image from row to row; transposed: from column to column
    transposed: bool


def write_matrices(
    source: Tensor, image: Tensor, pieces: Sequence[Piece], dtype: torch.dtype
) -> int | None:
    """Writes the pieces of `source` [bytes] uint8 into `image` [bytes] uint8, in `dtype`: one of the first three.

    Returns the first piece with a value that is not finite in `dtype`, and then what was written is not defined.
    """
    function = cpu_function("lorax_cpu_write_matrices")
    if function is None:
        return reference(source, image, pieces, dtype)
    for piece in pieces:
        _check(source, image, piece, dtype)
    words = array("q", [word for piece in pieces for word in piece])
    at, _ = words.buffer_info()
    bad: int = function(source.data_ptr(), image.data_ptr(), at, len(pieces), ELEMENTS.index(dtype))
    return None if bad < 0 else bad


def _check(source: Tensor, image: Tensor, piece: Piece, dtype: torch.dtype) -> None:
    """Asserts the preconditions of the compiled function."""
    count = piece.rows * piece.columns
    long, short = piece.rows, piece.columns
    if piece.transposed:
        long, short = short, long
    assert count > 0 and piece.stride >= short
    assert piece.source >= 0
    assert piece.source + count * ELEMENTS[piece.element].itemsize <= source.numel()
    last = (long - 1) * piece.stride + short
    assert piece.target >= 0 and piece.target + last * dtype.itemsize <= image.numel()


def reference(
    source: Tensor, image: Tensor, pieces: Sequence[Piece], dtype: torch.dtype
) -> int | None:
    """The same in plain PyTorch."""
    values = image.view(dtype)
    for index, piece in enumerate(pieces):
        element, shape = ELEMENTS[piece.element], (piece.rows, piece.columns)
        end = piece.source + piece.rows * piece.columns * element.itemsize
        matrix = source[piece.source : end].view(element).view(shape).to(dtype)
        if not matrix.isfinite().all():
            return index
        strides = (1, piece.stride) if piece.transposed else (piece.stride, 1)
        first = values.storage_offset() + piece.target // dtype.itemsize
        values.as_strided(shape, strides, first).copy_(matrix)
    return None
