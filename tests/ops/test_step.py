"""The ops around a step: their references against loops, and the kernels' index arithmetic on the CPU."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.ops import reference
from tests.ops.steps import BLOCKS, Step, by_hand, random_step, used

pytestmark = pytest.mark.usefixtures("fresh")

CSRC = Path(__file__).resolve().parents[2] / "engine/csrc/cuda"
THREADS = 7  # of a sequence

# The grid of the kernel as loops: first every thread asks where its sequence is, then all go on.
PROGRAM = """
#include <vector>
#include "step_index.h"
using namespace lorax::cuda;
extern "C" void prepare(int32_t* computed, int64_t computed_stride, const int32_t* tokens,
                        int64_t tokens_stride, const int32_t* blocks, int64_t blocks_stride,
                        const int32_t* rows, const int32_t* first, const int32_t* cu_seqlens_q,
                        int64_t* ids, int64_t* positions, int64_t* slot_mapping, int32_t* block_tables,
                        int32_t* context_lens, int sequences, int num_tokens, int max_blocks, int block_size,
                        int threads) {
  const PrepareArgs args{computed, computed_stride, tokens, tokens_stride, blocks, blocks_stride,
                         rows, first, cu_seqlens_q, ids, positions, slot_mapping, block_tables, context_lens,
                         sequences, num_tokens, max_blocks, block_size};
  for (int s = 0; s < sequences; ++s) {
    const std::vector<int> from(threads, first_position(args, s));
    for (int t = 0; t < threads; ++t) prepare_sequence(args, s, from[t], t, threads);
  }
  for (int t = 0; t < threads; ++t) prepare_padding(args, t, threads);
}
"""


@pytest.mark.parametrize("_", range(30))
def test_prepare_is_what_the_loops_say(_: int) -> None:
    step = random_step().to("cpu")
    tokens, block_tables, computed = by_hand(step)
    *found, found_block_tables, context_lens = reference.prepare_step_(*step.arguments)  # type: ignore[arg-type]
    assert [part.tolist() for part in found] == tokens
    assert all(part.dtype == torch.int64 for part in found)
    assert (found_block_tables.dtype, context_lens.dtype) == (torch.int32, torch.int32)
    assert used(found_block_tables, context_lens) == block_tables
    assert step.computed.tolist() == computed


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("prepare")
    source, library = folder / "prepare.cpp", folder / "prepare.so"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def prepare(library: ctypes.CDLL, step: Step) -> list[Tensor]:
    sequences, tokens = len(step.rows), step.num_tokens
    outputs = [torch.full((tokens,), -9) for _ in range(3)]
    block_tables = torch.full((sequences, BLOCKS), -9, dtype=torch.int32)
    context_lens = torch.full((sequences,), -9, dtype=torch.int32)

    def pointer(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    table: list[object] = []
    for tensor in (step.computed, step.tokens, step.blocks):
        table += [pointer(tensor), ctypes.c_int64(tensor.stride(0))]
    others = [step.rows, step.first, step.cu_seqlens_q, *outputs, block_tables, context_lens]
    sizes = (sequences, tokens, step.max_blocks, step.block_size, THREADS)
    library.prepare(*table, *map(pointer, others), *map(ctypes.c_int, sizes))
    return [*outputs, block_tables, context_lens]


@pytest.mark.parametrize("_", range(30))
def test_the_kernels_arithmetic_is_that_of_the_reference(compiled: ctypes.CDLL, _: int) -> None:
    step = random_step()
    mine, theirs = step.to("cpu"), step.to("cpu")
    expected = reference.prepare_step_(*theirs.arguments)  # type: ignore[arg-type]
    found = prepare(compiled, mine)
    for actual, wanted in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(actual, wanted)
    assert torch.equal(found[4], expected[4])
    assert used(found[3], found[4]) == used(expected[3], expected[4])
    assert torch.equal(mine.computed, theirs.computed)


def test_runs_are_written_where_they_belong() -> None:
    words = torch.zeros(20, dtype=torch.int32)
    values, runs = [5, 6, 7, 8], [(18, 2, 2), (3, 1, 0)]  # (destination, count, source)
    patch = values + [0, 0, 0] + [word for run in reversed(runs) for word in run]
    reference.write_runs_(words, torch.tensor(patch, dtype=torch.int32), len(runs))
    expected = [0] * 20
    expected[18:20], expected[3] = [7, 8], 5
    assert words.tolist() == expected


def test_of_equal_logits_the_first_is_picked() -> None:
    logits = torch.randint(0, 3, (50, 70)).float()
    rows, lengths = torch.randperm(60)[:50], torch.randint(0, 9, (50,), dtype=torch.int32)
    tokens = torch.full((60, 9), -1, dtype=torch.int32)
    chosen = reference.pick_greedy_(logits, rows, lengths, tokens)
    assert chosen.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert tokens[rows, lengths.long()].tolist() == chosen.tolist()
    assert int((tokens == -1).sum()) == tokens.numel() - 50


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_no_token(value: float) -> None:
    logits = torch.randn(4, 9)
    logits[2, 5] = value
    logits[3, 5] = -float("inf")
    tokens = torch.full((4, 2), -1, dtype=torch.int32)
    rows = torch.arange(4)
    chosen = reference.pick_greedy_(logits, rows, torch.ones(4, dtype=torch.int64), tokens)
    others = [0, 1, 3]
    assert chosen[2] == -1 and torch.equal(chosen[others], logits[others].argmax(-1))
    assert tokens[:, 1].tolist() == chosen.clamp(min=0).tolist()


@pytest.mark.parametrize("vocab", [5, 1500])
def test_the_floor_ends_the_smallest_set(vocab: int) -> None:
    probs = (torch.randn(20, vocab) * random.choice([0.1, 2.0])).softmax(-1)
    top_p = torch.rand(20)
    for row, p, floor in zip(probs, top_p, reference.top_p_floor(probs, top_p), strict=True):
        above, inside = row[row > floor].double().sum(), row[row >= floor].double().sum()
        assert above - 1e-6 < p < inside + 1e-6
        assert bool((row == floor).any())
