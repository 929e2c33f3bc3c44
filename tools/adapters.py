"""Adapters for benchmarks and tests: random ones in PEFT's files, and any folder's as an image in a host region."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.adapters.sources import open_folder
from engine.adapters.tiers import HostRegion
from engine.lora.formats import load_peft
from engine.lora.image import image_size, write_image
from engine.lora.own import Tables, without_base_rows
from engine.messages import AdapterImageRef, aligned
from engine.ops.layout import ShardLayout


def write_adapter(
    folder: Path,
    layout: ShardLayout,
    rank: int,
    seed: int,
    targets: Iterable[str] | None = None,
    scale: float = 0.02,
) -> int:
    """A random adapter on the named targets (None: every linear of the layers); returns the bytes of its weights."""
    generator = torch.Generator().manual_seed(seed)
    wanted = set(targets) if targets is not None else None
    dtype = getattr(torch, layout.dtype)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layout.num_layers):
        for group in layout.targets.groups:
            for target in group.targets:
                if wanted is not None and target.name not in wanted:
                    continue
                module = f"base_model.model.{target.module.format(layer=layer)}"
                for half, shape in (
                    ("A", (rank, group.in_features)),
                    ("B", (target.out_features, rank)),
                ):
                    tensor = torch.randn(shape, generator=generator) * scale
                    tensors[f"{module}.lora_{half}.weight"] = tensor.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({name.rsplit(".", 3)[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def stage(
    folder: Path,
    layout: ShardLayout,
    region: HostRegion,
    offset: int,
    tables: Tables | None = None,
) -> tuple[AdapterImageRef, int]:
    """Writes the image of a folder's adapter at `offset` of the region, as the exchange would; and where it ends.

    `tables`: the base's, to leave out own rows that equal them.
    """
    with open_folder(folder) as files:
        weights = load_peft(files.config, files.weights, layout.targets)
        if tables is not None:
            weights = without_base_rows(weights, layout, tables)
        size = image_size(weights, layout)
        digest = write_image(weights, layout, region.view[offset : offset + size.total])
    end = offset + aligned(size.total)
    image = AdapterImageRef(
        digest, offset, size.data_bytes, size.stacked_rank, folder.name, vocab=size.vocab
    )
    return image, end
