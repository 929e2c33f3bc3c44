"""Normalisation, fused with the residual addition that comes before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ops = torch.ops.lorax


class RmsNorm:
    def __init__(self, width: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(width, dtype=dtype, device=device)
        self.bias: Tensor | None = None
        self.eps = eps

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm:
    """Ba et al. 2016."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(width, dtype=dtype, device=device)
        self.bias: Tensor | None = torch.empty(width, dtype=dtype, device=device)
        self.eps = eps

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            x = residual.add_(x)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def norm(
    kind: str, eps: float, width: int, dtype: torch.dtype, device: torch.device
) -> RmsNorm | LayerNorm:
    """`kind` is rms or layer."""
    make = RmsNorm if kind == "rms" else LayerNorm
    return make(width, eps, dtype, device)
