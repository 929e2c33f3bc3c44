"""What parent and child of a sandbox say to each other."""

from __future__ import annotations

from typing import Any

import msgspec

READY = (
    b"ready "  # then the resident bytes and a line's end: the child is confined and begins its task
)
EXIT_MEMORY = 77  # exit code of a child that was refused memory


class Limits(msgspec.Struct, frozen=True):
    """What a task may take. What the child needs before it begins (its imports) does not count."""

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
