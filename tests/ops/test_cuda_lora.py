"""The GPU's LoRA kernels against the float32 reference, in another batch, and replayed from a graph."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.ops import extension, reference
from tests.ops.test_cpu_lora import (
    DTYPES,
    GROUP,
    LAYER,
    POPULARITIES,
    Adapters,
    defined,
    make_adapters,
    make_batch,
    per_token,
    strided,
    tolerance,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh")]

ops = torch.ops.lorax
FEW_TOKENS = 256  # up to here a token's result has the same bits in every batch
SHAPES = [(4096, [4096, 1024, 1024]), (1000, [333, 1, 50]), (1, [9]), (520, [1032, 1032])]


@pytest.fixture(autouse=True)
def loaded() -> None:
    assert "lora_shrink" in extension.load_cuda().ops, extension.load_cuda().reason


def on_gpu(tensor: Tensor) -> Tensor:
    """A copy with the same strides."""
    if tensor._base is None:
        return tensor.cuda()
    return tensor._base.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def run(
    adapters: Adapters, x: Tensor, y: Tensor, slots: Tensor, segment_starts: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of t with zeros where undefined, y after expand); expand reads NaN where t is undefined."""
    where = (adapters.arena.cuda(), adapters.records.cuda(), slots.cuda(), segment_starts.cuda())
    t = ops.lora_shrink(on_gpu(x), *where, LAYER, GROUP, adapters.stacked_rank).cpu()
    poisoned = defined(t, adapters, slots, segment_starts, float("nan")).cuda()
    y = on_gpu(y)
    ops.lora_expand_(y, poisoned, *where, LAYER, GROUP, adapters.splits)
    return defined(t, adapters, slots, segment_starts, 0.0).sum(0, keepdim=True), y.cpu()


def cut(slots: Tensor, segment_starts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The same batch in segments of at most `most` tokens."""
    owners = per_token(slots, segment_starts)
    pieces = [0]
    for i in range(1, len(owners) + 1):
        if i == len(owners) or owners[i] != owners[i - 1] or i - pieces[-1] == most:
            pieces.append(i)
    of_pieces = [owners[i] for i in pieces[:-1]]
    return torch.tensor(of_pieces, dtype=torch.int32), torch.tensor(pieces, dtype=torch.int32)


def check(adapters: Adapters, tokens: int, popularity: str) -> None:
    slots, segment_starts = make_batch(tokens, len(adapters.ranks) - 1, popularity)
    x = strided(tokens, adapters.k, adapters.dtype)
    y = strided(tokens, sum(adapters.splits), adapters.dtype)
    where = (adapters.arena, adapters.records, slots, segment_starts, LAYER, GROUP)
    expected_t = reference.lora_shrink(x, *where, adapters.stacked_rank)
    expected_y = y.clone()
    reference.lora_expand_(expected_y, expected_t, *where, adapters.splits)
    t, new = run(adapters, x, y, slots, segment_starts)
    torch.testing.assert_close(t, expected_t, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new, expected_y, **tolerance(adapters.dtype))
    for most in (1, 8, 64):  # one: more segments than a page of the work list has
        t_cut, new_cut = run(adapters, x, y, *cut(slots, segment_starts, most))
        assert torch.equal(t_cut, t)
        if tokens <= FEW_TOKENS:
            assert torch.equal(new_cut, new)
        else:
            as_exact(new_cut, new)


def as_exact(first: Tensor, second: Tensor) -> None:
    """Sums in another order, rounded at the end: they differ only where they are next to a tie."""
    torch.testing.assert_close(first, second, **tolerance(first.dtype))
    most = {torch.float32: 1.0, torch.bfloat16: 0.003, torch.float16: 0.02}[first.dtype]
    assert (first != second).double().mean() <= most


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_reference(dtype: torch.dtype, popularity: str, shape: int) -> None:
    k, splits = SHAPES[shape]
    for tokens in (1, 3, 16, 75, FEW_TOKENS + 44):
        ranks = [(r,) * len(splits) for r in (16, 8, 0, 1)]
        ranks += [tuple(random.choice([0, 1, 3, 7, 16, 64]) for _ in splits) for _ in range(4)]
        check(make_adapters(ranks, k, splits, dtype), tokens, popularity)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 5, 8, 16, 17, 31, 64, 129, 256])
def test_every_rank(dtype: torch.dtype, rank: int) -> None:
    for ranks in [(rank,), (rank, 0, 3), (0, rank, 0), (0, 2, rank)]:
        adapters = make_adapters([ranks, ranks], 96, [80, 24, 40][: len(ranks)], dtype)
        check(adapters, random.choice([1, 2, 5, 9]), "uniform")
        check(adapters, FEW_TOKENS + random.choice([1, 2, 9, 40]), "uniform")


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill(dtype: torch.dtype) -> None:
    adapters = make_adapters([(16, 16, 16), (4, 0, 9)], 1160, [160, 64, 64], dtype)
    for popularity in ("identical", "uniform"):
        check(adapters, 261, popularity)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_tokens_are_as_exact_as_few(dtype: torch.dtype) -> None:
    """Long segments of large batches go to tensor cores."""
    adapters = make_adapters([(16, 64, 33)], 96, [512, 640, 128], dtype)
    slots = torch.tensor([1], dtype=torch.int32)
    half = FEW_TOKENS - 56
    x, y = torch.randn(2 * half, 96).to(dtype), torch.randn(2 * half, 1280).to(dtype)
    ends = [torch.tensor([0, tokens], dtype=torch.int32) for tokens in (half, 2 * half)]
    many = run(adapters, x, y, slots, ends[1])[1]
    few = [
        run(adapters, *pair, slots, ends[0])[1]
        for pair in zip(x.split(half), y.split(half), strict=True)
    ]
    as_exact(many, torch.cat(few))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 4, 9, 12, 1020, 1028])
def test_an_arena_that_ends_with_a_row(dtype: torch.dtype, width: int) -> None:
    """Segments of one token read no more than a row has; what lies behind, only compute-sanitizer sees."""
    for _ in range(8):  # half of them have B last
        check(make_adapters([(3,)], 8, [width], dtype), 2, "identical")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(dtype: torch.dtype) -> None:
    vocab = 50
    adapters = make_adapters([(8,), (3,), (0,), (17,)], 0, [72], dtype, vocab=vocab)
    for popularity in POPULARITIES:
        slots, segment_starts = make_batch(21, 4, popularity)
        ids = torch.randint(vocab, (21,))
        where = (adapters.arena, adapters.records, slots, segment_starts)
        t = ops.lora_gather(ids.cuda(), *(w.cuda() for w in where), LAYER, GROUP, 17, dtype)
        expected = reference.lora_gather(ids, *where, LAYER, GROUP, 17, dtype)
        assert torch.equal(defined(t.cpu(), adapters, slots, segment_starts, 0.0), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_sees_new_adapters(dtype: torch.dtype) -> None:
    """Captured over zero records, replayed after other adapters, ranks and segments were put in their place."""
    k, splits, tokens, num = 640, [320, 64], 12, 5
    first = make_adapters([(16, 16)] * num, k, splits, dtype)
    size = 4 * first.arena.numel()
    arena = torch.zeros(size, dtype=torch.uint8, device="cuda")
    records = torch.zeros_like(first.records, device="cuda")
    slots = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    segment_starts = torch.full((tokens + 1,), tokens, dtype=torch.int32, device="cuda")
    x = torch.randn(tokens, k, device="cuda").to(dtype)
    y = torch.randn(tokens, sum(splits), device="cuda").to(dtype)

    def step() -> None:
        t = ops.lora_shrink(x, arena, records, slots, segment_starts, LAYER, GROUP, 128)
        ops.lora_expand_(y, t, arena, records, slots, segment_starts, LAYER, GROUP, splits)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(5):
        ranks = [(random.randint(0, 64), random.randint(0, 64)) for _ in range(num)]
        adapters = replace(make_adapters(ranks, k, splits, dtype))
        if adapters.arena.numel() > size:
            continue
        of, bounds = cut(*make_batch(tokens, num, "uniform"), 8)
        arena[: adapters.arena.numel()] = adapters.arena.cuda()
        records.copy_(adapters.records)
        slots.zero_()[: len(of)] = of.cuda()
        segment_starts.fill_(tokens)[: len(bounds)] = bounds.cuda()
        x.normal_()
        y.normal_()
        expected = y.cpu()
        where = (adapters.arena, adapters.records, of, bounds, LAYER, GROUP)
        t = reference.lora_shrink(x.cpu(), *where, 128)
        reference.lora_expand_(expected, t, *where, splits)
        graph.replay()
        torch.testing.assert_close(y.cpu(), expected, **tolerance(dtype))
