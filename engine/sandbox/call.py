"""The messages between the parent and the child of a sandbox."""

from __future__ import annotations

from typing import Any

import msgspec

READY = (
    b"ready "  # followed by the resident bytes and a newline: the confined child begins its task
)
EXIT_MEMORY = 77  # exit code of a child that ran out of memory


class Limits(msgspec.Struct, frozen=True):
    """The limits of a task. The child's imports before the task do not count."""

    cpu_s: int
    wall_s: float
    memory_bytes: int
    file_bytes: int = 0  # of any file that it writes


class Call(msgspec.Struct, frozen=True):
    """One task."""

    task: str  # name of its module
    descriptors: dict[str, int]
    arguments: dict[str, Any]
    limits: Limits
