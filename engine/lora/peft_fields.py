"""Every field of an adapter_config.json: served, ignored because it cannot change the output, or refused by name.

The fields are those of peft 0.21's LoraConfig and some that older versions and other trainers write. The table in
docs/adapter-formats.md is generated from this one.

A field that is not in the table is harmless if it is null, false or empty. Otherwise it may change the output, so the
adapter is refused and the field is named; unless a word in its name says that it describes the training only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Field:
    """What happens to one field."""

    kind: Literal["served", "ignored", "refused"]
    what: str  # what it says or does
    remedy: str = ""
    harmless: tuple[
        object, ...
    ] = ()  # values of a refused field that change nothing, besides null, false and empty


def _served(what: str) -> Field:
    return Field("served", what)


def _ignored(what: str) -> Field:
    return Field("ignored", what)


def _refused(what: str, remedy: str, *harmless: object) -> Field:
    return Field("refused", what, remedy, harmless)


MERGE = "merge it into the base model with PEFT's merge_and_unload and serve that"
RETRAIN = "train the adapter without it"
CONVERT = (
    "convert it to an ordinary LoRA: save it with"
    " model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL),"
    " where INITIAL is the adapter as it was before training"
)

SERVED_BIASES = ("none", "all", "lora_only")

FIELDS = {
    "peft_type": _served("must be LORA"),
    "r": _served("the rank"),
    "lora_alpha": _served("the scale is lora_alpha / r"),
    "use_rslora": _served("the scale is lora_alpha / sqrt(r)"),
    "rank_pattern": _served("ranks of single modules"),
    "alpha_pattern": _served("alphas of single modules"),
    "init_lora_weights": _served("true, false, gaussian, eva, orthogonal and mica; see below for the others"),
    "use_dora": _served("DoRA: outputs are scaled by magnitude / norm of the adapted weight"),
    "lora_bias": _served("the bias of lora_B is added, times the scale"),
    "modules_to_save": _served("embedding and head: the adapter's own matrices; other modules are refused"),
    "trainable_token_indices": _served("the adapter's own rows of embedding or head, of both if they are tied"),
    "base_model_name_or_path": _served("another name than the served model's is a note"),
    "task_type": _ignored("the kind of the model"),
    "auto_mapping": _ignored("the class of the base model"),
    "peft_version": _ignored("the version that wrote the file"),
    "revision": _ignored("the revision of the base model"),
    "inference_mode": _ignored("whether weights are frozen"),
    "target_modules": _ignored("the tensors say which modules are adapted"),
    "exclude_modules": _ignored("the tensors say which modules are adapted"),
    "layers_to_transform": _ignored("the tensors say which layers are adapted"),
    "layers_pattern": _ignored("the tensors say which layers are adapted"),
    "lora_dropout": _ignored("training only"),
    "fan_in_fan_out": _ignored("PEFT stores the matrices in the same way for both values"),
    "megatron_core": _ignored("the module of Megatron; used with megatron_config only"),
    "loftq_config": _ignored("how the weights were initialised"),
    "eva_config": _ignored("how the weights were initialised"),
    "corda_config": _ignored("how the weights were initialised"),
    "lora_ga_config": _ignored("how the weights were initialised"),
    "qalora_group_size": _ignored("used with use_qalora only"),
    "velora_config": _ignored("compresses activations in training"),
    "monteclora_config": _ignored("samples weights in training"),
    "runtime_config": _ignored("how PEFT runs; never saved"),
    "merge_weights": _ignored("written by peft before 0.3"),
    "enable_lora": _ignored("written by peft before 0.3"),
    "bias": _refused("is none of none, all and lora_only, which are served", RETRAIN, *SERVED_BIASES),
    "megatron_config": _refused(
        "configures Megatron's parallel layers", "convert the adapter to PEFT's format"
    ),
    "alora_invocation_tokens": _refused(
        "takes effect only after an invocation (aLoRA)", "train an ordinary LoRA"
    ),
    "use_qalora": _refused("pools the input of quantised layers (QALoRA)", RETRAIN),
    "layer_replication": _refused("changes the number of layers", MERGE),
    "target_parameters": _refused(
        "adapts parameters outside of linear layers, such as experts",
        "train on linear layers (target_modules) only",
    ),
    "use_bdlora": _refused("cuts the matrices into diagonal blocks (BD-LoRA)", RETRAIN),
    "arrow_config": _refused("routes between adapters (Arrow)", "request one of its adapters"),
    "kasa_config": _refused("truncates the base weights (KaSA)", MERGE),
    "ensure_weight_tying": _refused("ties the adapters of embedding and head", RETRAIN),
}  # fmt: skip

# init_lora_weights that leave the base weights unchanged.
HARMLESS_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
# Those that subtract the initial product from the base weights, which PEFT can convert to an ordinary LoRA.
CONVERTED_INITS = ("pissa", "olora", "corda", "lora_ga")
UNCONVERTED_INITS = ("loftq",)  # the base weights were quantised for this adapter

_TRAINING = re.compile(
    r"(?:^|_)(?:dropout|version|seed|lr|learning|train|training|trained|trainer|optimizer|dataset|date|time|author"
    r"|license|description|tags|comment|commit|unsloth_fixed)(?:_|$)",
    re.IGNORECASE,
)


def describes_training(name: str) -> bool:
    """Whether the name of an unknown field says that it describes the training, not the adapter."""
    return bool(_TRAINING.search(name[:200]))
