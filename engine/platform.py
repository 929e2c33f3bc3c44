"""The machine: one frozen object, made once. The only module of its level that imports torch."""

from __future__ import annotations

import os
import platform as host
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import GIB, EngineConfig
from engine.errors import ConfigError
from engine.messages import IMAGE_ALIGN

MAX_CPU_BUDGET = 4 * GIB  # by default: a laptop runs other programs too
MAX_HOST_TIER = 4 * GIB


@dataclass(frozen=True, slots=True)
class Platform:
    """The compute device of this process and the memory that the engine may plan with."""

    device: torch.device
    name: str
    budget: int  # bytes for weights, KV cache and arena on a GPU; for KV cache and arena on a CPU

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def free_host_memory() -> int:
    """Bytes that a process can still take: the machine's, or the container's where that is less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def host_tier_bytes(config: EngineConfig) -> int:
    """Bytes of the shared region that holds images ready to be placed. With --merge-adapter-weights there are none."""
    if config.adapters.merge_adapter_weights:
        return IMAGE_ALIGN
    if config.adapters.host_cache_gb is not None:
        if config.adapters.host_cache_gb <= 0:
            raise ConfigError("--host-cache-gb must be above 0", field="host_cache_gb")
        return int(config.adapters.host_cache_gb * GIB)
    return min(MAX_HOST_TIER, free_host_memory() // 4)


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return host.processor() or host.machine()


def device_type(config: EngineConfig) -> str:
    """`--device`; auto is "cuda" if torch sees a GPU, else "cpu". Raises ConfigError for a missing GPU."""
    device = config.memory.device
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch sees no GPU",
            field="device",
            hint="install a CUDA build of torch and the GPU's driver, or leave the flag out",
        )
    return device


def set_threads(config: EngineConfig) -> None:
    """Sets torch's number of threads in the calling thread: --num-threads, or one per core."""
    torch.set_num_threads(config.memory.num_threads or len(os.sched_getaffinity(0)))


def detect(config: EngineConfig) -> Platform:
    """The device of `device_type`, and the memory that the engine may use on it."""
    if device_type(config) == "cuda":
        fraction = config.memory.cuda_memory_fraction
        if not 0 < fraction <= 1:
            raise ConfigError(
                "--cuda-memory-fraction must be above 0 and at most 1", field="cuda_memory_fraction"
            )
        device = torch.device("cuda", torch.cuda.current_device())
        free, _ = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return Platform(device, name, int(free * fraction))
    given = config.memory.cpu_memory_gb
    budget = int(given * GIB) if given else min(MAX_CPU_BUDGET, free_host_memory() // 4)
    return Platform(torch.device("cpu"), _processor_name(), budget)
