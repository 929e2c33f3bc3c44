"""The block tables of the sequences, and their entries in the prefix cache.

Blocks that steps in flight are filling are tracked by key too. A sequence that could share such a block waits for it
instead of computing the same: a burst of equal prompts is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.scheduler.blocks import BlockPool, extend_keys
from engine.scheduler.sequence import Sequence


class BlockTables:
    """The block tables of all sequences over one pool."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.num_drops = 0
        self._size = pool.block_size
        self._filling: set[bytes] = set()

    def compute_keys(self, sequence: Sequence, positions: int) -> None:
        """Compute the keys of the full blocks among the first `positions`, which must be in `tokens`."""
        if self.pool.prefix_caching:
            count = positions // self._size
            extend_keys(sequence.keys, sequence.root, sequence.tokens, self._size, count)

    def find_prefix(self, sequence: Sequence) -> list[int] | None:
        """Cached blocks that the sequence can start with; None: another sequence is filling the next one.

        The last token is always computed, for its logits.
        """
        if sequence.needs_whole_prompt:
            return []
        keys = sequence.keys[: (len(sequence.tokens) - 1) // self._size]
        found = self.pool.match(keys)
        if len(found) < len(keys) and keys[len(found)] in self._filling:
            return None
        return found

    def append(self, sequence: Sequence, blocks: list[int]) -> None:
        sequence.blocks += blocks
        sequence.capacity = len(sequence.blocks) * self._size

    def start_after_prefix(self, sequence: Sequence, found: list[int]) -> None:
        """The sequence starts after the cached prefix in the blocks `found`."""
        sequence.computed = sequence.committed = len(found) * self._size
        sequence.registered = len(found)

    def fill(self, sequence: Sequence, start: int, end: int) -> None:
        """A planned step computes positions start .. end."""
        self._filling.update(sequence.keys[start // self._size : end // self._size])

    def stop_filling(self, sequence: Sequence) -> None:
        """The results of steps in flight for the sequence will be dropped."""
        first, last = sequence.committed // self._size, sequence.computed // self._size
        self._filling.difference_update(sequence.keys[first:last])

    def register(self, sequence: Sequence) -> None:
        """Add the blocks that committed steps have filled to the prefix cache."""
        self.compute_keys(sequence, sequence.committed)
        full = min(sequence.committed // self._size, len(sequence.keys))
        for index in range(sequence.registered, full):
            self.pool.register(sequence.blocks[index], sequence.keys[index])
            self._filling.discard(sequence.keys[index])
        sequence.registered = full

    def drop(self, sequence: Sequence) -> None:
        """Free the blocks; every position must be computed again."""
        self.pool.free(sequence.blocks)
        sequence.blocks = []
        sequence.capacity = sequence.computed = sequence.committed = sequence.registered = 0
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs, sequence.prompt_tops = [], []
        sequence.pooled = None
        sequence.preemptions += 1
        self.num_drops += 1

    def drop_paused(self, sequence: Sequence) -> None:
        """Free a paused sequence's blocks. It is not paused again: two could undo each other's work forever."""
        self.drop(sequence)
        sequence.pausable = False

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert every invariant, of the pool too."""
        users = list(sequences)
        self.pool.check([sequence.blocks for sequence in users])
        filling: set[bytes] = set()
        for sequence in users:
            assert sequence.capacity == len(sequence.blocks) * self._size
            assert sequence.computed <= sequence.capacity, "computes beyond its blocks"
            full = min(sequence.committed // self._size, len(sequence.keys))
            assert sequence.registered == full
            filling.update(sequence.keys[full : sequence.computed // self._size])
        assert self._filling <= filling, "a sequence waits for a block that no step computes"
