"""Errors of a device: finds those that mean out of memory, and names the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.errors import ConfigError

# In errors that are not torch.OutOfMemoryError: of the CUDA runtime, cuBLAS, and torch's host allocator.
MEMORY_TEXTS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
EXTENSION_TEXT = "API call failed"  # torch's stable ABI hides the rest of an error inside an op


def num_refusals() -> int:
    """How often torch's CUDA allocator refused memory in this process. An error inside an op may hide that."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0
    return torch.cuda.memory_stats().get("num_ooms", 0)


def out_of_memory(error: BaseException | None, refusals: int) -> str | None:
    """Why memory ran out, from `error` or one of its causes; None if it did not.

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
    """At start: turns an out-of-memory error into a ConfigError for `what`, with the flags to change as `hint`."""
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
    """Returns the memory that torch caches to the driver."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
