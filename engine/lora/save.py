"""Writes weights as a PEFT folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.errors import ConfigError
from engine.lora.weights import LoraWeights, read_all
from engine.ops.targets import ModelTargets

PREFIX = "base_model.model."
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def save_peft(weights: LoraWeights, targets: ModelTargets, folder: Path) -> int:
    """Writes the pairs as `adapter_config.json` and `adapter_model.safetensors`, float32, to a new or empty folder.

    The folder appears when both files are complete. Returns the bytes of the weights. Raises ConfigError, and what
    reading the weights raises.
    """
    from safetensors.torch import save_file

    tensors, ranks, alphas = _tensors(weights, targets)
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": weights.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in ranks}),
        "rank_pattern": {module: one for module, one in ranks.items() if one != rank},
        "alpha_pattern": {module: one for module, one in alphas.items() if one != rank},
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            save_file(tensors, made / WEIGHTS_NAME, metadata={"format": "pt"})
            (made / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
            os.chmod(made, 0o755)
            os.rename(made, folder)  # fails if it holds files
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder}: {error.strerror}",
            field="output",
            hint="give a folder that does not exist yet",
        ) from None
    return sum(tensor.nbytes for tensor in tensors.values())


def _tensors(
    weights: LoraWeights, targets: ModelTargets
) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
    """Tensors by PEFT's names, and by module its rank and alpha."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for place, pair in weights.pairs.items():
        inside = place.layer < targets.num_layers
        group = (targets.groups if inside else targets.ends)[place.group]
        module = group.targets[place.target].module.format(layer=place.layer, expert=place.expert)
        names = ("lora_A.weight", "lora_B.weight")
        if group.embedding:
            names = ("lora_embedding_A", "lora_embedding_B")
        for name, matrix in zip(names, (pair.a, pair.b), strict=True):
            tensors[f"{PREFIX}{module}.{name}"] = read_all(matrix).float()
        ranks[module], alphas[module] = pair.rank, pair.scale * pair.rank
    return tensors, ranks, alphas
