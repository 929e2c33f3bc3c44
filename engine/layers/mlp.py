"""The feed-forward part: gated (Shazeer 2020) or plain."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.layers.batch import LoraBatch
from engine.layers.linear import Linear

ops = torch.ops.lorax

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square_(),  # So et al. 2021
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Mlp:
    def __init__(self, up: Linear, down: Linear, act: str, gated: bool) -> None:
        self.up, self.down = up, down
        self.act: Callable[[Tensor], Tensor] = (
            (lambda x: ops.act_and_mul(x, act)) if gated else PLAIN[act]
        )

    def __call__(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        return self.down(self.act(self.up(x, lora)), lora)
