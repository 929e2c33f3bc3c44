"""The table of rotary position embeddings, scaled as transformers defines it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import ModelError

# Scalings whose frequencies do not depend on the length of a sequence.
STATIC = ("linear", "llama3", "yarn")


def cos_sin_table(
    config: Any, parameters: dict[str, Any], rotary_dim: int, max_positions: int
) -> Tensor:
    """[max_positions, rotary_dim] float32: cosines of the rotary_dim / 2 frequencies, then sines.

    Su et al. 2021; scalings: linear, llama3, YaRN (Peng et al. 2023), computed by transformers from the model's config.
    """
    kind = parameters.get("rope_type", "default")
    factor = 1.0
    if kind == "default":
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
        inverse = 1.0 / parameters["rope_theta"] ** exponents
    elif kind in STATIC:
        inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    else:
        raise ModelError(
            f"rope scaling {kind!r} is not supported",
            field="rope_parameters",
            hint=f"supported: default, {', '.join(STATIC)}",
        )
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * inverse[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * factor
