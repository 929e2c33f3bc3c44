"""Digests of an image's leaves: BLAKE2b (RFC 7693) of every LEAF_BYTES, many at a time where the library was built."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from engine.ops.extension import cpu_function

LEAF_BYTES = 16 << 10  # the last leaf may be shorter
LEAF_DIGEST_BYTES = 32


def leaf_digests(data: Tensor) -> memoryview:
    """The digests of the leaves of `data` [bytes] uint8, one after another."""
    function = cpu_function("lorax_cpu_leaf_digests")
    if function is None:
        return reference(data)
    out = torch.empty(-(-len(data) // LEAF_BYTES) * LEAF_DIGEST_BYTES, dtype=torch.uint8)
    function(data.data_ptr(), len(data), LEAF_BYTES, out.data_ptr())
    return out.numpy().data


def reference(data: Tensor) -> memoryview:
    """The same by hashlib."""
    view = data.numpy().data
    leaves = (view[at : at + LEAF_BYTES] for at in range(0, len(view), LEAF_BYTES))
    digests = (hashlib.blake2b(leaf, digest_size=LEAF_DIGEST_BYTES).digest() for leaf in leaves)
    return memoryview(b"".join(digests))
