"""PEFT's `adapter_config.json`: the numbers that matter at inference, and every field that cannot be served.

`engine.lora.peft_fields` says what happens to each field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import RESAVE, WAIT, AdapterIncompatible, AdapterLoadFailed
from engine.files import OpenFile
from engine.lora.patterns import REMEDY, Pattern, check_bounds, compile_pattern
from engine.lora.peft_fields import (
    CONVERT,
    CONVERTED_INITS,
    FIELDS,
    HARMLESS_INITS,
    MERGE,
    UNCONVERTED_INITS,
    describes_training,
)
from engine.lora.tensors import reading
from engine.names import shown, shown_value

MAX_CONFIG_BYTES = 4 << 20
MAX_FIELDS = 256
MAX_NOTES = 16
MAX_BASE_NAME = 256  # characters; it may be a path

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_OTHER_METHODS = "use a LoRA adapter, or merge this one into the base model with PEFT"


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The part of the configuration that matters at inference."""

    ranks: Pattern
    alphas: Pattern
    rslora: bool
    base_model: str | None
    notes: list[str]  # about fields that are ignored though they are unknown
    announced: frozenset[str] = frozenset()  # "magnitude", "shift" and "bias"

    def announces(self, part: str) -> bool:
        """Whether the file has DoRA magnitudes ("magnitude"), biases of lora_B ("shift") or trained biases ("bias")."""
        return part in self.announced

    def rank(self, module: str) -> int:
        return int(self.ranks.value(module))

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        rank = self.rank(module)
        return self.alphas.value(module) / (math.sqrt(rank) if self.rslora else rank)


def read_config(file: OpenFile) -> dict[str, Any]:
    """The fields of an adapter_config.json. The base model's name is shortened and escaped for messages.

    Raises AdapterLoadFailed or AdapterIncompatible.
    """
    if file.size > MAX_CONFIG_BYTES:
        raise AdapterIncompatible(
            f"{file.name} is larger than {MAX_CONFIG_BYTES >> 20} MiB", hint=RESAVE
        )
    with reading(file):
        contents = file.read()
    try:
        text = contents.decode("utf-8-sig")
        loaded = json.loads(text)
        if _SURROGATE.search(text):  # half of a surrogate pair
            json.dumps(loaded, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        if _ends_early(error):
            raise AdapterLoadFailed(f"{file.name} is incomplete", hint=WAIT) from None
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise AdapterIncompatible(
            f"{file.name} is not valid JSON: {shown(why)}", hint=RESAVE
        ) from None
    if not isinstance(loaded, dict):
        raise AdapterIncompatible(f"{file.name} is not a JSON object", hint=RESAVE)
    if len(loaded) > MAX_FIELDS:
        raise AdapterIncompatible(
            f"{file.name} has {len(loaded)} fields, the limit is {MAX_FIELDS}",
            hint=RESAVE,
        )
    if base := loaded.get("base_model_name_or_path"):
        loaded["base_model_name_or_path"] = shown(str(base), MAX_BASE_NAME)
    return loaded


def _ends_early(error: Exception) -> bool:
    """Whether JSON is well-formed up to its end: a file that is still being written."""
    return isinstance(error, json.JSONDecodeError) and (
        error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
    )


def check_config(fields: Mapping[str, Any]) -> tuple[PeftConfig | None, list[AdapterIncompatible]]:
    """The configuration, and every problem in it. The configuration is None if ranks or scales are unknown."""
    kind = fields.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        named = f"peft_type is {shown_value(kind)}" if kind else "peft_type is missing"
        problem = AdapterIncompatible(
            f"adapter_config.json: {named}", field="peft_type", hint=_OTHER_METHODS
        )
        return None, [problem]
    refused, notes = _refused(fields)
    problems = [*refused, *_init(fields)]
    numbers: dict[str, Pattern] = {}
    for name, pattern, default in (("r", "rank_pattern", 8), ("lora_alpha", "alpha_pattern", 8)):
        try:
            numbers[name] = _pattern(fields, name, pattern, default)
        except AdapterIncompatible as problem:
            problems.append(problem)
    if len(numbers) < 2:
        return None, problems
    base = fields.get("base_model_name_or_path")
    config = PeftConfig(
        numbers["r"],
        numbers["lora_alpha"],
        bool(fields.get("use_rslora")),
        str(base) if base else None,
        notes,
        _announced(fields),
    )
    return config, problems


def _refused(fields: Mapping[str, Any]) -> tuple[list[AdapterIncompatible], list[str]]:
    """Problems and notes about the fields that are not served."""
    problems, notes = [], []
    for name, value in fields.items():
        field = FIELDS.get(name)
        if not value or (field and (field.kind != "refused" or value in field.harmless)):
            continue
        named = shown(name)
        if field is None and describes_training(name):
            notes.append(
                f"the unknown field {named} is ignored: by its name it describes the training"
            )
            continue
        why, remedy = "is an unknown field", "remove it if it has no effect at inference"
        if field is not None:
            why, remedy = field.what, field.remedy
            if field.harmless:
                why = f"is {shown_value(value)}: it {why}"
        problems.append(AdapterIncompatible(f"{named} {why}", field=named, hint=remedy))
    return problems, notes[:MAX_NOTES]


def _announced(fields: Mapping[str, Any]) -> frozenset[str]:
    given = {
        "magnitude": fields.get("use_dora"),
        "shift": fields.get("lora_bias"),
        "bias": fields.get("bias") not in (None, "none"),
    }
    return frozenset(part for part, there in given.items() if there)


def _init(fields: Mapping[str, Any]) -> list[AdapterIncompatible]:
    init = str(fields.get("init_lora_weights", True)).lower()
    if init in HARMLESS_INITS:
        return []
    why, remedy = "is an unknown initialisation", CONVERT
    if init.startswith(CONVERTED_INITS):
        why = "changes the base weights"
    elif init.startswith(UNCONVERTED_INITS):
        why, remedy = "changes the base weights", MERGE
    text = f"init_lora_weights '{shown(init)}' {why}"
    return [AdapterIncompatible(text, field="init_lora_weights", hint=remedy)]


def _pattern(fields: Mapping[str, Any], name: str, pattern: str, default: int) -> Pattern:
    """The values of one field and its pattern. Raises AdapterIncompatible."""
    given = fields.get(pattern) or {}
    if not isinstance(given, dict):
        raise AdapterIncompatible(
            f"{pattern} is {shown_value(given)}, not a mapping", field=pattern, hint=RESAVE
        )
    whole = name == "r"
    try:
        check_bounds(given)
        values = {
            key: _number(value, f"{pattern} of '{shown(key)}'", pattern, whole)
            for key, value in given.items()
        }
        return compile_pattern(values, _number(fields.get(name, default), name, name, whole))
    except ValueError as error:
        raise AdapterIncompatible(f"{pattern} {error}", field=pattern, hint=REMEDY) from None


def _number(value: Any, where: str, field: str, whole: bool) -> float:
    """A rank (`whole`: a positive integer) or an alpha. Raises AdapterIncompatible."""
    usable = not isinstance(value, bool) and isinstance(value, int | float)
    if usable and whole:
        usable = isinstance(value, int) and 0 < value < 1 << 31
    if not usable or not abs(value) <= 1e30:  # false for NaN too
        kind = "a positive whole number" if whole else "a finite number"
        raise AdapterIncompatible(
            f"{where} is {shown_value(value)}, not {kind}",
            field=field,
            hint="set it to the value of the training",
        )
    return float(value)
