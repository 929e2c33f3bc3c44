"""The device in virtual time: how long a step and a copy take, and when copies are reported."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from engine.bench_options import Pace
from engine.messages import StepPlan, StepResult, TokenOutput

TOKEN = TokenOutput(1)


class Launched(NamedTuple):
    """A step on the device, with the result that it will have."""

    end: float  # seconds
    result: StepResult


class SimulatedDevice:
    """Steps run one after the other; copies run one after the other, next to the steps."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self.num_steps = 0  # that compute tokens
        self._free_at = 0.0  # when the last launched step ends
        self._slots: dict[int, int] = {}  # row -> slot
        self._decode_rows = 0
        self._decode_slots: set[int] = set()
        self._copies: deque[tuple[float, int]] = deque()  # (end, slot)
        self._copied_at = 0.0  # when the last started copy ends

    def launch(self, plan: StepPlan, now: float) -> Launched:
        """Starts a step. Its result reports the copies that have ended by now."""
        self._apply(plan, now)
        num_tokens = sampled = 0
        slots = self._decode_slots
        if plan.chunks:
            slots = slots | {self._slots[chunk.row] for chunk in plan.chunks}
            for chunk in plan.chunks:
                num_tokens += chunk.count
                sampled += chunk.sample
        busy = self._decode_rows > 0 or num_tokens > 0
        seconds = self._seconds(num_tokens, len(slots) - (0 in slots)) if busy else 0.0
        self.num_steps += busy
        resident = []
        while self._copies and self._copies[0][0] <= now:
            resident.append(self._copies.popleft()[1])
        self._free_at = max(now, self._free_at) + seconds
        if not busy and self._copies:  # a step without work only waits for a copy
            self._free_at = max(self._free_at, self._copies[0][0])
        outputs = [TOKEN] * (self._decode_rows + sampled)
        return Launched(self._free_at, StepResult(plan.step, outputs, {}, resident))

    def _apply(self, plan: StepPlan, now: float) -> None:
        for placement in plan.placements:
            seconds = placement.image.data_bytes / (self._pace.place_gb_s * 1e9)
            self._copied_at = max(now, self._copied_at) + seconds
            self._copies.append((self._copied_at, placement.slot))
        for admit in plan.admit:
            self._slots[admit.row] = admit.slot
        if plan.decode is not None:
            self._decode_rows = len(plan.decode)
            self._decode_slots = {self._slots[row] for row in plan.decode}

    def _seconds(self, num_tokens: int, adapters: int) -> float:
        """Of a step with this many prompt tokens and distinct adapters."""
        pace = self._pace
        milliseconds = pace.step_ms + (pace.lora_ms if adapters else 0.0)
        microseconds = (
            pace.row_us * self._decode_rows
            + pace.token_us * num_tokens
            + pace.adapter_us * adapters
        )
        return milliseconds / 1e3 + microseconds / 1e6
