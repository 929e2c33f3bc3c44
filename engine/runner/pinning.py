"""Host memory that a GPU copies from at full speed: pinned page by page, which takes a second for every few GB.

A thread of its own does it while the model loads. It first has the kernel fill the pages in, which is most of the work
and holds up nobody; registering them with the driver, which may hold up other calls into it, is short after that.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import time

import torch
from torch import Tensor

from engine.errors import ConfigError

MADV_POPULATE_WRITE = (
    23  # Linux 5.14; older kernels refuse, and the pages are filled in while registered
)
POPULATED_BYTES = 16 << 20  # at a time: meanwhile no other thread can map memory

logger = logging.getLogger(__name__)


class Pinning:
    """Pins `host` from the constructor on; `wait` returns when it is done."""

    def __init__(self, host: Tensor, device: torch.device) -> None:
        """`host` [bytes] uint8, which must stay mapped until `release`; `device` is a GPU."""
        self.host, self.device = host, device
        self.seconds = 0.0
        self._error = 0  # of the CUDA runtime, or its name
        torch.cuda.init()
        self._thread = threading.Thread(target=self._pin, name="pinning", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Raises ConfigError where the system does not allow so much."""
        waited = time.perf_counter()
        self._thread.join()
        waited = time.perf_counter() - waited
        if self._error:
            raise ConfigError(
                f"{self.host.numel()} bytes of host memory cannot be pinned: CUDA error {self._error}",
                field="host_cache_gb",
                hint="lower --host-cache-gb or raise the limit of locked memory (ulimit -l)",
            )
        size = self.host.numel() / (1 << 30)
        logger.info(
            "pinned %.2f GiB of host memory in %.2f s, of which %.2f s were waited for",
            size,
            self.seconds,
            waited,
        )

    def release(self) -> None:
        """The memory may be unmapped; no copy may be under way."""
        self._thread.join()
        if not self._error:
            torch.cuda.cudart().cudaHostUnregister(self.host.data_ptr())

    def _pin(self) -> None:
        started = time.perf_counter()
        populate(self.host)
        with torch.cuda.device(self.device):
            registered = torch.cuda.cudart().cudaHostRegister(
                self.host.data_ptr(), self.host.numel(), 0
            )
        self._error = int(registered)
        self.seconds = time.perf_counter() - started


def populate(host: Tensor) -> bool:
    """Has the kernel give [bytes] uint8 its pages, keeping what is in them; False where it cannot."""
    if sys.platform != "linux" or not host.numel():
        return False
    madvise = ctypes.CDLL(None).madvise  # unlike mmap.madvise, it lets other threads run meanwhile
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pieces = host.split(POPULATED_BYTES)
    return all(madvise(one.data_ptr(), one.numel(), MADV_POPULATE_WRITE) == 0 for one in pieces)
