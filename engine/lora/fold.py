"""An adapter merged into the weights of its base model, tensor by tensor while the checkpoint is read.

    linear      W + s B A;  with DoRA m (W + s B A) / |W + s B A|, the norm over the inputs
    embedding   the same, transposed: its inputs are the tokens
    own rows    replace the base's before that
    bias        the trained one or the base's, + s times that of lora_B

Sums are in float32, and each result is rounded once, to the model's dtype; a linear is quantised after that. If the
base's head is its embedding and the adapter changes either of them, the model gets a head of its own.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch
from torch import Tensor

from engine.errors import AdapterIncompatible
from engine.lora.weights import LoraWeights, Matrix, OwnRows, TargetIndex, read_all
from engine.models.spec import DOWN, EMBEDDING, OUT, QKV, UP, ModelSpec, targets_of
from engine.models.weights import Tensors

UNMERGED = "serve it without --merge-adapter-weights"
STRIP_WEIGHTS = 16 << 20  # that are merged at a time, in float32

logger = logging.getLogger(__name__)


def _merged_spec(spec: ModelSpec, weights: LoraWeights) -> ModelSpec:
    """The base's spec, with a head of its own and biases if the adapter needs them. Raises AdapterIncompatible."""
    last = spec.num_layers
    for own in weights.own.values():
        if own.vocab != spec.vocab:
            sizes = f"{own.module} has {own.vocab} tokens, and the base model {spec.vocab}"
            raise _refused(f"{sizes}: another vocabulary cannot be merged")
    shifted = {place: one for place, one in weights.extras.items() if one.shift is not None}
    for place, one in shifted.items():
        if place.layer == last:
            raise _refused(f"{one.module} has a bias in the adapter, and none in the base model")
    groups = {place.group for place in shifted}
    attention, mlp = spec.attention, spec.mlp
    attention = replace(
        attention,
        qkv_bias=attention.qkv_bias or QKV in groups,
        out_bias=attention.out_bias or OUT in groups,
    )
    mlp = replace(mlp, bias=mlp.bias or bool(groups & {UP, DOWN}))
    parts = (weights.pairs, weights.extras, weights.own)
    tied = spec.tied and not any(place.layer == last for part in parts for place in part)
    return replace(spec, attention=attention, mlp=mlp, tied=tied)


def _refused(why: str) -> AdapterIncompatible:
    return AdapterIncompatible(why, field="merge_adapter_weights", hint=UNMERGED)


class Fold:
    """Merges one adapter into the tensors of a checkpoint. `spec` is that of the merged model."""

    def __init__(self, weights: LoraWeights, base: ModelSpec, dtype: torch.dtype) -> None:
        """`dtype`: of the model. Raises AdapterIncompatible for what the merged model cannot have."""
        self._weights, self._base, self._dtype = weights, base, dtype
        self.spec = _merged_spec(base, weights)
        places = {
            target.module.format(layer=layer): TargetIndex(layer, number, index)
            for layer, number, group in targets_of(base).each_group()
            for index, target in enumerate(group.targets)
        }
        self._weight_of = {f"{module}.weight": place for module, place in places.items()}
        self._bias_of = {f"{module}.bias": place for module, place in places.items()}

    def __call__(self, tensors: Tensors) -> Tensors:
        """The tensors of the merged model, from those of the base. Raises AdapterError."""
        started = time.perf_counter()
        ends = (f"{self._base.names.embedding}.weight", f"{self._base.names.head}.weight")
        split = self._base.tied and not self.spec.tied
        for name, tensor in tensors:
            if split and name in ends:
                if name == ends[EMBEDDING]:  # a tied head that a checkpoint has as well is not used
                    for end in ends:
                        yield end, self._weight(self._weight_of[end], tensor)
            elif name in self._weight_of:
                yield name, self._weight(self._weight_of[name], tensor)
            elif name in self._bias_of:
                yield name, self._bias(self._bias_of[name], tensor)
            else:
                yield name, tensor
        yield from self._new_biases()
        self._weights.verify()
        seconds = time.perf_counter() - started
        logger.info("merged an adapter into the weights, read in %.1f s", seconds)

    def _new_biases(self) -> Tensors:
        """The biases of linears that have none in the base."""
        old = targets_of(self._base).each_group()
        new = targets_of(self.spec).each_group()
        for (layer, number, before), (_, _, after) in zip(old, new, strict=True):
            if before.bias == after.bias:
                continue
            for index, target in enumerate(after.targets):
                bias = self._bias(
                    TargetIndex(layer, number, index), torch.zeros(target.out_features)
                )
                yield f"{target.module.format(layer=layer)}.bias", bias

    def _weight(self, place: TargetIndex, stored: Tensor) -> Tensor:
        """The merged weight, in the orientation of the checkpoint."""
        pair, extras = self._weights.pairs.get(place), self._weights.extras.get(place)
        own = self._weights.own.get(place)
        if own is not None:
            stored = _with_own_rows(stored, own)
        magnitude = None if extras is None else extras.magnitude
        if pair is None:
            return stored if own is None else self._checked(stored.to(self._dtype), own.module)
        in_ends = place.layer == self._base.num_layers
        turned = place.group == EMBEDDING if in_ends else self._base.names.transposed
        made = torch.empty_like(stored, dtype=self._dtype)
        base, out = (stored.T, made.T) if turned else (stored, made)  # [outputs, inputs]
        a, b = read_all(pair.a).float(), read_all(pair.b).float()
        scales = None if magnitude is None else _vector(magnitude)
        step = max(1, STRIP_WEIGHTS // base.shape[1])
        for first in range(0, base.shape[0], step):
            part = slice(first, first + step)
            new = torch.addmm(base[part].float(), b[part], a, alpha=pair.scale)
            if scales is not None:
                square = torch.linalg.vecdot(new, new).clamp_(min=torch.finfo(torch.float32).tiny)
                new *= (scales[part] * square.rsqrt())[:, None]
            out[part] = new
        return self._checked(made, pair.module)

    def _bias(self, place: TargetIndex, stored: Tensor) -> Tensor:
        extras = self._weights.extras.get(place)
        if extras is None:
            return stored
        new = stored.float() if extras.bias is None else _vector(extras.bias)
        if extras.shift is not None:
            new = new + extras.shift_scale * _vector(extras.shift)
        return self._checked(new.to(self._dtype), extras.module)

    def _checked(self, merged: Tensor, module: str) -> Tensor:
        if not merged.isfinite().all():
            raise AdapterIncompatible(
                f"{module} has values that are not finite in {str(self._dtype).removeprefix('torch.')} when merged",
                field=module,
                hint=f"check whether the training diverged, or {UNMERGED}",
            )
        return merged


def _with_own_rows(stored: Tensor, own: OwnRows) -> Tensor:
    """A copy of embedding or head [vocab, hidden] with the adapter's rows, in a dtype that has both."""
    rows = read_all(own.rows)
    made = stored.to(torch.promote_types(stored.dtype, rows.dtype), copy=True)
    made[own.ids.long()] = rows.to(made.dtype)
    return made


def _vector(values: Matrix) -> Tensor:
    """A vector [1, N] as [N] float32."""
    return read_all(values)[0].float()
