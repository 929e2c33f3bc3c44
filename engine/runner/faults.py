"""What a device's errors mean: which say that memory ran out, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.errors import ConfigError

# Beside torch's own class: the CUDA runtime, cuBLAS, and torch's allocator of host memory.
MEMORY_TEXTS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
EXTENSION_TEXT = "API call failed"  # all that torch's stable ABI leaves of an error inside an op


def num_refusals() -> int:
    """How often torch's CUDA allocator has refused memory in this process. An error inside an op may not say so."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0
    return torch.cuda.memory_stats().get("num_ooms", 0)


def out_of_memory(error: BaseException | None, refusals: int) -> str | None:
    """Why memory ran out, in `error` itself or in what it came from; None if it did not.

    `refusals`: `num_refusals()` before the work that raised `error`.
    """
    refused = num_refusals() > refusals
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return first_line(error)
        if isinstance(error, RuntimeError):
            text = str(error)
            if any(one in text for one in MEMORY_TEXTS):
                return first_line(error)
            if refused and EXTENSION_TEXT in text:
                return "torch's allocator refused an op"
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def fitting(what: str, hint: str) -> Iterator[None]:
    """While the engine starts: raises ConfigError for `what` finds no room, with the flags that change that."""
    refusals = num_refusals()
    try:
        yield
    except RuntimeError as error:
        if (reason := out_of_memory(error, refusals)) is None:
            raise
        raise ConfigError(
            f"the device's memory has no room for {what}: {reason}",
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
