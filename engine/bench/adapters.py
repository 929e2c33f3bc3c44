"""Random adapters: as images in a host region, and as PEFT folders.

Values come from one pool of random numbers. Each adapter starts at another offset of the pool, so all adapters differ
and making one costs a copy.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.adapters.tiers import HostRegion
from engine.errors import ConfigError
from engine.lora.image import ImageSize, image_size, write_image, write_records
from engine.lora.weights import LoraWeights, Pair, TargetIndex, TensorMatrix
from engine.messages import AdapterImageRef, aligned
from engine.ops.layout import ALIGN, ShardLayout

SCALE = 0.5  # of every adapter; not 1, so that an ignored scale changes results
DEVIATION = 0.02  # of every value of A and B
POOL_VALUES = (1 << 23) + 61  # not a multiple of any row, so that no two rows are equal
SHIFT = 8209  # offset in the pool from one adapter to the next; a prime number
SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Pool:
    """A ring of random numbers without zeros."""

    def __init__(self, dtype: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(POOL_VALUES, generator=generator) * DEVIATION
        least = DEVIATION / 1000
        values = torch.where(values.abs() < least, least, values)
        self.values = values.to(getattr(torch, dtype))

    def pieces(self, number: int, count: int) -> Iterator[Tensor]:
        """`count` values in pieces, from the offset of adapter `number`."""
        at = number * SHIFT % POOL_VALUES
        while count > 0:
            piece = self.values[at : at + count]
            yield piece
            count -= len(piece)
            at = 0

    def fill(self, out: Tensor, number: int) -> None:
        """Fills `out` [n], of the pool's dtype, with values."""
        done = 0
        for piece in self.pieces(number, len(out)):
            out[done : done + len(piece)].copy_(piece)
            done += len(piece)


@dataclass(frozen=True, slots=True)
class _Template:
    """The common parts of the images of one rank."""

    size: ImageSize
    head: Tensor  # [data_start] uint8: records and zeros
    padding: Tensor | None  # [values] bool: padding of rows; None: rows have no padding


def _ones(layout: ShardLayout, rank: int, targets: Sequence[str]) -> LoraWeights:
    """An adapter of ones, in views without memory. Empty `targets`: every linear of the layers."""
    pairs: dict[TargetIndex, Pair] = {}
    one = torch.ones(1, 1, dtype=getattr(torch, layout.dtype))
    for layer, number, group in layout.targets.each_group():
        for index, target in enumerate(group.targets):
            if target.name in targets if targets else layer < layout.num_layers:
                a = TensorMatrix(one.expand(rank, group.in_features))
                b = TensorMatrix(one.expand(target.out_features, rank))
                pairs[TargetIndex(layer, number, index)] = Pair(a, b, SCALE, target.module)
    return LoraWeights(pairs)


def size_of(layout: ShardLayout, rank: int, targets: Sequence[str] = ()) -> ImageSize:
    """Size of the image of an adapter of this rank."""
    return image_size(_ones(layout, rank, targets), layout)


def check_targets(layout: ShardLayout, targets: Sequence[str]) -> None:
    """Raises ConfigError for an unknown target."""
    known = layout.targets.names
    if unknown := sorted(set(targets) - set(known)):
        raise ConfigError(
            f"--targets: the model has no module {unknown[0]!r}",
            field="targets",
            hint=f"choose from {', '.join(known)}",
        )


class Images:
    """Adapters in their own host region: `adapters` of each mix of ranks.

    The region has at least `room` bytes.
    """

    def __init__(
        self,
        layout: ShardLayout,
        mixes: Sequence[Sequence[int]],
        adapters: int,
        targets: Sequence[str] = (),
        seed: int = 0,
        room: int = 0,
    ) -> None:
        check_targets(layout, targets)
        templates = {
            rank: _template(layout, rank, targets) for rank in {*sum(map(tuple, mixes), ())}
        }
        ranks = [[mix[index % len(mix)] for index in range(adapters)] for mix in mixes]
        sizes = [templates[rank].size.total for mix in ranks for rank in mix]
        self.region = HostRegion.create(max(room, sum(map(aligned, sizes))))
        host = torch.frombuffer(self.region.view, dtype=torch.uint8)
        pool = Pool(layout.dtype, seed)
        self.mixes: list[list[AdapterImageRef]] = []
        offset = number = 0
        for mix in ranks:
            refs: list[AdapterImageRef] = []
            for rank in mix:
                template = templates[rank]
                end = offset + template.size.total
                _write(template, host[offset:end], pool, number)
                digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=16).digest()
                name = f"random-{number}-rank-{rank}"
                size = template.size
                ref = AdapterImageRef(digest, offset, size.data_bytes, size.stacked_rank, name)
                refs.append(ref)
                offset = aligned(end)
                number += 1
            self.mixes.append(refs)

    @property
    def arena_bytes(self) -> int:
        """Bytes of all adapters in the arena."""
        return sum(aligned(ref.data_bytes) for mix in self.mixes for ref in mix)


def _template(layout: ShardLayout, rank: int, targets: Sequence[str]) -> _Template:
    weights = _ones(layout, rank, targets)
    size = image_size(weights, layout)
    head = torch.empty(size.data_start, dtype=torch.uint8)
    write_records(weights, layout, head.numpy().data)
    dtype = getattr(torch, layout.dtype)
    lengths = [
        length
        for _, _, group in layout.each_group()
        for length in (
            rank if group.whole.embedding else group.in_features,
            *(target.out_features for target in group.targets),
        )
    ]
    if not any(length * dtype.itemsize % ALIGN for length in lengths):
        return _Template(size, head, None)
    image = torch.empty(size.total, dtype=torch.uint8)
    write_image(weights, layout, image.numpy().data)
    return _Template(size, head, image[size.data_start :].view(dtype) == 0)


def _write(template: _Template, out: Tensor, pool: Pool, number: int) -> None:
    """Writes one adapter's image: the template's records, the pool's values."""
    start = template.size.data_start
    out[:start].copy_(template.head)
    data = out[start:].view(pool.values.dtype)
    pool.fill(data, number)
    if template.padding is not None:
        data.masked_fill_(template.padding, 0)


# -- PEFT folders


class Folders:
    """Adapters of one rank in PEFT's files. `write` writes the values; `link` shares them and takes no time."""

    def __init__(
        self, layout: ShardLayout, rank: int, targets: Sequence[str] = (), seed: int = 0
    ) -> None:
        check_targets(layout, targets)
        self._pool = Pool(layout.dtype, seed)
        itemsize = self._pool.values.dtype.itemsize
        header: dict[str, object] = {}
        end = 0
        names: set[str] = set()
        for layer in range(layout.num_layers):
            for group in layout.targets.groups:
                for target in group.targets:
                    if targets and target.name not in targets:
                        continue
                    names.add(target.name)
                    module = f"base_model.model.{target.module.format(layer=layer)}"
                    shapes = {"A": (rank, group.in_features), "B": (target.out_features, rank)}
                    for half, shape in shapes.items():
                        start, end = end, end + shape[0] * shape[1] * itemsize
                        header[f"{module}.lora_{half}.weight"] = {
                            "dtype": SAFETENSORS[layout.dtype],
                            "shape": shape,
                            "data_offsets": (start, end),
                        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        # safetensors: the header's length in 8 bytes, little-endian; the header; the tensors
        self._head = len(text).to_bytes(8, "little") + text
        self._config = {"peft_type": "LORA", "r": rank, "target_modules": sorted(names)}
        self.num_bytes = end  # of the values of an adapter

    def write(self, folder: Path, number: int) -> None:
        """Writes a folder with its own values."""
        self._describe(folder, SCALE)
        count = self.num_bytes // self._pool.values.element_size()
        with (folder / "adapter_model.safetensors").open("wb") as file:
            file.write(self._head)
            for piece in self._pool.pieces(number, count):
                file.write(piece.view(torch.uint8).numpy().data)

    def link(self, folder: Path, written: Path, number: int) -> None:
        """Writes a folder that shares the values of `written` on disk. Its scale differs, so the adapter does."""
        self._describe(folder, SCALE * (1 + (number + 1) / 4096))
        os.link(written / "adapter_model.safetensors", folder / "adapter_model.safetensors")

    def _describe(self, folder: Path, scale: float) -> None:
        folder.mkdir(parents=True)
        config = self._config | {"lora_alpha": scale * int(str(self._config["r"]))}
        (folder / "adapter_config.json").write_text(json.dumps(config))
