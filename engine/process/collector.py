"""The garbage collector of a process that serves."""

from __future__ import annotations

import gc


def freeze_gc() -> None:
    """Says that what is alive now stays: modules, a model, an application. Called once, when a process is ready.

    A full collection among it would stop every thread: a shard's for tens of ms, the exchange's for 0.1 s every few
    adapters, and the front's for 0.3 s in which no stream gets its tokens.
    """
    gc.collect()
    gc.freeze()
