"""A report about an adapter before it is served: shape, size and every problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import AdapterError
from engine.files import OpenFile
from engine.lora.formats import MAX_ADDED_TOKENS, check_peft, same_base
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
    errors: list[AdapterError]
    notes: list[str] = field(default_factory=list)
    targets: dict[str, int] = field(
        default_factory=dict
    )  # target -> number of layers that adapt it
    coverage: dict[str, str] = field(default_factory=dict)  # target -> its layers, as "0-3, 5 of 8"
    ranks: list[int] = field(default_factory=list)  # the distinct ones
    scales: list[float] = field(default_factory=list)
    data_bytes: int = 0  # in the arena
    image_bytes: int = 0  # in host memory
    digest: str | None = None  # None: the values were not read
    vocab: int = 0  # its vocabulary, if its own rows change it; 0: that of the base

    @property
    def ok(self) -> bool:
        return not self.errors


def inspect(
    config: OpenFile,
    weights: OpenFile,
    layout: ShardLayout,
    *,
    shards: Sequence[OpenFile] = (),
    max_rank: int = MAX_RANK,
    max_added_tokens: int = MAX_ADDED_TOKENS,
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
            config,
            weights,
            layout.targets,
            shards=shards,
            max_rank=max_rank,
            max_added_tokens=max_added_tokens,
            base_model=base_model,
        )
        errors.extend(problems)
    except AdapterError as error:
        errors.append(error)
    named = fields.get("base_model_name_or_path")
    matches = same_base(named, base_model) if named and base_model else None
    report = AdapterReport(folder, named, matches, errors)
    if found is None:
        return report
    size, digest = image_size(found, layout), None
    if values:
        try:
            digest = write_image(found, layout, memoryview(bytearray(size.total))).hex()
        except AdapterError as error:
            errors.append(error)
    return replace(
        report,
        notes=[
            *found.notes,
            *module_notes(fields, found, layout.targets),
        ],
        targets=count_targets(found, layout.targets),
        coverage=coverage(found, layout.targets),
        ranks=sorted({pair.rank for pair in found.pairs.values()}),
        scales=sorted({pair.scale for pair in found.pairs.values()}),
        data_bytes=size.data_bytes,
        image_bytes=size.total,
        digest=digest,
        vocab=size.vocab,
    )


def count_targets(weights: LoraWeights, targets: ModelTargets) -> dict[str, int]:
    """Name of the target -> number of layers that adapt it, in the order of the model."""
    return {name: len(layers) for name, (layers, _) in _layers(weights, targets).items() if layers}


def coverage(weights: LoraWeights, targets: ModelTargets) -> dict[str, str]:
    """Name of every target -> the layers that adapt it: "all 8 layers", "0-3, 5 of 8 layers", "none of 8 layers"."""
    found = {}
    for name, (layers, total) in _layers(weights, targets).items():
        if total == 1:
            found[name] = "yes" if layers else "no"
        elif len(layers) == total:
            found[name] = f"all {total} layers"
        else:
            found[name] = f"{_ranges(layers) or 'none'} of {total} layers"
    return found


def _layers(weights: LoraWeights, targets: ModelTargets) -> dict[str, tuple[list[int], int]]:
    """Name of every target -> the layers that adapt it, and the number of layers that have it."""
    found: dict[str, tuple[list[int], int]] = {}
    for layer, number, group in targets.each_group():
        for index, target in enumerate(group.targets):
            layers, total = found.get(target.name, ([], 0))
            places = (
                TargetIndex(layer, number, index, expert) for expert in range(group.experts or 1)
            )
            parts = (weights.pairs, weights.extras, weights.own)
            changed = any(place in part for place in places for part in parts)
            adapted = [layer] if changed else []
            found[target.name] = (layers + adapted, total + 1)
    return found


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as "0-3, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
