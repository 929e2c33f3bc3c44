"""Pinning a region: its pages first, then the driver."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch

from engine.adapters.tiers import HostRegion
from engine.errors import ConfigError
from engine.runner.pinning import Pinning, populate


def resident() -> int:
    """Bytes of shared memory that this process has pages of."""
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("RssShmem:"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the pages")
def test_pages_are_there_and_what_was_in_them_too() -> None:
    size = 64 << 20
    region = HostRegion.create(size)
    region.view[12345:12350] = b"there"
    before = resident()
    host = torch.frombuffer(region.view, dtype=torch.uint8)
    if not populate(host):
        pytest.skip("an older kernel")
    assert resident() - before > size * 0.9
    assert bytes(region.view[12345:12350]) == b"there"
    assert int(host.count_nonzero()) == 5
    del host
    region.close()


class Driver:
    """A CUDA runtime that registers memory, or answers with an error."""

    def __init__(self, error: int) -> None:
        self.error = error
        self.registered: list[tuple[int, int]] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.registered.append((address, size))
        return self.error

    def cudaHostUnregister(self, address: int) -> None:
        self.registered.remove((address, self.registered[0][1]))


@pytest.mark.parametrize("error", [0, 2])
def test_memory_that_cannot_be_pinned_is_an_error(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(error)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    host = torch.zeros(1 << 16, dtype=torch.uint8)
    pinning = Pinning(host, torch.device("cuda"))
    if error:
        with pytest.raises(ConfigError, match="CUDA error 2") as caught:
            pinning.wait()
        assert caught.value.field == "host_cache_gb"
    else:
        pinning.wait()
    assert driver.registered == [(host.data_ptr(), 1 << 16)]
    pinning.release()
    assert bool(driver.registered) == bool(error)  # what was never pinned is not let go of
