"""Plans each step: sequences, KV blocks, run-ahead, fairness between adapters. No torch."""

from engine.scheduler.blocks import BlockPool
from engine.scheduler.fairness import Slots
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.scheduler import Scheduler

__all__ = ["BlockPool", "Scheduler", "SchedulerLimits", "Slots"]
