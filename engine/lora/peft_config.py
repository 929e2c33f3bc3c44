"""PEFT's `adapter_config.json`: which fields are supported, which have no effect at inference, which are refused.

Every field of peft 0.21's LoraConfig is in one of the three tables. A field in none of them comes from another version
or another tool. If it is set, the adapter is refused and the field is named, because its meaning is unknown.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import WAIT, AdapterIncompatible, AdapterLoadFailed
from engine.files import OpenFile
from engine.lora.patterns import REMEDY, Pattern, check_bounds, compile_pattern
from engine.lora.tensors import reading
from engine.names import shown, shown_value

MAX_CONFIG_BYTES = 4 << 20
MAX_FIELDS = 256
MAX_BASE_NAME = 256  # characters; it may be a path

HONOURED = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "base_model_name_or_path",
    }
)

# The tensors decide which modules are adapted. The other fields concern training or the origin of the base model.
WITHOUT_EFFECT = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "fan_in_fan_out",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "velora_config",
        "monteclora_config",
        "runtime_config",
        "merge_weights",  # peft before 0.3
        "enable_lora",
    }
)

_MERGE = "merge it into the base model with PEFT's merge_and_unload and serve that"
RETRAIN = "train the adapter without it"

# field -> (its effect, remedy)
REFUSED = {
    "use_dora": ("scales every output by a magnitude (DoRA)", RETRAIN),
    "lora_bias": ("adds a bias to lora_B", RETRAIN),
    "modules_to_save": (
        "replaces whole modules of the base model",
        "target them with LoRA (target_modules) instead",
    ),
    "megatron_config": (
        "configures Megatron's parallel layers",
        "convert the adapter to PEFT's format",
    ),
    "trainable_token_indices": (
        "replaces rows of the embedding",
        "target embed_tokens with LoRA instead",
    ),
    "alora_invocation_tokens": (
        "takes effect only after an invocation (aLoRA)",
        "train an ordinary LoRA",
    ),
    "use_qalora": ("pools the input of quantised layers (QALoRA)", RETRAIN),
    "layer_replication": ("changes the number of layers", _MERGE),
    "target_parameters": (
        "adapts parameters outside of linear layers, such as experts",
        "train on linear layers (target_modules) only",
    ),
    "use_bdlora": ("cuts the matrices into diagonal blocks (BD-LoRA)", RETRAIN),
    "arrow_config": ("routes between adapters (Arrow)", "request one of its adapters"),
    "kasa_config": ("truncates the base weights (KaSA)", _MERGE),
    "ensure_weight_tying": ("ties the adapters of embedding and head", RETRAIN),
}

# init_lora_weights that leave the base weights unchanged; the others subtract the initial product from them.
HARMLESS_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_CONVERT = "convert it to an ordinary LoRA: save it with path_initial_model_for_weight_conversion"

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_OTHER_METHODS = "use a LoRA adapter, or merge this one into the base model with PEFT"


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The part of the configuration that matters at inference."""

    ranks: Pattern
    alphas: Pattern
    rslora: bool
    base_model: str | None

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
        raise AdapterIncompatible(f"{file.name} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
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
        raise AdapterIncompatible(f"{file.name} is not valid JSON: {shown(str(error))}") from None
    if not isinstance(loaded, dict):
        raise AdapterIncompatible(f"{file.name} is not a JSON object")
    if len(loaded) > MAX_FIELDS:
        raise AdapterIncompatible(
            f"{file.name} has {len(loaded)} fields, the limit is {MAX_FIELDS}",
            hint="save the adapter with PEFT's save_pretrained",
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
    problems = [*_refused(fields), *_init(fields)]
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
    )
    return config, problems


def _refused(fields: Mapping[str, Any]) -> list[AdapterIncompatible]:
    problems = []
    if (bias := fields.get("bias")) not in (None, "none"):
        problems.append(
            AdapterIncompatible(
                f"bias is {shown_value(bias)}: the adapter replaces biases of the base model",
                field="bias",
                hint=RETRAIN,
            )
        )
    for name, value in fields.items():
        if not value or name in HONOURED or name in WITHOUT_EFFECT or name == "bias":
            continue
        why, remedy = REFUSED.get(
            name,
            ("is an unknown field", "remove it if it has no effect at inference"),
        )
        named = shown(name)
        problems.append(AdapterIncompatible(f"{named} {why}", field=named, hint=remedy))
    return problems


def _init(fields: Mapping[str, Any]) -> list[AdapterIncompatible]:
    init = str(fields.get("init_lora_weights", True)).lower()
    if init in HARMLESS_INITS:
        return []
    known = init.startswith(BASE_CHANGING_INITS)
    why = "changes the base weights" if known else "is an unknown initialisation"
    return [
        AdapterIncompatible(
            f"init_lora_weights '{shown(init)}' {why}", field="init_lora_weights", hint=_CONVERT
        )
    ]


def _pattern(fields: Mapping[str, Any], name: str, pattern: str, default: int) -> Pattern:
    """The values of one field and its pattern. Raises AdapterIncompatible."""
    given = fields.get(pattern) or {}
    if not isinstance(given, dict):
        raise AdapterIncompatible(
            f"{pattern} is {shown_value(given)}, not a mapping", field=pattern
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
        raise AdapterIncompatible(
            f"{where} is {shown_value(value)}, not a valid number", field=field
        )
    return float(value)
