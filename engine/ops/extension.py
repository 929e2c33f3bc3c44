"""Finds and loads the compiled ops; without them the references serve, and the status says so."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from engine.ops.schemas import NAMESPACE, SCHEMAS

Backend = Literal["extension", "reference"]

CPU_LIBRARY = Path(__file__).with_name("_lorax_cpu.so")
DEVICES = ("cpu",)  # those an extension exists for


@dataclass(frozen=True, slots=True)
class ExtensionStatus:
    """What was loaded, or why nothing was."""

    device: str
    path: Path | None  # None: not loaded
    isa: (
        str | None
    )  # the instruction set chosen on this machine: generic, avx2, avx512 or avx512_bf16
    ops: frozenset[str]  # those that it serves; the reference serves the others
    reason: str | None  # why it is missing; None if it is loaded


@cache
def load(library: Path = CPU_LIBRARY) -> ExtensionStatus:
    """Loads the CPU library once, which registers its ops. Never raises: a missing library has a reason."""
    if not library.exists():
        reason = f"{library.name} was not built; `pip install` the package with a C++ compiler"
        return ExtensionStatus("cpu", None, None, frozenset(), reason)
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return ExtensionStatus(
            "cpu", None, None, frozenset(), f"{library.name} does not load: {error}"
        )
    ops = frozenset(op for op in SCHEMAS if _registered(op, "CPU"))
    return ExtensionStatus("cpu", library, _functions(library).lorax_cpu_isa().decode(), ops, None)


def backends() -> MappingProxyType[str, MappingProxyType[str, Backend]]:
    """What serves each op on each device, for logs and `/info`."""
    served: dict[str, MappingProxyType[str, Backend]] = {}
    for op in SCHEMAS:
        by_device: dict[str, Backend] = {
            device: "extension" if _registered(op, device.upper()) else "reference"
            for device in DEVICES
        }
        served[op] = MappingProxyType(by_device)
    return MappingProxyType(served)


def use_isa(name: str, library: Path = CPU_LIBRARY) -> bool:
    """For tests: runs the kernels of instruction set `name` from now on. False if this machine cannot."""
    return bool(_functions(library).lorax_cpu_use_isa(name.encode()))


def _registered(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)


@cache
def _functions(library: Path) -> ctypes.CDLL:
    functions = ctypes.CDLL(str(library))
    functions.lorax_cpu_isa.restype = ctypes.c_char_p
    functions.lorax_cpu_use_isa.argtypes = [ctypes.c_char_p]
    return functions
