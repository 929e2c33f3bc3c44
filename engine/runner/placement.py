"""Copies images from the host region into the arena, a bounded piece per step, and their records into the slots.

`Placer` copies in the caller's thread, between host tensors. `CudaPlacer` starts copies on its own CUDA stream and
reports a slot when the event after its last copy has completed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.messages import Placement
from engine.ops.layout import (
    ALIGN,
    RECORD_WORDS,
    WORD_A,
    WORD_B,
    WORD_EXTRA,
    WORD_RANK2,
    WORD_RANKS,
    data_start,
)
from engine.runner.pinning import Pinning

COPY_BYTES = 4 << 20  # the largest piece of one copy


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

    bytes_per_busy_step = 4 << 20
    bytes_per_idle_step = 64 << 20

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
        """Queues a placement; nothing of it is visible before `advance` returns its slot."""
        assert placement.offset % ALIGN == 0, "placements are aligned"
        assert placement.offset + placement.image.data_bytes <= self.arena.numel()
        assert all(copy.placement.slot != placement.slot for copy in self._copies)
        self._copies.append(_Copy(placement))

    def touched(self, placement: Placement) -> list[list[bool]]:
        """[layers + 1][groups]: whether the adapter adapts that group."""
        start = placement.image.offset
        words = self.host[start : start + self._record_bytes].view(torch.int32)
        return adapted(words.view(self.records.shape[1:])).tolist()

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
        piece = self.host[source : source + count]
        self.arena[target : target + count].copy_(piece, non_blocking=True)
        copy.done += count
        return count

    def _publish(self, placement: Placement) -> None:
        """Semantics: records[slot] = image's records; where they have ranks, offsets are moved to the placement."""
        self.records[placement.slot] = self._relocated(placement)

    def _relocated(self, placement: Placement) -> Tensor:
        start = placement.image.offset
        words = self.host[start : start + self._record_bytes].view(torch.int32)
        return relocated(words.view(self.records.shape[1:]), placement.offset)

    def unplace(self, slot: int) -> None:
        """Resets the slot to the base model; drops a placement under way."""
        self._copies = deque(copy for copy in self._copies if copy.placement.slot != slot)
        self.records[slot].zero_()

    def close(self) -> None:
        """Releases the host memory; no copy is under way after it."""


class CudaPlacer(Placer):
    """Placements from pinned host memory into a GPU, on a separate stream that overlaps with the steps."""

    bytes_per_busy_step = 256 << 20  # about 5 ms over PCIe; a copy hardly slows the step
    bytes_per_idle_step = 1 << 30

    def __init__(
        self, arena: Tensor, records: Tensor, region: Region, pinning: Pinning | None = None
    ) -> None:
        """`pinning` of the region, if it has begun. Raises ConfigError if the system does not allow pinning."""
        super().__init__(arena, records, region)
        self._pinning = pinning or pin(region, arena.device)
        self._pinning.wait()
        self._stream = torch.cuda.Stream(arena.device)
        self._staging = torch.empty(records.shape, dtype=torch.int32, pin_memory=True)
        self._landing: deque[tuple[int, torch.cuda.Event]] = deque()  # in the order of the stream

    def advance(self, max_bytes: int) -> list[int]:
        """Starts copies of at most `max_bytes`; returns the slots whose last copy has completed."""
        if self._copies:
            with torch.cuda.stream(self._stream):
                for slot in super().advance(max_bytes):
                    self._landing.append((slot, self._stream.record_event()))
        resident = []
        while self._landing and self._landing[0][1].query():
            resident.append(self._landing.popleft()[0])
        return resident

    def _publish(self, placement: Placement) -> None:
        staged = self._staging[placement.slot]
        staged.copy_(self._relocated(placement))
        self.records[placement.slot].copy_(staged, non_blocking=True)

    def unplace(self, slot: int) -> None:
        """As `Placer.unplace`; the two streams wait for each other, the host does not wait."""
        steps = torch.cuda.current_stream(self.records.device)
        for landing, event in self._landing:
            if landing == slot:
                steps.wait_event(event)
        self._landing = deque(entry for entry in self._landing if entry[0] != slot)
        super().unplace(slot)
        self._stream.wait_event(steps.record_event())

    def close(self) -> None:
        self._stream.synchronize()
        self._pinning.release()


def pin(region: Region, device: torch.device) -> Pinning:
    """Begins to pin the whole region for a GPU."""
    return Pinning(torch.frombuffer(region.view, dtype=torch.uint8), device)


def adapted(records: Tensor) -> Tensor:
    """[layers + 1, groups]: whether the records have ranks."""
    return (records[..., WORD_RANKS] != 0) | ((records[..., WORD_RANK2] & 0xFFFF) != 0)


def relocated(records: Tensor, offset: int) -> Tensor:
    """An image's records [layers + 1, groups, 8] for data that lies `offset` bytes into the arena."""
    words = records.clone()
    # int64, since offsets are uint32 in int32 words
    moved = words[..., WORD_A : WORD_EXTRA + 1].long() & 0xFFFFFFFF
    shift = offset // ALIGN
    extra = moved[..., WORD_EXTRA] != 0
    moved[..., WORD_A : WORD_B + 1] += shift
    moved[..., WORD_EXTRA] += shift * extra
    words[..., WORD_A : WORD_EXTRA + 1] = moved.to(torch.int32) * adapted(words)[..., None]
    return words
