"""A task that converts many files, one after the other: what each is answered."""

from __future__ import annotations

import os
from typing import Any

from engine.sandbox.tasks import convert
from engine.sandbox.tasks.convert import prepare as prepare


def run(descriptors: dict[str, int], arguments: dict[str, Any]) -> dict[str, Any]:
    """`descriptors`: name -> file. Returns name -> answer of the conversion."""
    target = os.open(os.devnull, os.O_WRONLY)
    return {
        name: convert.run({"source": source, "target": target}, {})
        for name, source in descriptors.items()
    }
