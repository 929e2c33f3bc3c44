"""The linear methods, by the name that `--quantize` gives them. Another method is another entry of `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from engine.errors import ConfigError
from engine.layers import quantised
from engine.layers.linear import LinearMethod, Plain

Maker = Callable[[torch.dtype, torch.device], LinearMethod]  # dtype: of x and y

# Each entry returns a maker, and raises ConfigError if the packages that it needs are missing.
METHODS: dict[str, Callable[[], Maker]] = {
    name: partial(quantised.bitsandbytes, name) for name in quantised.SCHEMES
}


def method_of(quantize: str | None) -> Maker:
    """The method of `--quantize`, None for weights as they are. Raises ConfigError."""
    if quantize is None:
        return Plain
    if quantize not in METHODS:
        raise ConfigError(
            f"--quantize {quantize} is not known",
            field="quantize",
            hint=f"choose one of {', '.join(METHODS)}",
        )
    return METHODS[quantize]()
