"""`adapter_config.json` of PEFT: which fields are honoured, which say nothing at inference, which are refused.

Every field of peft 0.21's LoraConfig is in one of the three tables. A field in none of them comes from another
version or another tool; if it is set, the adapter is refused by its name, because what it means is not known.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import AdapterIncompatible
from engine.files import OpenFile
from engine.lora.patterns import Pattern, compile_pattern
from engine.lora.tensors import reading

MAX_CONFIG_BYTES = 4 << 20

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

# The tensors decide which modules are adapted; the rest is about training, or about where the base came from.
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
_RETRAIN = "train without it"

# field -> (what it would change, remedy)
REFUSED = {
    "use_dora": ("scales every output by a magnitude (DoRA)", _RETRAIN),
    "lora_bias": ("adds a bias to lora_B", _RETRAIN),
    "modules_to_save": (
        "replaces whole modules of the base model",
        "target them with LoRA (target_modules) instead",
    ),
    "megatron_config": ("is for Megatron's parallel layers", "convert the adapter to PEFT's own"),
    "trainable_token_indices": (
        "replaces rows of the embedding",
        "target embed_tokens with LoRA instead",
    ),
    "alora_invocation_tokens": (
        "acts from an invocation on only (aLoRA)",
        "train an ordinary LoRA",
    ),
    "use_qalora": ("pools the input of quantised layers (QALoRA)", _RETRAIN),
    "layer_replication": ("changes the number of layers", _MERGE),
    "target_parameters": (
        "adapts parameters that are no linear layers, such as experts",
        "train on linear layers (target_modules) only",
    ),
    "use_bdlora": ("cuts the matrices into diagonal blocks (BD-LoRA)", _RETRAIN),
    "arrow_config": ("routes between adapters (Arrow)", "ask for one of its adapters"),
    "kasa_config": ("truncates the base weights (KaSA)", _MERGE),
    "ensure_weight_tying": ("ties the adapters of embedding and head", _RETRAIN),
}

# init_lora_weights that leave the base model as it is; the others subtract the initial product from it.
HARMLESS_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_CONVERT = (
    "save it with path_initial_model_for_weight_conversion, which turns it into an ordinary LoRA"
)

_OTHER_METHODS = "only LoRA adapters are served; merge it into the base model with PEFT"


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What of the configuration decides the product that an adapter adds."""

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
    """The fields of an adapter_config.json. Raises AdapterLoadFailed or AdapterIncompatible."""
    if file.size > MAX_CONFIG_BYTES:
        raise AdapterIncompatible(f"{file.name} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    with reading(file):
        text = file.read()
    try:
        loaded = json.loads(text)
        json.dumps(loaded, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise AdapterIncompatible(f"{file.name} is not valid JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise AdapterIncompatible(f"{file.name} is not a JSON object")
    return loaded


def check_config(fields: Mapping[str, Any]) -> tuple[PeftConfig | None, list[AdapterIncompatible]]:
    """What counts of the configuration, and everything in it that cannot be served.

    The first is None if ranks and scales cannot be known.
    """
    kind = fields.get("peft_type")
    if str(kind).upper() != "LORA":
        named = f"peft_type is {kind!r}" if kind else "it has no peft_type"
        problem = AdapterIncompatible(
            f"adapter_config.json: {named}", field="peft_type", hint=_OTHER_METHODS
        )
        return None, [problem]
    problems = [*_refused(fields), *_init(fields)]
    numbers: dict[str, Pattern] = {}
    for name, pattern, default in (("r", "rank_pattern", 8), ("lora_alpha", "alpha_pattern", 8)):
        try:
            numbers[name] = _pattern(fields, name, pattern, default)
        except ValueError as error:
            problems.append(AdapterIncompatible(str(error), field=str(error).split()[0]))
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
                f"bias is {bias!r}: the adapter replaces biases of the base model",
                field="bias",
                hint=_RETRAIN,
            )
        )
    for name, value in fields.items():
        if not value or name in HONOURED or name in WITHOUT_EFFECT or name == "bias":
            continue
        why, remedy = REFUSED.get(
            name,
            ("is not a field that this server knows", "remove it if it has no effect at inference"),
        )
        problems.append(AdapterIncompatible(f"{name} {why}", field=name, hint=remedy))
    return problems


def _init(fields: Mapping[str, Any]) -> list[AdapterIncompatible]:
    init = str(fields.get("init_lora_weights", True)).lower()
    if init in HARMLESS_INITS:
        return []
    known = init.startswith(BASE_CHANGING_INITS)
    why = "changes the base weights" if known else "is not an initialisation that this server knows"
    return [
        AdapterIncompatible(
            f"init_lora_weights {init!r} {why}", field="init_lora_weights", hint=_CONVERT
        )
    ]


def _pattern(fields: Mapping[str, Any], name: str, pattern_name: str, default: int) -> Pattern:
    """Raises ValueError whose first word is the field."""

    def number(value: Any, where: str) -> float:
        whole = name != "r" or (isinstance(value, int) and 0 < value < 1 << 31)
        if isinstance(value, bool) or not isinstance(value, int | float) or not whole:
            raise ValueError(f"{where} is {value!r}, not a usable number")
        if abs(value) > 1e30 or not math.isfinite(value):
            raise ValueError(f"{where} is {value!r}, not a usable number")
        return float(value)

    given = fields.get(pattern_name) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{pattern_name} is not a mapping")
    values = {key: number(value, f"{pattern_name} of {key!r}") for key, value in given.items()}
    try:
        return compile_pattern(values, number(fields.get(name, default), name))
    except ValueError as error:
        message = str(error)
        raise ValueError(
            message if message.startswith(f"{name} ") else f"{pattern_name} {message}"
        ) from None


def describe_key(key: str) -> tuple[str, str, str] | None:
    """(what, field, remedy) of a tensor that is no half of a LoRA pair; None: nothing that is known."""
    table = (
        (r"\.lora_magnitude_vector", "a DoRA magnitude", "use_dora"),
        (r"\.lora_[AB]\.bias$", "a bias of lora_A or lora_B", "lora_bias"),
        (r"\.trainable_tokens_", "trained rows of the embedding", "trainable_token_indices"),
        (r"\.lora_diag", "a KaSA diagonal", "kasa_config"),
        (r"\.modules_to_save\.", "a module saved whole", "modules_to_save"),
        (r"\.bias$", "a bias of the base model", "bias"),
    )
    for expression, what, field in table:
        if re.search(expression, key):
            return what, field, REFUSED[field][1] if field in REFUSED else _RETRAIN
    return None
