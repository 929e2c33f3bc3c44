"""Tensors of a PEFT file that change outputs besides the pairs: DoRA magnitudes and biases."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from engine.errors import RESAVE
from engine.lora.keys import Report
from engine.lora.peft_config import PeftConfig
from engine.lora.tensors import DTYPES, SafetensorsFile
from engine.lora.weights import Extras, Matrix, TargetIndex
from engine.names import shown, shown_shape
from engine.ops.targets import Group, Target


class Site(NamedTuple):
    """Where a target module is in the model."""

    place: TargetIndex
    group: Group
    target: Target


_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<magnitude>lora_magnitude_vector(?:\.weight)?)|(?P<shift>lora_B\.bias)"
    r"|(?P<bias>(?:base_layer\.)?bias))"
)
_WHAT = {"magnitude": "a DoRA magnitude", "shift": "a bias of lora_B", "bias": "a trained bias"}
_FIELD = {"magnitude": "use_dora", "shift": "lora_bias", "bias": "bias"}


def take_extras(
    keys: Sequence[str],
    file: SafetensorsFile,
    config: PeftConfig,
    sites: Mapping[str, Site],
    report: Report,
) -> tuple[dict[TargetIndex, Extras], list[str]]:
    """The extras by target, and the keys that are none. `keys`: tensors that belong to no pair.

    A tensor that the configuration does not announce is a problem: PEFT would ignore it.
    """
    found: dict[TargetIndex, Extras] = {}
    rest = []
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None or (site := sites.get(match["module"])) is None:
            rest.append(key)
            continue
        part = match.lastgroup
        assert part is not None
        module = match["module"]
        vector = _vector(key, module, part, file, config, site, report)
        if vector is None:
            continue
        known = found.get(site.place, Extras(module))
        if getattr(known, part) is not None:
            report("twice", f"{module} has {_WHAT[part]} twice", module, RESAVE)
        changed: dict[str, Any] = {part: vector}
        if part == "shift":
            changed["shift_scale"] = config.scale(module)
        found[site.place] = replace(known, **changed)
    return found, rest


def _vector(
    key: str,
    module: str,
    part: str,
    file: SafetensorsFile,
    config: PeftConfig,
    site: Site,
    report: Report,
) -> Matrix | None:
    """The tensor as [1, N], or None after a report."""
    _, group, target = site
    name, field, info = shown(key), _FIELD[part], file.infos[key]
    if not config.announces(part):
        text = f"{name} is {_WHAT[part]}, but adapter_config.json does not set {field}"
        report(f"left {field}", text, field, f"set {field} as it was in training")
    elif group.experts or (group.embedding and part != "magnitude"):
        what = "an expert" if group.experts else "an embedding"
        report(f"left {field}", f"{name} is {_WHAT[part]} of {what}", field, "train without it")
    elif part == "bias" and not group.bias:
        text = f"{name} is a trained bias, but the served model has no bias there"
        report("base bias", text, module, "serve the adapter's base model")
    elif info.shape != (target.out_features,):
        text = f"{name} has the shape {shown_shape(info.shape)}, not [{target.out_features}]"
        report(f"shape {part}", text, module, "use an adapter of this base model")
    elif info.dtype not in DTYPES:
        text = f"{name} has the dtype {shown(info.dtype)}, which is not supported"
        report(f"dtype {info.dtype}", text, module, f"save it in one of {', '.join(DTYPES)}")
    else:
        return file.vector(key)
    return None


def check_complete(
    extras: Mapping[TargetIndex, Extras],
    modules: Mapping[TargetIndex, str],
    linears: Collection[TargetIndex],
    config: PeftConfig,
    report: Report,
) -> None:
    """Reports pairs without the extras that the configuration announces, and magnitudes without a pair.

    `modules`: path by target, of all pairs; `linears`: the same without embeddings.
    """
    for place, module in modules.items():
        found = extras.get(place)
        for part, needed in (("magnitude", True), ("shift", place in linears)):
            if not needed or not config.announces(part):
                continue
            if found is None or getattr(found, part) is None:
                field = _FIELD[part]
                text = f"{module} lacks {_WHAT[part]}, though {field} is set in adapter_config.json"
                report(f"lacks {part}", text, field, RESAVE)
    for place, alone in extras.items():
        if alone.magnitude is not None and place not in modules:
            text = f"{alone.module} has a DoRA magnitude but no lora_A and lora_B"
            report("magnitude alone", text, alone.module, RESAVE)
