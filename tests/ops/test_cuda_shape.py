"""Arithmetic of the CUDA kernels' launches, as plain C++ on this machine."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "engine" / "csrc" / "cuda"
PROGRAM = """
#include <cstdio>
#include "attention_shape.h"
int main() {
  using namespace lorax::cuda;
  for (int size : kHeadSizes)
    std::printf("%d %d %d %d %d\\n", size, decode_warps(size), decode_shared(size, 2), prefill_shared(size),
                prefill_blocks(size));
}
"""
SM_BYTES = {
    "86, 89, 120": 100 << 10,
    "80": 164 << 10,
    "90, 100": 228 << 10,
}  # of one multiprocessor
BLOCK_BYTES = {"86, 89, 120": 99 << 10, "80": 163 << 10, "90, 100": 227 << 10}  # most of one block
RESERVED = 1 << 10  # of every block, by the driver


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Rows of PROGRAM."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("shape")
    (folder / "shape.cpp").write_text(PROGRAM)
    command = [*compiler, "-std=c++17", f"-I{CUDA}", "shape.cpp", "-o", "shape"]
    subprocess.run(command, cwd=folder, check=True)
    lines = subprocess.run([folder / "shape"], capture_output=True, text=True, check=True).stdout
    return [list(map(int, line.split())) for line in lines.splitlines()]


@pytest.fixture(scope="module")
def decode(shapes: list[list[int]]) -> dict[int, tuple[int, int]]:
    """Head size -> (warps, bytes of shared memory) of the decode kernel."""
    return {size: (warps, shared) for size, warps, shared, *_ in shapes}


def held(size: int, warps: int) -> int:
    """Bytes of what the kernel keeps: rows of size + 8 halves, of 16 queries and of two chunks of each warp."""
    rows = 16 + sum(2 * 16 for _ in range(warps) for _ in ("keys", "values"))
    return rows * (size + 8) * 2


def test_the_decode_kernel_fits_every_gpu(decode: dict[int, tuple[int, int]]) -> None:
    assert max(decode) == 256
    for size, (warps, shared) in decode.items():
        assert shared == held(size, warps) and shared % 16 == 0
        merged = warps * 16 * (size + 4) * 4  # reuses the stages
        assert merged <= shared - 16 * (size + 8) * 2
        fixed = warps * 16 * 2 * 4
        assert all(shared + fixed <= most for most in BLOCK_BYTES.values()), size


def test_fewer_warps_for_a_block_are_not_fewer_for_an_sm(
    decode: dict[int, tuple[int, int]],
) -> None:
    """On GPUs where three warps would fit, two leave room for another block."""

    def warps_of_sm(size: int, warps: int, sm: str) -> int:
        block = held(size, warps) + warps * 128
        return warps * (SM_BYTES[sm] // (block + RESERVED)) if block <= BLOCK_BYTES[sm] else 0

    for sm in SM_BYTES:
        size = 256
        assert warps_of_sm(size, decode[size][0], sm) >= warps_of_sm(size, 3, sm), sm
    assert warps_of_sm(128, decode[128][0], "90, 100") == 12  # four blocks of three


def test_the_prefill_kernel_has_the_blocks_it_counts_on(shapes: list[list[int]]) -> None:
    for size, _, _, shared, blocks in shapes:
        assert shared % 16 == 0
        assert all(shared <= most for most in BLOCK_BYTES.values()), size
        assert blocks * (shared + RESERVED) <= SM_BYTES["90, 100"], size
