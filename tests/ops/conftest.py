"""Every instruction set that the CPU library has and this machine can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
