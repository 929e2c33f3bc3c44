"""The CPU's norm, activation and rotary kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: 4e-6,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}  # relative and absolute
ops = torch.ops.lorax


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def inside(values: Tensor, margin: int = 3) -> Tensor:
    """The same values as a slice of wider, poisoned rows."""
    wide = torch.full(
        (*values.shape[:-1], values.shape[-1] + 2 * margin), float("nan"), dtype=values.dtype
    )
    part = wide[..., margin : margin + values.shape[-1]]
    part.copy_(values)
    return part


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 1), (2, 7), (3, 16), (5, 33), (4, 576), (70, 1001)]
)
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_rms_norm(
    isa: str, dtype: torch.dtype, rows: int, width: int, with_residual: bool
) -> None:
    x, weight = inside(torch.randn(rows, width).to(dtype)), torch.randn(width).to(dtype)
    residual = inside(torch.randn(rows, width).to(dtype)) if with_residual else None
    expected_residual = residual.clone() if residual is not None else None
    expected = reference.add_rms_norm(x, expected_residual, weight, 1e-5)
    torch.full((rows, width), float("nan"), dtype=dtype)
    assert_close(ops.add_rms_norm(x, residual, weight, 1e-5), expected)
    if residual is not None and expected_residual is not None:
        assert torch.equal(residual, expected_residual)


def test_a_norm_weight_may_be_wider(isa: str) -> None:
    x, weight = torch.randn(3, 40).bfloat16(), torch.randn(40)
    assert_close(
        ops.add_rms_norm(x, None, weight, 1e-6), reference.add_rms_norm(x, None, weight, 1e-6)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 16), (5, 33), (40, 1536)])
def test_act_and_mul(isa: str, dtype: torch.dtype, act: str, rows: int, width: int) -> None:
    x = inside(torch.randn(rows, 2 * width).mul(4).to(dtype))
    torch.full((rows, width), float("nan"), dtype=dtype)
    assert_close(ops.act_and_mul(x, act), reference.act_and_mul(x, act))


def test_activations_of_extreme_values(isa: str) -> None:
    gate = torch.tensor([[0.0, -0.0, 90.0, -90.0, 1e30, -1e30, 1e-30, float("nan")]])
    x = torch.cat([gate, torch.ones_like(gate)], dim=1)
    for act in ("silu", "gelu", "gelu_tanh"):
        torch.testing.assert_close(
            ops.act_and_mul(x, act),
            reference.act_and_mul(x, act),
            rtol=1e-6,
            atol=1e-6,
            equal_nan=True,
        )


def fused_qkv(
    tokens: int, heads: int, groups: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of one projection's output."""
    qkv = (
        torch.randn(tokens, (heads + 2 * groups) * dim)
        .to(dtype)
        .view(tokens, heads + 2 * groups, dim)
    )
    return qkv[:, :heads], qkv[:, heads : heads + groups], qkv[:, heads + groups :]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "dim", "rotary"),
    [(1, 9, 3, 64, 64), (17, 4, 1, 48, 24), (5, 2, 2, 10, 6), (90, 9, 3, 64, 64), (4, 2, 1, 16, 0)],
)
def test_rope_store_kv(
    isa: str,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    interleaved: bool,
    tokens: int,
    heads: int,
    groups: int,
    dim: int,
    rotary: int,
) -> None:
    q, k, v = fused_qkv(tokens, heads, groups, dim, dtype)
    angles = torch.randn(200, rotary // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.randint(200, (tokens,))
    kv = torch.full((30, 3, 2, 4, groups, dim), float("nan"), dtype=kv_dtype or dtype)
    places = torch.randperm(120)[:tokens]
    expected = [t.clone() for t in (q, k, v, kv)]
    reference.rope_store_kv_(*expected[:3], cos_sin, positions, expected[3], places, 1, interleaved)
    ops.rope_store_kv_(q, k, v, cos_sin, positions, kv, places, 1, interleaved)
    for actual, wanted in zip((q, k, v, kv), expected, strict=True):
        assert torch.equal(actual.isnan(), wanted.isnan())
        assert_close(actual.nan_to_num(), wanted.nan_to_num())


def rope_arguments() -> dict[str, object]:
    q, k, v = fused_qkv(3, 2, 1, 8, torch.float32)
    return {
        "q": q,
        "k": k,
        "v": v,
        "cos_sin": torch.randn(10, 8),
        "positions": torch.tensor([0, 1, 9]),
        "kv": torch.zeros(4, 2, 2, 4, 1, 8),
        "places": torch.tensor([0, 1, 15]),
        "layer": 1,
        "interleaved": False,
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k", torch.zeros(3, 1, 9), r"k \[3, 1, 9\] does not fit q"),
        ("v", torch.zeros(3, 2, 8), "does not fit k"),
        ("v", torch.zeros(3, 1, 8).half(), "one dtype"),
        ("cos_sin", torch.zeros(10, 10), "does not fit heads of 8"),
        ("cos_sin", torch.zeros(10, 8).half(), "cos_sin must be float32"),
        ("positions", torch.tensor([0, 1, 10]), r"positions\[2\] is 10, the limit is 10"),
        ("positions", torch.tensor([0, 1]), "does not fit 3 tokens"),
        ("positions", torch.tensor([0, 1, 2], dtype=torch.int32), "must be int64"),
        ("places", torch.tensor([0, -1, 2]), r"places\[1\] is -1"),
        ("places", torch.tensor([0, 16, 2]), r"places\[1\] is 16, the limit is 16"),
        ("layer", 2, "layer 2 of 2"),
        ("kv", torch.zeros(4, 2, 2, 4, 2, 8), "kv .* does not fit k"),
    ],
)
def test_rope_refuses_what_does_not_fit(isa: str, name: str, value: object, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.rope_store_kv_(**(rope_arguments() | {name: value}))


def test_norm_and_activation_refuse_what_does_not_fit(isa: str) -> None:
    x = torch.zeros(2, 6)
    for call, message in (
        (lambda: ops.add_rms_norm(x, None, torch.zeros(5), 1e-5), r"weight \[5\] does not fit x"),
        (
            lambda: ops.add_rms_norm(x, torch.zeros(2, 5), torch.zeros(6), 1e-5),
            "residual .* does not fit",
        ),
        (lambda: ops.add_rms_norm(x, x.half(), torch.zeros(6), 1e-5), "one dtype"),
        (lambda: ops.act_and_mul(torch.zeros(2, 5), "silu"), "must be even"),
        (lambda: ops.act_and_mul(x, "relu"), "unknown activation 'relu'"),
        (lambda: ops.act_and_mul(x.int(), "silu"), "must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
