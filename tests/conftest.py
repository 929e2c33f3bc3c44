"""What holds for every test."""

from __future__ import annotations

import gc
import os

import pytest

# Threads of torch that wait do not spin: on two cores, they would take the time of the tests and of their processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="module", autouse=True)
def what_stays_is_not_searched_for_garbage() -> None:
    """The modules and the tests, of which a collection would take a second. A benchmark's run undoes it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `gpu` needs one, and errs where an op would run on its reference there."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    from engine import ops

    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    ops.require_cuda()
