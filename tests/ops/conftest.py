"""What tests of kernels share: every instruction set of this machine, the GPU, and fresh inputs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from engine.ops import extension

ISAS = ["generic", "avx2", "avx512", "avx512_bf16"]
status = extension.load()


@contextmanager
def cpu_kernels(isa: str) -> Iterator[None]:
    """CPU ops run with this instruction set; the test is skipped where the machine lacks it."""
    if status.path is None:
        pytest.skip(status.reason or "")
    if not extension.use_isa(isa):
        pytest.skip(f"no {isa} here")
    yield
    assert status.isa is not None
    extension.use_isa(status.isa)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu_kernels(request.param):
        yield request.param


@pytest.fixture(params=[*ISAS, pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each instruction set of the CPU and on the GPU, where its tensors are made by default."""
    torch.manual_seed(0)
    if request.param == "cuda":
        with torch.device("cuda"):
            yield "cuda"
    else:
        with cpu_kernels(request.param):
            yield "cpu"


@pytest.fixture
def fresh() -> Iterator[None]:
    """Another seed every time, shown when the test fails; one thread, unless the test says otherwise."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
