"""Own rows of an adapter in an image, and those of its file that are no different from the base's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.lora.weights import LoraWeights, OwnRows, Picked, TargetIndex
from engine.lora.writer import CHUNK_BYTES, Writer
from engine.ops.layout import ShardLayout, own_ids_start, own_rows_start, padded
from engine.ops.targets import ModelTargets


class Tables(Protocol):
    """Embedding and head of the base model."""

    def rows(self, module: str, start: int, stop: int) -> Tensor | None:
        """Rows of the matrix of a module; None: not known."""


def own_bytes(own: OwnRows, itemsize: int) -> int:
    """Bytes of header, ids and rows."""
    count, hidden = own.rows.shape
    return own_rows_start(0, count) + count * padded(hidden * itemsize)


def write_own(writer: Writer, data: Tensor, offset: int, own: OwnRows) -> None:
    """Writes header, ids and rows at byte `offset` of `data` [bytes] uint8. Raises what `Writer` raises."""
    count = len(own.ids)
    ids_at, rows_at = own_ids_start(offset), own_rows_start(offset, count)
    data[offset:rows_at].zero_()
    data[offset : offset + 8].view(torch.int32).copy_(torch.tensor([count, own.vocab]))
    data[ids_at : ids_at + 4 * count].view(torch.int32).copy_(own.ids)
    writer.straight(own.rows, rows_at, own.module)


def without_base_rows(
    weights: LoraWeights,
    layout: ShardLayout,
    tables: Tables,
    pause: Callable[[], None] = lambda: None,
) -> LoraWeights:
    """The same weights without own rows that equal the base's in the layout's dtype.

    PEFT saves copies of the base's embedding and head if they are targets, or if the vocabulary was resized.
    """
    own, dtype = dict(weights.own), getattr(torch, layout.dtype)
    for place, rows in weights.own.items():
        base = layout.targets.ends[place.group]
        kept = _changed(rows, base.vocab, tables, dtype, pause)
        if kept is None:
            continue
        if len(kept) or rows.vocab != base.vocab:
            own[place] = replace(rows, ids=rows.ids[kept], rows=Picked(rows.rows, kept))
        else:
            del own[place]
    return replace(weights, own=own)


def _changed(
    own: OwnRows, vocab: int, tables: Tables, dtype: torch.dtype, pause: Callable[[], None]
) -> Tensor | None:
    """Which of the rows differ from the base's, [m] int64; None: the base's are not known."""
    count, hidden = own.rows.shape
    step = max(1, CHUNK_BYTES // (hidden * own.rows.dtype.itemsize))
    kept = []
    for start in range(0, count, step):
        pause()
        ids = own.ids[start : start + step].long()
        part = torch.empty(len(ids), hidden, dtype=own.rows.dtype)
        own.rows.read(start, start + len(ids), part.view(torch.uint8).numpy().reshape(-1).data)
        inside = ids < vocab
        first, last = int(ids[0]), min(int(ids[-1]) + 1, vocab)
        differs = torch.ones(len(ids), dtype=torch.bool)
        if first < last:
            base = tables.rows(own.module, first, last)
            if base is None:
                return None
            same = (part[inside].to(dtype) == base[ids[inside] - first].to(dtype)).all(1)
            differs[inside] = ~same
        kept.append(differs.nonzero().flatten() + start)
    return torch.cat(kept) if kept else torch.empty(0, dtype=torch.int64)


class CheckpointTables:
    """Embedding and head in the safetensors files of a folder. A tied head is the embedding."""

    def __init__(self, folder: Path, targets: ModelTargets) -> None:
        self._folder = folder
        self._names = {end.targets[0].module: end.targets[0].module for end in targets.ends}
        if targets.tied:
            self._names = dict.fromkeys(self._names, targets.ends[0].targets[0].module)
        self._files: dict[str, Path | None] = {}

    def rows(self, module: str, start: int, stop: int) -> Tensor | None:
        """See `Tables`."""
        from safetensors import SafetensorError, safe_open

        name = f"{self._names[module]}.weight"
        try:
            if name not in self._files:
                self._files[name] = self._find(name)
            path = self._files[name]
            if path is None:
                return None
            with safe_open(path, framework="pt") as file:
                return file.get_slice(name)[start:stop]
        except (OSError, SafetensorError):
            return None

    def _find(self, name: str) -> Path | None:
        from safetensors import safe_open

        for path in sorted(self._folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 - not a mapping
                    return path
        return None


def vocab_of(own: Mapping[TargetIndex, OwnRows], targets: ModelTargets) -> int:
    """The adapter's vocabulary; 0: that of the base."""
    found = {rows.vocab for rows in own.values()} - {end.vocab for end in targets.ends}
    return min(found, default=0)
