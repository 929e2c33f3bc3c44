"""The GPU's linear against float32, whatever batch a row is in, and side by side with the kernels around it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import extension
from tests.ops.test_cpu_lora import GROUP, LAYER, Adapters, make_adapters, make_batch
from tests.ops.test_cuda_lora import cut

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh")]

ops = torch.ops.lorax
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-4}
# (rows, columns): parts of K that are uneven, empty or cut off, one tile, many tiles, odd rows; K in two parts, in one,
# and that with more tiles than SMs
SHAPES = [(6144, 4096), (1024, 14336), (2664, 520), (64, 64), (8, 1000), (584, 72)]
SHAPES += [(8448, 200), (8456, 520), (17416, 520), (33, 96)]
TOKENS = [1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 80, 81, 96, 97, 127, 128, 129, 160, 161, 192, 193]
TOKENS += [224, 225, 255, 256, 257]


@pytest.fixture(autouse=True)
def loaded() -> None:
    assert "linear" in extension.load_cuda().ops, extension.load_cuda().reason


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_against_float32(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows, columns = shape
    weight = torch.randn(rows, columns, device="cuda").to(dtype)
    bias = torch.randn(rows, device="cuda").to(dtype)
    wide = torch.randn(max(TOKENS), 2 * columns, device="cuda").to(dtype)
    for tokens in TOKENS:
        for x in (wide[:tokens, :columns].contiguous(), wide[:tokens, columns:]):
            for b in (None, bias):
                expected = F.linear(x.float(), weight.float(), None if b is None else b.float())
                found = ops.linear(x, weight, b)
                assert found.dtype == dtype and found.is_contiguous()
                assert error(found, expected) < TOLERANCE[dtype], (tokens, b is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a library serves the linear of this GPU")
    for rows, columns in SHAPES[:-1]:
        weight = torch.randn(rows, columns, device="cuda").to(dtype)
        x = torch.randn(256, columns, device="cuda").to(dtype)
        whole = ops.linear(x, weight, None)
        for tokens in (1, 7, 8, 15, 31, 40, 64, 66, 80, 90, 100, 127, 150, 180, 225):
            assert torch.equal(ops.linear(x[-tokens:], weight, None), whole[-tokens:])


def layers(
    adapters: Adapters,
    where: tuple[Tensor, ...],
    weights: list[Tensor],
    between: Callable[[], None],
) -> Callable[[Tensor], Tensor]:
    """Norm, linear, shrink, expand, activation, linear: layer after layer, `between` after every op."""
    width, norm = adapters.k, torch.ones(adapters.k, device="cuda", dtype=adapters.dtype)

    def run(x: Tensor) -> Tensor:
        residual = x.clone()
        for up, down in zip(weights[::2], weights[1::2], strict=True):
            x = ops.add_rms_norm(x, residual, norm, 1e-6)
            between()
            y = ops.linear(x, up, None)
            between()
            t = ops.lora_shrink(x, *where, LAYER, GROUP, adapters.stacked_rank, overlap=True)
            between()
            ops.lora_expand_(y, t, *where, LAYER, GROUP, adapters.splits)
            between()
            x = ops.linear(ops.act_and_mul(y, "silu"), down, None)
            between()
        assert x.shape[1] == width
        return x

    return run


@pytest.mark.parametrize("popularity", ["distinct", "uniform", "identical"])
@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [(torch.bfloat16, n) for n in (48, 80, 90, 100, 120, 150, 208, 270)] + [(torch.float32, 48)],
)
def test_kernels_that_overlap_wait_for_what_they_need(
    dtype: torch.dtype, tokens: int, popularity: str
) -> None:
    """Layers in a graph have the bits of the same layers with the GPU idle after every op."""
    k, splits, num = 2048, [8704, 8704], 48  # more tiles of the linear than SMs
    adapters = make_adapters([(8, 16)] * num, k, splits, dtype)
    slots, segment_starts = cut(*make_batch(tokens, num, popularity), 8)
    where = tuple(part.cuda() for part in (adapters.arena, adapters.records, slots, segment_starts))
    weights = []
    for _ in range(6):
        weights.append(torch.randn(sum(splits), k, device="cuda").to(dtype) * 0.02)
        weights.append(torch.randn(k, splits[0], device="cuda").to(dtype) * 0.02)
    x = torch.zeros(tokens, k, device="cuda", dtype=dtype)
    overlapped = layers(adapters, where, weights, lambda: None)
    overlapped(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = overlapped(x)
    alone = layers(adapters, where, weights, torch.cuda.synchronize)
    for _ in range(20):
        x.normal_()
        graph.replay()
        expected = alone(x)
        assert expected.isfinite().all()
        assert torch.equal(found, expected)
