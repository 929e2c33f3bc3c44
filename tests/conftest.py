"""What holds for every test."""

from __future__ import annotations

import pytest


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
