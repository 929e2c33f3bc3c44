"""Quantised linears against the weights that they stand for; the GPU's tests are `test_cuda_quantised.py`."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.layers import quantised
from engine.layers.linear import Plain
from engine.layers.methods import method_of
from engine.layers.quantised import SCHEMES, FourBit, Int8
from engine.ops import extension

extension.load()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(192, 128), (33, 50), (7, 1), (1, 130), (260, 1000)]
TOKENS = [1, 5, 40, 600]
CPU = torch.device("cpu")
Method = Int8 | FourBit

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Another seed every time, shown when the test fails."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    yield


def empty(
    scheme: str, dtype: torch.dtype, device: torch.device, shape: tuple[int, int], bias: bool
) -> Method:
    method = method_of(scheme)(dtype, device)
    assert isinstance(method, Int8 | FourBit)
    method.allocate(*shape, bias)
    return method


def make(
    scheme: str, dtype: torch.dtype, device: torch.device, shape: tuple[int, int], bias: bool = True
) -> tuple[Method, Tensor, Tensor]:
    """A method with a random weight, the weight, and the bias (zeros if there is none)."""
    method = empty(scheme, dtype, device, shape, bias)
    weight = torch.randn(shape) * torch.rand(shape[0], 1) * 0.1
    weight[0, 0] = 1.0  # one value far out
    method.load("weight", 0, weight)
    added = torch.randn(shape[0]).to(dtype) if bias else torch.zeros(shape[0], dtype=dtype)
    if bias:
        method.load("bias", 0, added)
    return method, weight, added


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random tokens; one is zero, in one a single column is far beyond the others."""
    x = torch.randn(tokens, columns)
    x[tokens // 2, 0] = 300.0
    if tokens > 1:
        x[-1] = 0.0
    return x.to(dtype)


def assert_product(method: Method, y: Tensor, x: Tensor, bias: Tensor, loose: float = 0.0) -> None:
    """y is x @ dequantised.T + bias, up to rounding; `loose`: of each product of the sum, more than that."""
    assert y.dtype == x.dtype and y.is_contiguous()
    x, y, bias = x.double(), y.double(), bias.to(y.device).double()
    weight = method.weight_rows(slice(None)).double()
    expected = x @ weight.T + bias
    eps = torch.finfo(method.dtype).eps
    products = x.abs() @ weight.abs().T
    added_in = (x.shape[1] + 2) * 2.0**-24 + loose  # roundings of a float32 sum
    allowed = eps * expected.abs() + added_in * (products + bias.abs()) + 1e-7
    if isinstance(method, Int8):
        # Half of the last of 15 bits, of a token's largest magnitude, and a little as float16 rounds what is quantised;
        # the dequantised weight is rounded, too: that of a row of tiny weights to a subnormal number of float16.
        finest = x.abs().amax(1, keepdim=True) / (2 * 127) ** 2
        subnormal = torch.finfo(method.dtype).smallest_normal * eps * x.abs().sum(1, keepdim=True)
        allowed += 1.3 * finest * weight.abs().sum(1) + eps * products + subnormal / 2
    assert ((y - expected).abs() <= allowed).all(), ((y - expected).abs() / allowed).max()


@every_scheme
@every_dtype
@every_shape
def test_matmul_is_that_of_the_dequantised_weight(
    scheme: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    for bias in (False, True):
        method, _, added = make(scheme, dtype, CPU, shape, bias)
        for tokens in TOKENS:
            x = inputs(tokens, shape[1], dtype)
            assert_product(method, method.matmul(x), x, added)


@every_dtype
@every_shape
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_fused_4_bits_are_those_of_the_dequantised_weight(
    kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    method, _, added = make(f"bitsandbytes-{kind}", dtype, CPU, shape)
    assert isinstance(method, FourBit)
    method.fused = 8
    for tokens in (1, 8, 9):
        x = inputs(tokens, shape[1], dtype)
        assert_product(method, method.matmul(x), x, added)


def test_8_bits_hold_what_float16_does_not() -> None:
    method, _, added = make("bitsandbytes", torch.bfloat16, CPU, (48, 64))
    x = (torch.randn(3, 64) * 1000.0).to(torch.bfloat16)
    x[1, 5] = 90000.0
    y, expected = method.matmul(x), x.double() @ method.weight_rows(slice(None)).double().T + added
    assert ((y - expected).norm(dim=1) <= 0.02 * expected.norm(dim=1)).all()


@every_scheme
@every_dtype
def test_a_token_alone_is_the_token_in_a_batch(scheme: str, dtype: torch.dtype) -> None:
    method, _, _ = make(scheme, dtype, CPU, (96, 130))
    x = inputs(530, 130, dtype)
    y = method.matmul(x)
    for token in (0, 1, 264, 265, 511, 512, 529):
        assert torch.equal(method.matmul(x[token : token + 1])[0], y[token])


def assert_near(method: Method, weight: Tensor) -> None:
    """The dequantised weight is the nearest that the scheme has, by blocks of 64 columns of a row, or by the row."""
    columns = weight.shape[1]
    block = columns if isinstance(method, Int8) else 64
    # Half of the widest gap between neighbours, of the block's largest magnitude.
    gap = {Int8: 0.5 / 127, FourBit: 0.17}[type(method)]
    found = method.weight_rows(slice(None)).cpu().float()
    rounding = torch.finfo(method.dtype).eps + 2**-11
    for first in range(0, columns, block):
        part = slice(first, first + block)
        largest = weight[:, part].abs().amax(1, keepdim=True)
        off = (found[:, part] - weight[:, part]).abs()
        assert (off <= largest * (gap + rounding) + 1e-7).all()


@every_scheme
@every_dtype
@every_shape
def test_dequantised_is_near_the_weight(
    scheme: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    method, weight, _ = make(scheme, dtype, CPU, shape)
    assert_near(method, weight)


def assert_parts_make_the_whole(scheme: str, device: torch.device, shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        whole, weight, bias = make(scheme, dtype, device, shape)
        parts = empty(scheme, dtype, device, shape, True)
        parts.strip = 3 * parts.padded  # three rows at a time
        rows = shape[0]
        cuts = sorted({0, rows // 3, rows // 3 + 1, rows})
        for first, last in reversed(list(zip(cuts, cuts[1:], strict=False))):
            # As a checkpoint that keeps it transposed hands it over.
            parts.load("weight", first, weight[first:last].T.contiguous().T)
            parts.load("bias", first, bias[first:last])
        assert torch.equal(parts.weight_rows(slice(None)), whole.weight_rows(slice(None)))
        x = inputs(5, shape[1], dtype).to(device)
        assert torch.equal(parts.matmul(x), whole.matmul(x))


@every_scheme
@every_shape
def test_parts_make_the_whole(scheme: str, shape: tuple[int, int]) -> None:
    assert_parts_make_the_whole(scheme, CPU, shape)


@every_scheme
def test_what_is_held(scheme: str) -> None:
    method = empty(scheme, torch.bfloat16, CPU, (256, 512), True)
    weight = torch.randn(256, 512)
    read = weakref.ref(weight)
    method.load("weight", 0, weight)
    del weight
    assert read() is None  # nothing of the weight is kept but what was made of it
    held = [value for value in vars(method).values() if isinstance(value, Tensor)]
    assert method.size == sum(tensor.nbytes for tensor in held)
    bits = {"bitsandbytes": 8 + 32 / 512}.get(scheme, 4 + 32 / 64)
    assert method.size == 256 * 512 * bits / 8 + 256 * 2


def test_without_quantisation_the_method_is_plain() -> None:
    assert method_of(None) is Plain


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ConfigError, match="--quantize bitsandbytes-nf4.*cannot be imported"
    ) as error:
        method_of("bitsandbytes-nf4")
    assert error.value.field == "quantize" and "pip install" in str(error.value.hint)


def test_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "bitsandbytes", SimpleNamespace())
    with pytest.raises(ConfigError, match="too old"):
        method_of("bitsandbytes")


def test_package_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import cextension

    broken = cextension.ErrorHandlerMockBNBNativeLibrary("none")
    monkeypatch.setattr(cextension, "lib", broken)
    with pytest.raises(ConfigError, match="no library") as error:
        method_of("bitsandbytes")
    assert error.value.hint == "python -m bitsandbytes says why"


def test_hidden_package_is_back_afterwards() -> None:
    with quantised._hidden("json"), pytest.raises(ImportError):
        import json as _  # noqa: F401
    assert sys.modules["json"] is json
    with quantised._hidden("no_such_package"):
        pass
    assert "no_such_package" not in sys.modules


def test_package_is_imported_when_it_is_asked_for() -> None:
    program = "import sys, engine.engine; print('bitsandbytes' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
