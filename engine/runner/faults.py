"""What a device's errors mean: which say that memory ran out, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.errors import ConfigError

# Beside torch's own class: the CUDA runtime, cuBLAS, and torch's allocator of host memory.
MEMORY_TEXTS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, in `error` itself or in what it came from."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def fitting(what: str, hint: str) -> Iterator[None]:
    """While the engine starts: raises ConfigError for `what` finds no room, with the flags that change that."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"the device's memory has no room for {what}: {first_line(error)}",
            field="cuda_memory_fraction",
            hint=hint,
        ) from error


def first_line(error: BaseException) -> str:
    """An error's text without the advice that follows it."""
    return str(error).partition("\n")[0]


def empty_cache(device: torch.device) -> None:
    """Gives the driver back what torch keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
