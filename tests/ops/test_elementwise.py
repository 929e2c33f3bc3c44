"""The norm, activation and rotary kernels of the CPU and the GPU against the reference."""

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
ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]
ops = torch.ops.lorax


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def inside(values: Tensor, margin: int) -> Tensor:
    """The same values as a slice of wider, poisoned rows; a margin of 16 keeps 16-byte alignment."""
    wide = torch.full(
        (*values.shape[:-1], values.shape[-1] + 2 * margin), float("nan"), dtype=values.dtype
    )
    part = wide[..., margin : margin + values.shape[-1]]
    part.copy_(values)
    return part


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("margin", [0, 3, 16])
@pytest.mark.parametrize(
    ("rows", "width"),
    [(1, 1), (2, 7), (3, 16), (5, 33), (4, 576), (70, 1001), (3, 4096), (2, 8192), (2, 40000)],
)
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_rms_norm(
    device: str, dtype: torch.dtype, margin: int, rows: int, width: int, with_residual: bool
) -> None:
    x, weight = inside(torch.randn(rows, width).to(dtype), margin), torch.randn(width).to(dtype)
    residual = inside(torch.randn(rows, width).to(dtype), margin) if with_residual else None
    expected_residual = residual.clone() if residual is not None else None
    expected = reference.add_rms_norm(x, expected_residual, weight, 1e-5)
    assert_close(ops.add_rms_norm(x, residual, weight, 1e-5), expected)
    if residual is not None and expected_residual is not None:
        assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 640])
def test_a_norm_weight_may_have_another_dtype(
    device: str, dtype: torch.dtype, weight_dtype: torch.dtype, width: int
) -> None:
    x, weight = torch.randn(3, width).to(dtype), torch.randn(width).to(weight_dtype)
    assert_close(
        ops.add_rms_norm(x, None, weight, 1e-6), reference.add_rms_norm(x, None, weight, 1e-6)
    )


@pytest.mark.parametrize("width", [33, 576, 4096, 8192])
def test_a_norm_does_not_depend_on_the_batch(device: str, width: int) -> None:
    x, weight = torch.randn(300, width).bfloat16(), torch.randn(width).bfloat16()
    together = ops.add_rms_norm(x, None, weight, 1e-5)
    for row in (0, 1, 299):
        alone = ops.add_rms_norm(x[row : row + 1].clone(), None, weight, 1e-5)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("margin", [0, 3, 16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 16), (5, 33), (40, 1536), (2, 14336)])
def test_act_and_mul(
    device: str, dtype: torch.dtype, act: str, margin: int, rows: int, width: int
) -> None:
    x = inside(torch.randn(rows, 2 * width).mul(4).to(dtype), margin)
    assert_close(ops.act_and_mul(x, act), reference.act_and_mul(x, act))


def test_more_rows_than_a_grid_is_high(device: str) -> None:
    x = torch.randn(70000, 16).bfloat16()
    assert_close(ops.act_and_mul(x, "silu"), reference.act_and_mul(x, "silu"))
    weight = torch.ones(16).bfloat16()
    assert_close(
        ops.add_rms_norm(x, None, weight, 1e-5), reference.add_rms_norm(x, None, weight, 1e-5)
    )


def test_no_rows(device: str) -> None:
    assert ops.act_and_mul(torch.randn(0, 32), "silu").shape == (0, 16)
    assert ops.add_rms_norm(torch.randn(0, 32), None, torch.ones(32), 1e-5).shape == (0, 32)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_of_extreme_values(device: str, act: str) -> None:
    gate = torch.tensor([[0.0, -0.0, 90.0, -90.0, 1e30, -1e30, 1e-30, float("nan")]])
    x = torch.cat([gate, torch.ones_like(gate)], dim=1)
    torch.testing.assert_close(
        ops.act_and_mul(x, act), reference.act_and_mul(x, act), rtol=1e-6, atol=1e-6, equal_nan=True
    )


def fused_qkv(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of one projection's output."""
    qkv = (
        torch.randn(tokens, (heads + 2 * kv_heads) * dim)
        .to(dtype)
        .view(tokens, heads + 2 * kv_heads, dim)
    )
    return qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "rotary"),
    [
        (1, 9, 3, 64, 64),
        (17, 4, 1, 48, 24),
        (5, 2, 2, 10, 6),
        (90, 9, 3, 64, 64),
        (90, 32, 8, 128, 128),
        (7, 4, 2, 128, 32),
        (4, 2, 1, 16, 0),
        (4, 2, 1, 5, 0),
    ],
)
def test_rope_store_kv(
    device: str,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    interleaved: bool,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary: int,
) -> None:
    q, k, v = fused_qkv(tokens, heads, kv_heads, dim, dtype)
    angles = torch.randn(200, rotary // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.randint(200, (tokens,))
    kv = torch.full((30, 3, 2, 4, kv_heads, dim), float("nan"), dtype=kv_dtype or dtype)
    slot_mapping = torch.randperm(120)[:tokens]
    expected = [t.clone() for t in (q, k, v, kv)]
    reference.rope_store_kv_(
        *expected[:3], cos_sin, positions, expected[3], slot_mapping, 1, interleaved
    )
    ops.rope_store_kv_(q, k, v, cos_sin, positions, kv, slot_mapping, 1, interleaved)
    for actual, wanted in zip((q, k, v, kv), expected, strict=True):
        assert torch.equal(actual.isnan(), wanted.isnan())
        assert_close(actual.nan_to_num(), wanted.nan_to_num())


@pytest.mark.gpu
def test_a_graph_replays_with_other_contents() -> None:
    with torch.device("cuda"):
        q, k, v = fused_qkv(6, 4, 2, 64, torch.bfloat16)
        angles = torch.randn(50, 32)
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
        positions, slot_mapping = torch.zeros(6, dtype=torch.int64), torch.arange(6)
        kv = torch.zeros(8, 2, 2, 4, 2, 64, dtype=torch.bfloat16)
        x, weight = torch.randn(6, 512).bfloat16(), torch.randn(512).bfloat16()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.rope_store_kv_(q, k, v, cos_sin, positions, kv, slot_mapping, 1, False)
        normed = ops.add_rms_norm(x, None, weight, 1e-5)
        gated = ops.act_and_mul(normed, "silu")
    for tensor in (q, k, v, x):
        tensor.normal_()
    positions.copy_(torch.randint(50, (6,)))
    slot_mapping.copy_(torch.randperm(32)[:6])
    expected = [t.clone() for t in (q, k, v, kv)]
    reference.rope_store_kv_(*expected[:3], cos_sin, positions, expected[3], slot_mapping, 1, False)
    graph.replay()
    for actual, wanted in zip((q, k, v, kv), expected, strict=True):
        assert_close(actual, wanted)
    assert_close(normed, reference.add_rms_norm(x, None, weight, 1e-5))
    assert_close(gated, reference.act_and_mul(normed, "silu"))


def rope_arguments() -> dict[str, object]:
    q, k, v = fused_qkv(3, 2, 1, 8, torch.float32)
    return {
        "q": q,
        "k": k,
        "v": v,
        "cos_sin": torch.randn(10, 8),
        "positions": torch.tensor([0, 1, 9]),
        "kv": torch.zeros(4, 2, 2, 4, 1, 8),
        "slot_mapping": torch.tensor([0, 1, 15]),
        "layer": 1,
        "interleaved": False,
    }


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("k", (3, 1, 9), torch.float32, r"k \[3, 1, 9\] does not fit q"),
        ("v", (3, 2, 8), torch.float32, "does not fit k"),
        ("v", (3, 1, 8), torch.float16, "one dtype"),
        ("cos_sin", (10, 10), torch.float32, "does not fit heads of 8"),
        ("cos_sin", (10, 8), torch.float16, "cos_sin must be float32"),
        ("positions", (2,), torch.int64, "does not fit 3 tokens"),
        ("positions", (3,), torch.int32, "must be int64"),
        ("kv", (4, 2, 2, 4, 2, 8), torch.float32, "kv .* does not fit k"),
    ],
)
def test_rope_refuses_tensors_that_do_not_fit(
    device: str, name: str, shape: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    value = torch.zeros(shape, dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        ops.rope_store_kv_(**(rope_arguments() | {name: value}))


def test_rope_refuses_a_layer_that_is_not_there(device: str) -> None:
    with pytest.raises(RuntimeError, match="layer 2 of 2"):
        ops.rope_store_kv_(**(rope_arguments() | {"layer": 2}))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("positions", [0, 1, 10], r"positions\[2\] is 10, the limit is 10"),
        ("slot_mapping", [0, -1, 2], r"slot_mapping\[1\] is -1"),
        ("slot_mapping", [0, 16, 2], r"slot_mapping\[1\] is 16, the limit is 16"),
    ],
)
def test_rope_on_the_cpu_refuses_indices_out_of_range(
    isa: str, name: str, values: list[int], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.rope_store_kv_(**(rope_arguments() | {name: torch.tensor(values)}))


def test_norm_and_activation_refuse_what_does_not_fit(device: str) -> None:
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


@pytest.mark.gpu
def test_a_weight_in_host_memory_is_refused() -> None:
    with pytest.raises(RuntimeError, match="weight must be on the GPU"):
        ops.add_rms_norm(torch.zeros(2, 6).cuda(), None, torch.zeros(6), 1e-5)
