"""Quantised linears on a GPU: against their dequantised weights, against the CPU's, and replayed from a graph."""

from __future__ import annotations

import pytest
import torch

from engine.layers.quantised import FourBit
from tests.layers.test_quantised import (
    CPU,
    SHAPES,
    Method,
    assert_near,
    assert_parts_make_the_whole,
    assert_product,
    empty,
    every_dtype,
    every_scheme,
    every_shape,
    fresh,
    inputs,
    make,
)

__all__ = ["fresh"]  # a fixture

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
# Of every kernel there is: few tokens, a tile of the matrix unit, and more than are tried with fused 4 bits.
TOKENS = [1, 2, 3, 4, 5, 8, 17, 64, 200, 600]
LARGE = (6144, 4096)  # enough tiles to fill a GPU


def looseness(method: Method) -> float:
    """The fused 4-bit kernel rounds a weight's two factors, the weight and its product with x to 16 bits."""
    half = isinstance(method, FourBit) and method.dtype != torch.float32
    return 2 * torch.finfo(method.dtype).eps if half else 0.0


@every_scheme
@every_dtype
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
def test_matmul_is_that_of_the_dequantised_weight(
    scheme: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    for bias in (False, True):
        method, _, added = make(scheme, dtype, GPU, shape, bias)
        for tokens in TOKENS:
            x = inputs(tokens, shape[1], dtype).cuda()
            assert_product(method, method.matmul(x), x, added, looseness(method))


@every_dtype
def test_8_bits_of_a_token_alone_are_those_in_a_batch(dtype: torch.dtype) -> None:
    method, _, _ = make("bitsandbytes", dtype, GPU, LARGE)
    x = inputs(600, LARGE[1], dtype).cuda()
    y = method.matmul(x)
    for first, last in ((0, 1), (7, 8), (300, 364), (500, 600)):
        assert torch.equal(method.matmul(x[first:last]), y[first:last])


@every_scheme
@every_shape
def test_parts_make_the_whole(scheme: str, shape: tuple[int, int]) -> None:
    assert_parts_make_the_whole(scheme, GPU, shape)


@every_scheme
@every_dtype
@every_shape
def test_weight_is_that_of_the_cpu(scheme: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """But for ties, which the two may break differently."""
    on_gpu, weight, _ = make(scheme, dtype, GPU, shape)
    assert_near(on_gpu, weight)
    on_cpu = empty(scheme, dtype, CPU, shape, False)
    on_cpu.load("weight", 0, weight)
    bits = torch.finfo(dtype).eps
    same = torch.isclose(
        on_gpu.weight_rows(slice(None)).cpu(), on_cpu.weight_rows(slice(None)), rtol=bits, atol=1e-7
    )
    assert same.double().mean() > 0.99


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", [(192, 128), (33, 50), LARGE], ids=str)
@every_dtype
@every_scheme
def test_graph_replays_with_new_input(
    scheme: str, dtype: torch.dtype, shape: tuple[int, int], tokens: int
) -> None:
    """Captured after a run of another batch size only, as the engine does it."""
    method, _, added = make(scheme, dtype, GPU, shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        method.matmul(inputs(96, shape[1], dtype).cuda())
    torch.cuda.current_stream().wait_stream(side)
    x = inputs(tokens, shape[1], dtype).cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = method.matmul(x)
    for _ in range(3):
        y.fill_(float("nan"))
        x.copy_(inputs(tokens, shape[1], dtype) * torch.rand(1).to(dtype))
        graph.replay()
        assert_product(method, y, x, added, looseness(method))
