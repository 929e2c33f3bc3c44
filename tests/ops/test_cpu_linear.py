"""The CPU's linear kernel: against float64, and equal bits whatever the batch or the number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {
    torch.float32: 2e-7,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}  # half a unit in the last place
# [T, K, N]: every count of rows in a tile, of columns in a panel, of blocks and spans of K, of blocks of T
SHAPES = [
    *((tokens, 48, 13) for tokens in range(1, 10)),
    *((5, 64, outputs) for outputs in range(1, 14)),
    *((3, inputs, 6) for inputs in (1, 3, 15, 16, 17, 33, 639, 640, 641, 1283)),
    (64, 576, 96),
    (65, 576, 96),
    (131, 3001, 17),
    (2, 9000, 40),
    (100, 9001, 7),
]
linear = torch.ops.lorax.linear


def operands(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(tokens, inputs).to(dtype),
        torch.randn(outputs, inputs).to(dtype),
        torch.randn(outputs).to(dtype),
    )


def assert_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within float32's error of a sum of K products, and one rounding to the result's type."""
    x, weight = x.double(), weight.double()
    exact = x @ weight.T
    magnitude = x.abs() @ weight.abs().T
    if bias is not None:
        exact += bias.double()
        magnitude += bias.double().abs()
    bound = magnitude * 2e-7 * (4 + x.shape[1] ** 0.5) + exact.abs() * ROUNDING[y.dtype]
    # a float16 may be subnormal
    assert ((y.double() - exact).abs() <= bound + 6e-8).all()


def poison(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Leaves NaN where the allocator is likely to put the result."""
    torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_float64(isa: str, dtype: torch.dtype, with_bias: bool) -> None:
    for shape in SHAPES:
        x, weight, bias = operands(*shape, dtype)
        poison((shape[0], shape[2]), dtype)
        y = linear(x, weight, bias if with_bias else None)
        assert y.dtype == dtype and y.shape == (shape[0], shape[2]) and y.is_contiguous()
        assert_close(y, x, weight, bias if with_bias else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 96), (1536, 40), (1283, 13), (3001, 20)])
def test_a_row_does_not_depend_on_its_batch(
    isa: str, dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    x, weight, bias = operands(150, inputs, outputs, dtype)
    alone = torch.cat([linear(x[i : i + 1], weight, bias) for i in range(len(x))])
    for tokens in (2, 3, 4, 5, 6, 7, 8, 16, 33, 64, 65, 128, 150):
        first = (150 - tokens) // 2
        assert torch.equal(
            linear(x[first : first + tokens], weight, bias), alone[first : first + tokens]
        )


def test_threads_do_not_change_the_result(isa: str) -> None:
    threads = torch.get_num_threads()
    x, weight, bias = operands(70, 1300, 999, torch.float32)
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(linear(x, weight, bias))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_strided(isa: str, dtype: torch.dtype) -> None:
    x, weight, bias = operands(11, 77, 19, dtype)
    wide_x, wide_weight = (
        torch.full((2, 11, 200), float("nan")),
        torch.full((2, 19, 100), float("nan")),
    )
    strided_x, strided_weight = wide_x.to(dtype)[1, :, 5:82], wide_weight.to(dtype)[1, :, 3:80]
    strided_x.copy_(x)
    strided_weight.copy_(weight)
    assert torch.equal(linear(strided_x, strided_weight, bias), linear(x, weight, bias))


def test_not_a_number_and_infinity_pass_through(isa: str) -> None:
    x, weight, _ = operands(6, 50, 8, torch.float32)
    x[2, 49], x[4, 0] = float("nan"), float("inf")
    y = linear(x, weight, None)
    assert y[2].isnan().all() and y[4].isinf().all() and y[[0, 1, 3, 5]].isfinite().all()


def test_no_rows_and_no_outputs(isa: str) -> None:
    assert linear(torch.randn(0, 8), torch.randn(3, 8), None).shape == (0, 3)
    assert linear(torch.randn(2, 8), torch.randn(0, 8), None).shape == (2, 0)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(3, 9), None, r"weight \[3, 9\] does not fit x \[2, 8\]"),
        (torch.zeros(2, 2, 8), torch.zeros(3, 8), None, "x must have 2 dimensions"),
        (torch.zeros(2, 0), torch.zeros(3, 0), None, "x has no columns"),
        (torch.zeros(2, 8), torch.zeros(3, 8).bfloat16(), None, "one dtype"),
        (
            torch.zeros(2, 8).double(),
            torch.zeros(3, 8).double(),
            None,
            "must be float32, bfloat16 or float16",
        ),
        (torch.zeros(8, 2).T, torch.zeros(3, 8), None, "last dimension of x must be contiguous"),
        (
            torch.zeros(2, 8),
            torch.zeros(8, 3).T,
            None,
            "last dimension of weight must be contiguous",
        ),
        (torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(4), r"bias \[4\] does not fit weight"),
        (torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(3).half(), "one dtype"),
    ],
)
def test_what_does_not_fit_is_refused(
    isa: str, x: Tensor, weight: Tensor, bias: Tensor | None, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        linear(x, weight, bias)
