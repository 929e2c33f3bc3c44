"""Quantised linears with bitsandbytes: 8 bits, and 4 bits as NF4 or FP4.

Each row of a weight is quantised separately, padded with zeros to whole blocks. So the parts of a fused linear are
quantised as they are read, no part is kept in full precision, and the result equals that of quantising the fused
weight. Adapters are not affected: they are added to y in the dtype of x.

A matmul does not wait for the device, and shapes alone decide its launches: it can be captured into a CUDA graph.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import ConfigError
from engine.layers.linear import LinearMethod, Part, plain_parts

ops = torch.ops.lorax
INT8_MAX = 127
HALF_MAX = 65280.0  # the largest number that float16 and bfloat16 share


class _Quantised:
    """Base of the schemes: the bias, and rows padded to a multiple of `align` columns."""

    align: int
    strip = 1 << 24  # weights quantised at a time; this takes several times their float32 size
    bias: Tensor | None = None

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype` is that of x, y and the bias."""
        self.dtype, self.device = dtype, device

    def parts(self, outputs: int, inputs: int, bias: bool, transposed: bool) -> list[Part]:
        """The parts of a checkpoint that is not quantised."""
        return plain_parts(outputs, inputs, bias, transposed)

    def allocate(self, rows: int, columns: int, bias: bool) -> None:
        self.rows, self.columns = rows, columns
        self.padded = _rounded(columns, self.align)
        if bias:
            self.bias = torch.empty(rows, dtype=self.dtype, device=self.device)

    def load(self, part: str, row: int, tensor: Tensor) -> None:
        if part == "weight":
            for strip in tensor.split(max(1, self.strip // self.padded)):
                self.quantise(slice(row, row + strip.shape[0]), strip)
                row += strip.shape[0]
        else:
            assert self.bias is not None
            self.bias[row : row + tensor.shape[0]].copy_(tensor)

    def quantise(self, rows: slice, weight: Tensor) -> None:
        """Quantises and stores `rows` of the weight."""
        raise NotImplementedError

    def whole_blocks(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """weight[n, columns] on the device as a contiguous [n, padded]."""
        padded = torch.zeros(weight.shape[0], self.padded, dtype=dtype, device=self.device)
        padded[:, : self.columns].copy_(weight)
        return padded

    def input(self, x: Tensor) -> Tensor:
        """x[T, columns] -> [T, padded]."""
        return x if self.padded == self.columns else F.pad(x, (0, self.padded - self.columns))


class Int8(_Quantised):
    """8-bit integers; each row of W and each token of x is scaled by its largest magnitude (Dettmers et al. 2022).

    LLM.int8 also multiplies the outlier columns of x in 16 bits. These columns depend on all tokens of the batch, and
    the host would have to wait for the device to learn them. Here the threshold is 0: no column is separate. Instead,
    the rounding error of x is quantised to 8 bits too and multiplied in the same pass over W, so that a token keeps 15
    bits below its largest magnitude. Integer sums are exact, so a token's result does not depend on the batch. On a
    CPU without AVX-512, bitsandbytes adds in float32, which is exact up to 1040 columns.
    """

    align = 16  # int8 matmuls need multiples of 4 and are fastest with 16
    tokens = 512  # of one product, so that its 32-bit result stays small

    def allocate(self, rows: int, columns: int, bias: bool) -> None:
        super().allocate(rows, columns, bias)
        shape = (_rounded(rows, self.align), self.padded)
        self.weight = torch.zeros(shape, dtype=torch.int8, device=self.device)
        # The value of one unit of a row times one unit of a token with largest magnitude 1.
        self.unit = torch.empty(rows, dtype=torch.float32, device=self.device)

    @property
    def size(self) -> int:
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.weight.nbytes + self.unit.nbytes + bias

    @property
    def scratch(self) -> int:
        """For one product: two 32-bit results and their sum; x and its rounding error in 8, 16 and 32 bits."""
        return self.tokens * (self.weight.shape[0] * 12 + self.padded * 20)

    def quantise(self, rows: slice, weight: Tensor) -> None:
        self.weight[rows], largest = _in_8_bits(self.whole_blocks(weight, torch.float32))
        self.unit[rows] = largest / INT8_MAX**2

    def weight_rows(self, rows: slice) -> Tensor:
        scale = self.unit[rows, None] * INT8_MAX
        return (self.weight[: self.rows, : self.columns][rows] * scale).to(self.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], self.rows)
        for part, of_part in zip(x.split(self.tokens), y.split(self.tokens), strict=True):
            self.product_(of_part, self.input(part))
        return y

    def product_(self, y: Tensor, x: Tensor) -> None:
        """Writes y[T, rows] from x[T, padded]."""
        first, coarse = _in_8_bits(x)
        error = torch.addcmul(x, first, coarse[:, None], value=-1 / INT8_MAX)  # float32
        second, fine = _in_8_bits(error)
        both = torch.ops.bitsandbytes.int8_linear_matmul(torch.cat([first, second]), self.weight)
        of_first, of_second = both[:, : self.rows].split(x.shape[0])
        sums = (of_first * coarse[:, None]).addcmul_(of_second, fine[:, None])
        if self.bias is None:
            torch.mul(sums, self.unit, out=y)
        else:
            torch.addcmul(self.bias, sums, self.unit, out=y)


class FourBit(_Quantised):
    """4 bits per weight, one float32 scale per 64 weights of a row: NF4 (quantiles of a normal distribution) or FP4.

    QLoRA, Dettmers et al. 2023. Scales are not quantised again.
    """

    align = 64  # the block of one scale
    # Up to this many tokens use the fused kernel. More tokens, and all on a CPU, multiply with the dequantised weight.
    # For few tokens, ops.linear would read that weight before it is complete.
    fused_tokens = {"cpu": 0, "cuda": 512}

    def __init__(
        self, dtype: torch.dtype, device: torch.device, kind: Literal["nf4", "fp4"]
    ) -> None:
        super().__init__(dtype, device)
        self.kind = kind
        self.fused = self.fused_tokens[device.type]

    def allocate(self, rows: int, columns: int, bias: bool) -> None:
        super().allocate(rows, columns, bias)
        self.packed = torch.empty(rows, self.padded // 2, dtype=torch.uint8, device=self.device)
        blocks = self.padded // self.align
        self.scales = torch.empty(rows, blocks, dtype=torch.float32, device=self.device)

    @property
    def size(self) -> int:
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.packed.nbytes + self.scales.nbytes + bias

    @property
    def scratch(self) -> int:
        """The dequantised weight."""
        return self.rows * self.padded * self.dtype.itemsize

    def quantise(self, rows: slice, weight: Tensor) -> None:
        whole = self.whole_blocks(weight, torch.float32)
        packed, scales = torch.ops.bitsandbytes.quantize_4bit(
            whole, self.align, self.kind, torch.uint8
        )
        self.packed[rows].copy_(packed.view_as(self.packed[rows]))
        self.scales[rows].copy_(scales.view_as(self.scales[rows]))

    def weight_rows(self, rows: slice) -> Tensor:
        return self.unpacked(rows)[:, : self.columns]

    def unpacked(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the weight with its padding, [n, padded]."""
        packed = self.packed[rows]
        shape = (packed.shape[0], self.padded)
        flat = (packed.view(-1, 1), self.scales[rows].view(-1))
        return torch.ops.bitsandbytes.dequantize_4bit(
            *flat, self.align, self.kind, shape, self.dtype
        )

    def matmul(self, x: Tensor) -> Tensor:
        x = self.input(x)
        if x.shape[0] > self.fused:
            return ops.linear(x, self.unpacked(), self.bias)
        shape = (self.rows, self.padded)
        flat = (self.packed.view(-1, 1), shape, self.scales.view(-1))
        return torch.ops.bitsandbytes.gemm_4bit(x, *flat, self.align, self.kind, bias=self.bias)


def _in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[n, k] -> (int8 [n, k], float32 [n]: the largest magnitude of each row, which maps to 127)."""
    if x.dtype != torch.float16:  # the kernel reads float16
        x = x.clamp(-HALF_MAX, HALF_MAX).to(torch.float16)
    quantised, largest, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(x, 0.0)
    return quantised, largest


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


SCHEMES: dict[str, Callable[[torch.dtype, torch.device], LinearMethod]] = {
    "bitsandbytes": Int8,
    "bitsandbytes-nf4": partial(FourBit, kind="nf4"),
    "bitsandbytes-fp4": partial(FourBit, kind="fp4"),
}


def bitsandbytes(scheme: str) -> Callable[[torch.dtype, torch.device], LinearMethod]:
    """The method of a scheme. Raises ConfigError if bitsandbytes is missing or does not work."""
    _load_bitsandbytes(scheme)
    return SCHEMES[scheme]


def _load_bitsandbytes(quantize: str) -> None:
    remedy = "pip install bitsandbytes"

    def refused(why: str, hint: str) -> ConfigError:
        return ConfigError(f"--quantize {quantize}: {why}", field="quantize", hint=hint)

    try:
        with _hidden("kernels"):
            package = importlib.import_module("bitsandbytes")
        native = importlib.import_module("bitsandbytes.cextension")
    except ImportError as error:
        raise refused(f"the package bitsandbytes cannot be imported: {error}", remedy) from None
    if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        raise refused(f"bitsandbytes {package.__version__} is too old", remedy)
    if isinstance(native.lib, native.ErrorHandlerMockBNBNativeLibrary):
        raise refused(
            f"bitsandbytes {package.__version__} has no library for this machine",
            "python -m bitsandbytes says why",
        )


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Makes `import package` fail within the block.

    On a CPU with AVX512-BF16, bitsandbytes downloads code with the package `kernels` when it is imported, and runs it.
    It has no option to prevent that, but it works without the package. None in sys.modules means "not installed".
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(
        logging.ERROR
    )  # it warns about that
    modules: dict[str, Any] = sys.modules
    found = modules.get(package)
    modules[package] = None
    try:
        yield
    finally:
        if found is None:
            del modules[package]
        else:
            modules[package] = found
