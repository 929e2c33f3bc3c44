"""Base models: turns a folder or hub id into a decoder with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import folder_of
from engine.config import ModelConfig
from engine.errors import ModelError
from engine.models.architectures import spec_of
from engine.models.decoder import Decoder
from engine.models.spec import ModelSpec, layout_of
from engine.ops.layout import ShardLayout

__all__ = ["Decoder", "ModelSpec", "adapter_layout", "dtype_of", "spec_from"]


def spec_from(folder: Path) -> ModelSpec:
    """The spec of the model in a folder; raises ModelError."""
    from transformers import AutoConfig

    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} has no config.json", field="model_id")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder / 'config.json'}: {error}", field="model_id") from None
    return spec_of(config)


def dtype_of(config: ModelConfig, hf_config: Any, device: torch.device) -> torch.dtype:
    """`--dtype`; auto is float32 on a CPU and the checkpoint's 16-bit type, or bfloat16, on a GPU."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type == "cpu":
        return torch.float32
    stored = getattr(hf_config, "dtype", None)
    return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16


def adapter_layout(config: ModelConfig, device: str = "cpu") -> tuple[ShardLayout, ModelSpec, Path]:
    """The layout of adapters for a base model, without loading its weights."""
    folder = folder_of(config, weights=False)
    spec = spec_from(folder)
    dtype = dtype_of(config, spec.config, torch.device(device))
    return layout_of(spec, str(dtype).removeprefix("torch.")), spec, folder
