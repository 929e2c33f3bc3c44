"""Every kind of hostile adapter, and how one is written. Imports nothing large: it runs in a process of its own."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from tools.attack import configs, files, hub, pickles, tensors

CONTENTS = pickles.KINDS | tensors.KINDS | configs.KINDS  # from a folder and from the hub
MAY_SERVE = {"safetensors duplicate keys"}  # the last one counts, as the format's own reader has it
SLOW = {
    f"hub {manner}" for manner in ("drips", "drips-facts", "silent", "endless", "lies", "resets")
}
GOOD = "good"


def begin_writing() -> None:
    """The writer gives way to the server."""
    os.nice(10)


def plan(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(kind, `local` or `hub`) of `count` adapters: every kind in turn, those that take long first."""
    chosen = random.Random(seed)
    kinds = [*CONTENTS, *files.KINDS, *(f"hub {manner}" for manner in hub.MANNERS)]
    chosen.shuffle(kinds)
    kinds.sort(key=lambda kind: kind not in SLOW)
    for kind in itertools.islice(itertools.cycle(kinds), count):
        if kind.startswith("hub "):
            yield kind, "hub"
        else:
            yield kind, chosen.choice(["local", "hub"]) if kind in CONTENTS else "local"


def write(folder: Path, kind: str, seed: int) -> None:
    """One hostile folder, from the good one beside it. Runs in a process of its own."""
    shutil.copytree(folder.parent.parent / GOOD, folder)
    (CONTENTS | files.KINDS)[kind](folder, random.Random(seed))
