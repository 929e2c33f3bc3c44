"""A report about an adapter before it is served: shape, size and every problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.errors import AdapterError
from engine.files import OpenFile
from engine.lora.formats import check_peft
from engine.lora.image import image_size, write_image
from engine.lora.modules import module_notes
from engine.lora.peft_config import read_config
from engine.lora.weights import LoraWeights, TargetIndex
from engine.ops.layout import MAX_RANK, ShardLayout
from engine.ops.targets import ModelTargets


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """How one adapter fits one base model."""

    folder: str
    base_model: str | None  # the adapter's name for it
    base_matches: bool | None  # by name (None: a name is missing); only a hint, the shapes decide
    targets: dict[str, int]  # name of the target -> number of layers that adapt it
    ranks: list[int]  # the distinct ones
    scales: list[float]
    data_bytes: int  # in the arena
    image_bytes: int  # in host memory
    digest: str | None  # None: the values were not read
    errors: list[AdapterError]
    notes: list[str]

    @property
    def ok(self) -> bool:
        return not self.errors


def inspect(
    config: OpenFile,
    weights: OpenFile,
    layout: ShardLayout,
    *,
    max_rank: int = MAX_RANK,
    base_model: str | None = None,
    values: bool = True,
) -> AdapterReport:
    """The report of the PEFT adapter in two open files, `weights` as safetensors. Problems are listed, not raised.

    `values` also reads the weights: it finds values that are not finite, and the digest.
    """
    folder = str(config.path.parent)
    fields: dict[str, Any] = {}
    found: LoraWeights | None = None
    errors: list[AdapterError] = []
    try:
        fields = read_config(config)
        found, problems = check_peft(
            config, weights, layout.targets, max_rank=max_rank, base_model=base_model
        )
        errors.extend(problems)
    except AdapterError as error:
        errors.append(error)
    named = fields.get("base_model_name_or_path")
    matches = named == base_model if named and base_model else None
    if found is None:
        return AdapterReport(
            folder=folder,
            base_model=named,
            base_matches=matches,
            targets={},
            ranks=[],
            scales=[],
            data_bytes=0,
            image_bytes=0,
            digest=None,
            errors=errors,
            notes=[],
        )
    size, digest = image_size(found, layout), None
    if values:
        try:
            digest = write_image(found, layout, memoryview(bytearray(size.total))).hex()
        except AdapterError as error:
            errors.append(error)
    return AdapterReport(
        folder=folder,
        base_model=named,
        base_matches=matches,
        targets=count_targets(found, layout.targets),
        ranks=sorted({pair.rank for pair in found.pairs.values()}),
        scales=sorted({pair.scale for pair in found.pairs.values()}),
        data_bytes=size.data_bytes,
        image_bytes=size.total,
        digest=digest,
        errors=errors,
        notes=[*found.notes, *module_notes(fields, found, layout.targets)],
    )


def count_targets(weights: LoraWeights, targets: ModelTargets) -> dict[str, int]:
    """Name of the target -> number of layers that adapt it, in the order of the model."""
    counts: dict[str, int] = {}
    for layer, number, group in targets.each_group():
        for index, target in enumerate(group.targets):
            experts = range(group.experts or 1)
            if any(
                TargetIndex(layer, number, index, expert) in weights.pairs for expert in experts
            ):
                counts[target.name] = counts.get(target.name, 0) + 1
    return counts
