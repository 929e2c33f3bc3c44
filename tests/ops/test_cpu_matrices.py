"""Matrices into an image: the compiled function writes what the reference writes, and finds what it finds."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from engine.ops.matrices import ELEMENTS, Piece, reference, write_matrices

FILLING = 255


def pieces_of(count: int, dtype: torch.dtype) -> tuple[list[Piece], int, int]:
    """Matrices of random shapes side by side, with room behind rows; bytes of the source and of the image."""
    pieces, source, target = [], 0, 0
    for _ in range(count):
        rows, columns = random.choice([1, 3, 8, 16, 17, 40, 500]), random.choice([1, 5, 8, 16, 43])
        if random.random() < 0.3:
            rows, columns = columns, random.choice([4096, 9001])
        element, transposed = random.randrange(len(ELEMENTS)), random.random() < 0.6
        height, length = (columns, rows) if transposed else (rows, columns)
        stride = length + random.choice([0, 0, 1, 7])
        pieces.append(Piece(source, rows, columns, element, target, stride, transposed))
        source += (rows * columns * ELEMENTS[element].itemsize + 15) // 16 * 16
        target += (height * stride * dtype.itemsize + 15) // 16 * 16
    return pieces, source, target


def fill(pieces: list[Piece], size: int) -> Tensor:
    """Values of all magnitudes that every type holds, and the smallest of each."""
    source = torch.empty(size, dtype=torch.uint8)
    for piece in pieces:
        count, element = piece.rows * piece.columns, ELEMENTS[piece.element]
        values = torch.randn(count, dtype=torch.float64)
        values *= 10.0 ** torch.randint(-9, 4, (count,))
        end = piece.source + count * element.itemsize
        source[piece.source : end].view(element).copy_(values)
    return source


@pytest.mark.parametrize("dtype", ELEMENTS[:3])
def test_the_same_bytes_as_the_reference(isa: str, fresh: None, dtype: torch.dtype) -> None:
    pieces, source_bytes, image_bytes = pieces_of(60, dtype)
    source = fill(pieces, source_bytes)
    room = 64  # before the image, as an image's records are
    images = [torch.full((room + image_bytes,), FILLING, dtype=torch.uint8) for _ in range(2)]
    for write, image in zip((write_matrices, reference), images, strict=True):
        assert write(source, image[room:], pieces, dtype) is None
        assert (image[:room] == FILLING).all()
    assert torch.equal(*images)


@pytest.mark.parametrize("dtype", ELEMENTS[:3])
@pytest.mark.parametrize("element", range(len(ELEMENTS)))
def test_one_value_that_is_not_finite_is_found(
    isa: str, fresh: None, dtype: torch.dtype, element: int
) -> None:
    """Wherever it stands; a value that is finite in the file may not be so in the image."""
    pieces, source_bytes, image_bytes = pieces_of(20, dtype)
    pieces = [piece for piece in pieces if piece.element == element] or pieces[:1]
    kind = ELEMENTS[pieces[0].element]
    bad = [float("nan"), float("inf"), -float("inf")]
    if torch.tensor(torch.finfo(kind).max, dtype=kind).to(dtype).isinf():
        bad.append(-torch.finfo(kind).max)
    source, image = fill(pieces, source_bytes), torch.empty(image_bytes, dtype=torch.uint8)
    for value in bad:
        broken = source.clone()
        index = random.randrange(len(pieces))
        piece = pieces[index]
        end = piece.source + piece.rows * piece.columns * kind.itemsize
        values = broken[piece.source : end].view(kind)
        values[random.randrange(len(values))] = value
        found = [write(broken, image, pieces, dtype) for write in (write_matrices, reference)]
        assert found == [index, index]
