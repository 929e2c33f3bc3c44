"""The extras of a group in an image: what an adapter does to outputs besides its pairs. See `engine.ops.layout`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import AdapterIncompatible
from engine.lora.weights import Extras, Matrix, read_all
from engine.ops.layout import (
    EXTRAS,
    FLAG_OWN_BIAS,
    FLAG_SCALED,
    FLAG_SHIFT,
    SCALED,
    GroupPart,
    TargetPart,
    padded,
)
from engine.ops.reference import extras as rows_at


def flags_of(group: GroupPart, extras: Sequence[Extras | None]) -> int:
    """The flags of a record about extras, by target; 0: there are none."""
    flags = 0
    for target, found in enumerate(extras):
        if found is None:
            continue
        if found.magnitude is not None:
            # A scaled output loses the base's bias, which the shift gives back.
            flags |= FLAG_SCALED << target | (FLAG_SHIFT if group.whole.bias else 0)
        if found.bias is not None:
            flags |= FLAG_OWN_BIAS << target
        if found.bias is not None or found.shift is not None:
            flags |= FLAG_SHIFT
    return flags


def extras_bytes(group: GroupPart, flags: int) -> int:
    """Bytes of the rows."""
    rows = bool(flags & SCALED) + bool(flags & FLAG_SHIFT)
    return rows * padded(4 * group.out_features)


def write_extras(
    data: Tensor, offset: int, group: GroupPart, extras: Sequence[Extras | None]
) -> None:
    """Writes the rows at byte `offset` of `data` [bytes] uint8. Raises AdapterIncompatible or AdapterLoadFailed."""
    flags = flags_of(group, extras)
    if not flags & EXTRAS:
        return
    data[offset : offset + extras_bytes(group, flags)].zero_()
    scale, shift = rows_at(data[offset:], 0, flags, group.out_features)
    if scale is not None:
        scale.fill_(1.0)
    column = 0
    for target, found in zip(group.targets, extras, strict=True):
        part = slice(column, column + target.out_features)
        column += target.out_features
        if found is None:
            continue
        if scale is not None and found.magnitude is not None:
            scale[part] = _values(found.magnitude, target, found.module)
        if shift is not None and found.shift is not None:
            shift[part] += found.shift_scale * _values(found.shift, target, found.module)
        if shift is not None and found.bias is not None:
            shift[part] += _values(found.bias, target, found.module)


def _values(vector: Matrix, target: TargetPart, module: str) -> Tensor:
    """The shard's part of a vector [1, N], float32. Raises AdapterIncompatible if a value is not finite."""
    values = read_all(vector)[0].float()
    if not values.isfinite().all():
        raise AdapterIncompatible(
            f"{module} has values that are not finite",
            field=module,
            hint="check whether the training diverged",
        )
    return torch.cat([values[span.start : span.stop] for span in target.outputs])
