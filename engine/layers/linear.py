"""Linears: a method that multiplies, and the LoRA op split around it.

A method names the tensors that it takes from a checkpoint (`parts`), and has `allocate`, `load` and `matmul`. It does
not depend on LoRA. A linear is fused from the checkpoint's linears and has the sizes of its shard. Its group lists the
LoRA targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.layers.batch import LoraBatch
from engine.ops.layout import PAIRS, REPLACES, RESCALES, GroupPart

ops = torch.ops.lorax


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor that a method takes from the checkpoint for each fused linear.

    `outputs` is the dimension along the linear's outputs: fused parts are stacked along it, and a column-parallel
    linear is cut along it. `inputs` is the dimension along its inputs: a row-parallel linear is cut along it. None: the
    tensor has no such dimension, and every shard takes all of it.
    """

    name: str  # after the module's path: "weight"
    shape: tuple[int, ...]  # in the checkpoint
    outputs: int | None
    inputs: int | None


def plain_parts(outputs: int, inputs: int, bias: bool, transposed: bool) -> list[Part]:
    """A weight [outputs, inputs], or [inputs, outputs] if it is `transposed`, and a bias."""
    if transposed:
        weight = Part("weight", (inputs, outputs), 1, 0)
    else:
        weight = Part("weight", (outputs, inputs), 0, 1)
    return [weight, *([Part("bias", (outputs,), 0, None)] if bias else [])]


class LinearMethod(Protocol):
    """How a linear holds and multiplies its weight: plain or quantised."""

    bias: Tensor | None  # [outputs], in the dtype of y

    def parts(self, outputs: int, inputs: int, bias: bool, transposed: bool) -> list[Part]:
        """The tensors of one linear in the checkpoint, with these whole sizes."""

    @property
    def size(self) -> int:
        """Bytes of the stored weight and bias."""

    @property
    def scratch(self) -> int:
        """Bytes that a matmul takes besides x and y, at most."""

    def allocate(self, rows: int, columns: int, bias: bool) -> None:
        """Allocates a `[rows, columns]` weight."""

    def load(self, part: str, row: int, tensor: Tensor) -> None:
        """Loads outputs `row` .. of the part of this name; outputs are the tensor's first dimension."""

    def matmul(self, x: Tensor) -> Tensor:
        """x[T, columns] -> [T, rows]."""

    def weight_rows(self, rows: slice) -> Tensor:
        """Rows of the weight that `matmul` multiplies with, [n, columns] in the dtype of x."""


class Plain:
    """A weight in the model's dtype, not quantised."""

    weight: Tensor
    bias: Tensor | None = None
    scratch = 0

    def __init__(
        self, dtype: torch.dtype, device: torch.device, weight: Tensor | None = None
    ) -> None:
        """`weight`: a matrix to share (tied embeddings)."""
        self.dtype, self.device = dtype, device
        if weight is not None:
            self.weight = weight

    @property
    def size(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def parts(self, outputs: int, inputs: int, bias: bool, transposed: bool) -> list[Part]:
        return plain_parts(outputs, inputs, bias, transposed)

    def allocate(self, rows: int, columns: int, bias: bool) -> None:
        if not hasattr(self, "weight"):
            self.weight = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        if bias:
            self.bias = torch.empty(rows, dtype=self.dtype, device=self.device)

    def load(self, part: str, row: int, tensor: Tensor) -> None:
        whole = self.weight if part == "weight" else self.bias
        assert whole is not None
        whole[row : row + tensor.shape[0]].copy_(tensor)

    def matmul(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def weight_rows(self, rows: slice) -> Tensor:
        return self.weight[rows]


class Linear:
    """y = x W.T + b, plus the update of each token's adapter."""

    def __init__(
        self, method: LinearMethod, group: GroupPart, address: tuple[int, int], room: int = 0
    ) -> None:
        """`address` is (layer, group number): where the group's records are.

        `room`: outputs behind the base's that own rows may add. They are there, -inf where no row is, in steps with
        an adapter that has own rows.
        """
        self.group = group
        self.layer, self.number = address
        self.splits = [target.out_features for target in group.targets]
        self.method = method
        self.bias, self.room = group.whole.bias, room
        method.allocate(sum(self.splits), group.in_features, self.bias)

    def __call__(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        y = self.method.matmul(x)
        if lora is None or not (does := lora.touched[self.layer][self.number]):
            return y
        where = (lora.arena, lora.records, lora.slots, lora.segment_starts, self.layer, self.number)
        whole = y
        if does & REPLACES:
            whole = F.pad(y, (0, self.room), value=float("-inf"))
            ops.lora_own_logits_(whole, x, *where)
            y = whole[:, : y.shape[1]]
        if does & PAIRS:
            t = ops.lora_shrink(x, *where, lora.stacked_rank, overlap=not does & REPLACES)
            ops.lora_expand_(y, t, *where, self.splits)
        if does & RESCALES:
            ops.lora_rescale_(y, *where)
        return whole

    @property
    def base_bias(self) -> Tensor | None:
        return self.method.bias

    def weight_rows(self, rows: slice) -> Tensor:
        """Rows of the base weight [N, K], in the model's dtype."""
        return self.method.weight_rows(rows)


class Embedding:
    """Rows of a table by token id, plus the update of each token's adapter."""

    def __init__(
        self, group: GroupPart, address: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.group = group
        self.layer, self.number = address
        self.splits = [group.targets[0].out_features]
        self.table = torch.empty(group.in_features, self.splits[0], dtype=dtype, device=device)

    def __call__(self, ids: Tensor, lora: LoraBatch | None) -> Tensor:
        if lora is None or not (does := lora.touched[self.layer][self.number]):
            return self.table[ids]
        where = (lora.arena, lora.records, lora.slots, lora.segment_starts, self.layer, self.number)
        if does & REPLACES:
            y = self.table[ids.clamp(max=self.table.shape[0] - 1)]
            ops.lora_own_rows_(y, ids, *where)
        else:
            y = self.table[ids]
        if does & PAIRS:
            t = ops.lora_gather(ids, *where, lora.stacked_rank, self.table.dtype)
            ops.lora_expand_(y, t, *where, self.splits)
        if does & RESCALES:
            ops.lora_rescale_(y, *where)
        return y

    base_bias: Tensor | None = None

    def weight_rows(self, rows: slice) -> Tensor:
        """Features of every row of the table: rows of its transpose [hidden, vocab]."""
        return self.table[:, rows].T
