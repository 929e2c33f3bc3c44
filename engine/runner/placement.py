"""Copies images from the host region into the arena, a bounded piece per step, and their records into the slots.

An image with extras is finished after its copy, with the base weights (`engine.runner.extras`). `Placer` works in the
caller's thread, between host tensors. `CudaPlacer` starts the work on its own CUDA stream and reports a slot when the
event after its last piece has completed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.messages import Placement
from engine.ops.layout import (
    ALIGN,
    EXTRAS,
    FLAG_OWN_ROWS,
    FLAGS_SHIFT,
    PAIRS,
    RECORD_WORDS,
    REPLACES,
    RESCALES,
    WORD_A,
    WORD_EXTRA,
    WORD_OWN,
    WORD_RANK2,
    WORD_RANKS,
    data_start,
)
from engine.runner.extras import Finisher
from engine.runner.pinning import Pinning

COPY_BYTES = 4 << 20  # the largest piece of one copy


class Region(Protocol):
    """The host memory that holds the images: `engine.adapters.tiers.HostRegion`."""

    @property
    def view(self) -> memoryview: ...


class Budget(NamedTuple):
    """What placements may take of one step."""

    bytes: int  # to copy
    weights: int  # of the base to read for extras


@dataclass(slots=True)
class _Copy:
    placement: Placement
    done: int = 0  # bytes of data copied
    finishing: Iterator[int] | None = None  # after the copy


class Placer:
    """Placements in host memory."""

    busy = Budget(4 << 20, 2 << 20)
    idle = Budget(64 << 20, 32 << 20)

    def __init__(
        self, arena: Tensor, records: Tensor, region: Region, finisher: Finisher | None = None
    ) -> None:
        """`arena` [bytes] uint8; `records` [slots, layers + 1, groups, 8] int32, zero where nothing is placed.

        `finisher` may be None if no image has extras.
        """
        assert arena.dtype == torch.uint8 and records.dtype == torch.int32
        assert records.shape[-1] == RECORD_WORDS
        self.arena = arena
        self.records = records
        self.finisher = finisher
        self.host = torch.frombuffer(region.view, dtype=torch.uint8)
        self._record_bytes = records[0].numel() * 4
        self._copies: deque[_Copy] = deque()

    def start(self, placement: Placement) -> None:
        """Queues a placement; nothing of it is visible before `advance` returns its slot."""
        assert placement.offset % ALIGN == 0, "placements are aligned"
        assert placement.offset + placement.image.data_bytes <= self.arena.numel()
        assert all(copy.placement.slot != placement.slot for copy in self._copies)
        self._copies.append(_Copy(placement))

    def touched(self, placement: Placement) -> list[list[int]]:
        """[layers + 1][groups]: what the adapter does to the group; see `effects`."""
        return effects(self._image_records(placement)).tolist()

    def advance(self, budget: Budget) -> list[int]:
        """Spends at most `budget`, or one piece of work; returns the slots that are now resident, in order of start."""
        resident = []
        num_bytes, weights = max(budget.bytes, 1), max(budget.weights, 1)
        while self._copies and num_bytes > 0 and weights > 0:
            copy = self._copies[0]
            size = copy.placement.image.data_bytes
            if copy.done < size:
                num_bytes -= self._copy(copy, num_bytes)
            if copy.done < size:
                continue
            if (read := self._finish(copy)) is not None:
                weights -= read
                continue
            self._copies.popleft()
            self._publish(copy.placement)
            resident.append(copy.placement.slot)
        return resident

    def _finish(self, copy: _Copy) -> int | None:
        """Makes the next extras final. Returns the base weights that it read; None: nothing is left."""
        if copy.finishing is None:
            records = self._relocated(copy.placement)
            if not (effects(records) & RESCALES).any():
                return None
            assert self.finisher is not None, "the image has extras"
            copy.finishing = self.finisher.finish(records, copy.placement.image.digest)
        return next(copy.finishing, None)

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
        return relocated(self._image_records(placement), placement.offset)

    def _image_records(self, placement: Placement) -> Tensor:
        """The records [layers + 1, groups, 8] in the image, relative to its data."""
        start = placement.image.offset
        words = self.host[start : start + self._record_bytes].view(torch.int32)
        return words.view(self.records.shape[1:])

    def unplace(self, slot: int) -> None:
        """Resets the slot to the base model; drops a placement under way."""
        self._copies = deque(copy for copy in self._copies if copy.placement.slot != slot)
        self.records[slot].zero_()

    def close(self) -> None:
        """Releases the host memory; no copy is under way after it."""


class CudaPlacer(Placer):
    """Placements from pinned host memory into a GPU, on a separate stream that overlaps with the steps."""

    # 256 MiB take about 5 ms over PCIe; a copy hardly slows the step. 64 Mi weights take about 0.3 ms.
    busy = Budget(256 << 20, 64 << 20)
    idle = Budget(1 << 30, 1 << 30)

    def __init__(
        self,
        arena: Tensor,
        records: Tensor,
        region: Region,
        finisher: Finisher | None = None,
        pinning: Pinning | None = None,
    ) -> None:
        """`pinning` of the region, if it has begun. Raises ConfigError if the system does not allow pinning."""
        super().__init__(arena, records, region, finisher)
        self._pinning = pinning or pin(region, arena.device)
        self._pinning.wait()
        self._stream = torch.cuda.Stream(arena.device)
        self._staging = torch.empty(records.shape, dtype=torch.int32, pin_memory=True)
        self._landing: deque[tuple[int, torch.cuda.Event]] = deque()  # in the order of the stream

    def advance(self, budget: Budget) -> list[int]:
        """Starts work of at most `budget`; returns the slots whose last piece has completed."""
        if self._copies:
            with torch.cuda.stream(self._stream):
                for slot in super().advance(budget):
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


def effects(records: Tensor) -> Tensor:
    """[layers + 1, groups]: what the records do, PAIRS, RESCALES and REPLACES combined."""
    rank2 = records[..., WORD_RANK2]
    found = ((records[..., WORD_RANKS] != 0) | ((rank2 & 0xFFFF) != 0)) * PAIRS
    for flags, effect in ((EXTRAS, RESCALES), (FLAG_OWN_ROWS, REPLACES)):
        found = found + ((rank2 & (flags << FLAGS_SHIFT)) != 0) * effect
    return found


def relocated(records: Tensor, offset: int) -> Tensor:
    """An image's records [layers + 1, groups, 8] for data that lies `offset` bytes into the arena."""
    words, does = records.clone(), effects(records)
    shift = offset // ALIGN
    for first, last, moves in (
        (WORD_A, WORD_EXTRA + 1, does != 0),
        (WORD_OWN, WORD_OWN + 1, (does & REPLACES) != 0),
    ):
        # int64, since offsets are uint32 in int32 words
        moved = (words[..., first:last].long() & 0xFFFFFFFF) + shift * moves[..., None]
        words[..., first:last] = moved.to(torch.int32)
    return words
