"""Copies images from the host region into the arena, a bounded piece per step, and their records into the slots.

`Placer` copies with the caller's thread, between host tensors. A device with copy streams gets its own class with
the same three methods: it starts copies in `advance` and reports a slot when the event behind its last copy has
completed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.lora.image import data_start
from engine.messages import Placement
from engine.ops.layout import (
    ALIGN,
    RECORD_WORDS,
    WORD_A,
    WORD_B,
    WORD_EXTRA,
    WORD_RANK2,
    WORD_RANKS,
)

COPY_BYTES = 4 << 20  # the most that is copied in one piece


class Region(Protocol):
    """The host memory that holds the images: `engine.adapters.tiers.HostRegion`."""

    @property
    def view(self) -> memoryview: ...


@dataclass(slots=True)
class _Copy:
    placement: Placement
    done: int = 0  # bytes of data copied


class Placer:
    """Placements in host memory."""

    def __init__(self, arena: Tensor, records: Tensor, region: Region) -> None:
        """`arena` [bytes] uint8; `records` [slots, layers + 1, groups, 8] int32, zero where nothing is placed."""
        assert arena.dtype == torch.uint8 and records.dtype == torch.int32
        assert records.shape[-1] == RECORD_WORDS
        self.arena = arena
        self.records = records
        self.host = torch.frombuffer(region.view, dtype=torch.uint8)
        self._record_bytes = records[0].numel() * 4
        self._copies: deque[_Copy] = deque()

    def start(self, placement: Placement) -> None:
        """Takes a placement on; nothing of it is visible before `advance` returns its slot."""
        assert placement.offset % ALIGN == 0, "placements are aligned"
        assert placement.offset + placement.image.data_bytes <= self.arena.numel()
        assert all(copy.placement.slot != placement.slot for copy in self._copies)
        self._copies.append(_Copy(placement))

    def advance(self, max_bytes: int) -> list[int]:
        """Copies at most `max_bytes` more, the oldest placement first; returns the slots that are now resident."""
        resident = []
        budget = max(max_bytes, 1)
        while self._copies and budget > 0:
            copy = self._copies[0]
            budget -= self._copy(copy, budget)
            if copy.done == copy.placement.image.data_bytes:
                self._copies.popleft()
                self._publish(copy.placement)
                resident.append(copy.placement.slot)
        return resident

    def _copy(self, copy: _Copy, budget: int) -> int:
        """Copies the next piece; returns its bytes."""
        image = copy.placement.image
        count = min(image.data_bytes - copy.done, budget, COPY_BYTES)
        source = image.offset + data_start(self._record_bytes) + copy.done
        target = copy.placement.offset + copy.done
        self.arena[target : target + count].copy_(self.host[source : source + count])
        copy.done += count
        return count

    def _publish(self, placement: Placement) -> None:
        """Semantics: records[slot] = image's records, their offsets moved to the placement, where it has ranks."""
        start = placement.image.offset
        words = self.host[start : start + self._record_bytes].view(torch.int32)
        self.records[placement.slot] = relocated(
            words.view(self.records.shape[1:]), placement.offset
        )

    def unplace(self, slot: int) -> None:
        """The slot is the base model again; a placement under way is dropped."""
        self._copies = deque(copy for copy in self._copies if copy.placement.slot != slot)
        self.records[slot].zero_()


def relocated(records: Tensor, offset: int) -> Tensor:
    """An image's records [layers + 1, groups, 8] for data that lies `offset` bytes into the arena."""
    words = records.clone()
    adapted = (words[..., WORD_RANKS] != 0) | ((words[..., WORD_RANK2] & 0xFFFF) != 0)
    # int64, since offsets are uint32 in int32 words
    moved = words[..., WORD_A : WORD_EXTRA + 1].long() & 0xFFFFFFFF
    shift = offset // ALIGN
    extra = moved[..., WORD_EXTRA] != 0
    moved[..., WORD_A : WORD_B + 1] += shift
    moved[..., WORD_EXTRA] += shift * extra
    words[..., WORD_A : WORD_EXTRA + 1] = moved.to(torch.int32) * adapted[..., None]
    return words
