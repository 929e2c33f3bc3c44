"""Finds and loads the compiled ops. Without them the references serve, and the status says so."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from engine.errors import ConfigError
from engine.ops.schemas import NAMESPACE, SCHEMAS

Implementation = Literal["extension", "torch", "reference"]

CPU_LIBRARY = Path(__file__).with_name("_lorax_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("_lorax_cuda.so")
DEVICES = ("cpu", "cuda")  # that an extension exists for
# (op, device) whose reference calls fast torch code: cuBLAS, or vectorised work on small tensors.
BY_TORCH = {("linear", "cuda")}
BY_TORCH |= {(op, "cpu") for op in ("write_runs_", "prepare_step_", "pick_greedy_", "top_p_floor")}
BY_TORCH |= {(op, "cpu") for op in ("lora_own_rows_", "lora_own_logits_")}

CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR; the minor one is the next

CPU_FUNCTIONS = {
    # arguments: source, image, pieces, number of pieces, dtype
    "lorax_cpu_write_matrices": ([c_void_p, c_void_p, c_void_p, c_int64, c_int32], c_int64),
}


@dataclass(frozen=True, slots=True)
class ExtensionStatus:
    """What was loaded, or why nothing was loaded."""

    device: str
    path: Path | None  # None: not loaded
    isa: str | None  # instruction set in use: generic, avx2, avx512, avx512_bf16; None on a GPU
    ops: frozenset[str]  # that it serves; the reference serves the others
    reason: str | None  # why it is missing; None if it is loaded


@cache
def load(library: Path = CPU_LIBRARY) -> ExtensionStatus:
    """Loads the CPU library once, which registers its ops. Never raises: the status has the reason of a failure."""
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


@cache
def load_cuda(library: Path = CUDA_LIBRARY) -> ExtensionStatus:
    """Loads the CUDA library once, if torch sees a GPU. Never raises: the status has the reason of a failure."""
    missing = ExtensionStatus("cuda", None, None, frozenset(), "torch sees no GPU")
    if not torch.cuda.is_available():
        return missing
    if not library.exists():
        return replace(
            missing, reason=f"{library.name} was not built; install the package with nvcc"
        )
    try:
        archs, found = built_for(library), capability()
        if archs and found and not any(runs_on(arch, found) for arch in archs):
            reason = (
                f"{library.name} was built for {', '.join(archs)} and this GPU has compute capability "
                f"{found[0]}.{found[1]}; install the package here, or with LORAX_CUDA_ARCHS"
            )
            return replace(missing, reason=reason)
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return replace(missing, reason=f"{library.name} does not load: {error}")
    ops = frozenset(op for op in SCHEMAS if _registered(op, "CUDA"))
    return ExtensionStatus("cuda", library, None, ops, None)


def capability() -> tuple[int, int] | None:
    """Compute capability of the first GPU. The driver tells it, because torch would create a context on the GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    major, minor, device = c_int32(), c_int32(), c_int32()
    errors = [cuda.cuInit(0), cuda.cuDeviceGet(ctypes.byref(device), 0)]
    for value, attribute in ((major, CAPABILITY_MAJOR), (minor, CAPABILITY_MAJOR + 1)):
        errors.append(cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
    return None if any(errors) else (major.value, minor.value)


def built_for(library: Path) -> list[str]:
    """The GPUs that a CUDA library file was built for, as in LORAX_CUDA_ARCHS: 80, 90a. [] if it does not say."""
    found = re.search(rb"lorax_cuda_archs=([0-9a-z;]+)", library.read_bytes())
    return found[1].decode().split(";") if found else []


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch` runs on a GPU (CUDA C++ Programming Guide, "Compute Capabilities").

    The GPU has the same major version and the same or a later minor version. If the arch ends in a, the GPU has exactly
    that version.
    """
    if (parsed := re.fullmatch(r"(\d+)([af]?)", arch)) is None:
        return True  # a form that nvcc knows and this function does not
    major, minor = divmod(int(parsed[1]), 10)
    if parsed[2] == "a":
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def require_cuda() -> None:
    """Raises ConfigError if an op would run its reference on the GPU."""
    status = load_cuda()
    if missing := [op for op, served in backends().items() if served["cuda"] == "reference"]:
        raise ConfigError(
            status.reason or f"{CUDA_LIBRARY.name} is out of date: it lacks {', '.join(missing)}",
            field="slow_reference",
            hint="install with nvcc on the path, or set --slow-reference",
        )


def backends() -> MappingProxyType[str, MappingProxyType[str, Implementation]]:
    """The implementation of each op on each device, for logs and `/info`."""
    served: dict[str, MappingProxyType[str, Implementation]] = {}
    for op in SCHEMAS:
        served[op] = MappingProxyType({device: _implementation(op, device) for device in DEVICES})
    return MappingProxyType(served)


def _implementation(op: str, device: str) -> Implementation:
    if _registered(op, device.upper()):
        return "extension"
    return "torch" if (op, device) in BY_TORCH else "reference"


def use_isa(name: str, library: Path = CPU_LIBRARY) -> bool:
    """For tests: from now on, runs the kernels of instruction set `name`. False if this machine cannot."""
    return bool(_functions(library).lorax_cpu_use_isa(name.encode()))


def _registered(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)


@cache
def cpu_function(name: str) -> Callable[..., int] | None:
    """A plain function of the CPU library, with the signature in CPU_FUNCTIONS; None if the library lacks it."""
    library = load().path
    if library is None or not hasattr(_functions(library), name):  # an older build
        return None
    function = getattr(_functions(library), name)
    function.argtypes, function.restype = CPU_FUNCTIONS[name]
    found: Callable[..., int] = function
    return found


@cache
def _functions(library: Path) -> ctypes.CDLL:
    functions = ctypes.CDLL(str(library))
    functions.lorax_cpu_isa.restype = ctypes.c_char_p
    functions.lorax_cpu_use_isa.argtypes = [ctypes.c_char_p]
    return functions
