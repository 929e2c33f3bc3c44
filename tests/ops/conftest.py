"""What tests of the CPU's kernels share: every instruction set of this machine, and fresh inputs."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from engine.ops import extension

status = extension.load()


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if status.path is None:
        pytest.skip(status.reason or "")
    if not extension.use_isa(request.param):
        pytest.skip(f"no {request.param} here")
    yield request.param
    assert status.isa is not None
    extension.use_isa(status.isa)


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
