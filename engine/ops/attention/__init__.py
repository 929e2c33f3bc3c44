"""Attention backends, and the choice of one for a model and a machine. Only this module knows their names.

A package is imported only when its backend is chosen. A backend that cannot serve the model is refused at start, with
the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from engine.errors import ConfigError
from engine.ops.attention.builtin import Builtin
from engine.ops.attention.builtin import attend as builtin_attend
from engine.ops.attention.flash_attention import FlashAttention
from engine.ops.attention.flashinfer import FlashInfer
from engine.ops.attention.seam import (
    Attend,
    AttentionBackend,
    Capacity,
    Captured,
    Gpu,
    KVFormat,
    Needs,
    Prepare,
    StepLengths,
    View,
)

__all__ = [
    "AUTO",
    "BACKENDS",
    "Attend",
    "AttentionBackend",
    "Captured",
    "Gpu",
    "KVFormat",
    "Name",
    "Needs",
    "Prepare",
    "Capacity",
    "StepLengths",
    "View",
    "builtin_attend",
    "choose",
]

Name = Literal["auto", "builtin", "flashinfer", "flash-attn"]

# Name -> (function that says why it cannot serve a model, or None; function that makes it).
BACKENDS: dict[str, tuple[Callable[[Needs], str | None], Callable[[Needs], AttentionBackend]]] = {
    Builtin.name: (Builtin.refusal, lambda needs: Builtin()),
    FlashInfer.name: (FlashInfer.refusal, FlashInfer),
    FlashAttention.name: (FlashAttention.refusal, FlashAttention),
}

# Best first. A backend of another package comes before the built-in one only if it makes the whole step more than 5 %
# faster and builds nothing at start.
AUTO = (Builtin.name,)


def choose(name: Name, needs: Needs) -> AttentionBackend:
    """The backend that `--attention-backend` names. Raises ConfigError that says what it lacks."""
    for candidate in AUTO if name == "auto" else (name,):
        refuse, make = BACKENDS[candidate]
        reason = refuse(needs)
        if reason is None:
            return make(needs)
    raise ConfigError(
        f"--attention-backend {name}: {reason}",
        field="attention_backend",
        hint=f"use --attention-backend {Builtin.name}, which serves every model",
    )
