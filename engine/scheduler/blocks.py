"""The KV cache as a pool of blocks with reference counts, and the prefix cache over it.

A block holds `block_size` positions. Block 0 is scratch for padding and is never handed out. Every other block is in
exactly one of three states:

    used    one or more sequences refer to it
    cached  no sequence refers to it, but it can be found by its key; taken last, least recently used first
    free    neither

The key of a full block is a hash over the key of the block before it and its own token ids, so that equal keys mean
equal prefixes. The chain starts at a root made of the adapter's digest and the tenant's salt: KV entries depend on both
the tokens and the adapter, and private adapters share nothing across tenants.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

KEY_BYTES = 16


def root_key(adapter_digest: bytes | None, salt: bytes) -> bytes:
    """The start of the chain of keys. Each part has its length as a prefix, so that no part can pose as another."""
    state = blake2b(digest_size=KEY_BYTES, person=b"kv-root")
    for part in (b"base" if adapter_digest is None else b"lora", adapter_digest or b"", salt):
        state.update(len(part).to_bytes(8, "little") + part)
    return state.digest()


def extend_keys(
    keys: list[bytes], root: bytes, tokens: list[int], block_size: int, num_blocks: int
) -> None:
    """Append to `keys` until it covers the first `num_blocks` full blocks of `tokens`."""
    first = len(keys)
    if first >= num_blocks:
        return
    ids = array("q", tokens[first * block_size : num_blocks * block_size]).tobytes()
    stride = 8 * block_size
    parent = keys[-1] if keys else root
    for start in range(0, len(ids), stride):
        parent = blake2b(parent + ids[start : start + stride], digest_size=KEY_BYTES).digest()
        keys.append(parent)


class BlockPool:
    """Hands out blocks, counts references, and finds cached blocks by key."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        assert num_blocks >= 2, "block 0 is scratch, so a pool needs at least two"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))  # a stack: low numbers first
        # Unreferenced blocks with a key, least recent first. The first key of a dict is slow to find after deletions.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def usable(self) -> int:
        """Blocks without the scratch block."""
        return self.num_blocks - 1

    @property
    def available(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_keys(self) -> int:
        """Blocks that can be found by key."""
        return len(self._block_of)

    def blocks_for(self, positions: int) -> int:
        return -(-positions // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; the caller checks `available` first."""
        assert count <= self.available, "allocated more than available"
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._references[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each; cached blocks become used."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def free(self, blocks: list[int]) -> None:
        """Drop one reference to each. The end of a prefix is evicted before its start."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def match(self, keys: list[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of the chain `keys`."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def register(self, block: int, key: bytes) -> None:
        """Make a used block findable. Its contents must be complete: written by a committed step.

        A second block with the same contents gets no key; it is free once no sequence uses it.
        """
        assert self._references[block] > 0, "registered a block that no sequence uses"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def check(self, users: Iterable[list[int]]) -> None:
        """Assert every invariant, given the block tables of all users."""
        counts = [0] * self.num_blocks
        for table in users:
            assert len(set(table)) == len(table), "a table holds a block twice"
            for block in table:
                counts[block] += 1
        assert counts == self._references, "reference counts differ from the users' tables"
        assert counts[0] == 0, "scratch block handed out"
        free, cached = set(self._free), set(self._cached)
        used = {block for block in range(self.num_blocks) if counts[block]}
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & cached or free & used or cached & used), "a block is in two states"
        assert len(free) + len(cached) + len(used) == self.usable, "a block is lost"
        assert cached <= self._key_of.keys(), "a cached block has no key"
        assert not free & self._key_of.keys(), "a free block has a key"
        assert {key: block for block, key in self._key_of.items()} == self._block_of
