"""What the backends of other packages share: the GPUs and dtypes that they serve, and the import of a package."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from engine.errors import ConfigError
from engine.ops.attention.seam import Needs

HALVES = (torch.bfloat16, torch.float16)
AMPERE = (8, 0)


def refusal_of_gpu_and_dtype(needs: Needs) -> str | None:
    """Why they cannot serve. Their kernels need 16-bit tensor cores of Ampere or later."""
    if needs.gpu is None:
        return "needs a GPU"
    if needs.gpu.capability < AMPERE:
        major, minor = needs.gpu.capability
        return f"needs a GPU of compute capability 8.0 or later, this one has {major}.{minor}"
    if needs.dtype not in HALVES:
        dtype = str(needs.dtype).removeprefix("torch.")
        return f"computes in bfloat16 or float16, not in {dtype}"
    return None


def imported(backend: str, module: str, install: str) -> Any:
    """The module. Raises ConfigError that says what to install, or why the installed package does not load."""
    try:
        return import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        raise ConfigError(
            f"--attention-backend {backend} needs the package {module}, which is not installed"
            if missing
            else f"--attention-backend {backend}: the package {module} does not load: {error}",
            field="attention_backend",
            hint=f"{install}, or use --attention-backend builtin",
        ) from None
