"""Digests of leaves: the compiled function against hashlib."""

from __future__ import annotations

import pytest
import torch

from engine.ops.digest import LEAF_BYTES, leaf_digests, reference


@pytest.mark.parametrize("leaves", [0, 1, 2, 3, 7, 8, 9, 29])
@pytest.mark.parametrize("rest", [0, 1, 127, 128, 129, LEAF_BYTES - 1])
def test_the_same_as_hashlib(isa: str, fresh: None, leaves: int, rest: int) -> None:
    data = torch.randint(0, 256, (leaves * LEAF_BYTES + rest + 3,), dtype=torch.uint8)[3:]
    assert leaf_digests(data) == reference(data)
