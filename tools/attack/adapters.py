"""Hostile adapters, each written just before it is asked for, and what the server answers."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import aiohttp

from engine.config import ModelConfig
from engine.models import adapter_layout
from tools.adapters import write_adapter
from tools.attack import files, pickles
from tools.attack.kinds import GOOD, MAY_SERVE, begin_writing, plan, write
from tools.attack.load import RESIDENT, ROTATING, ask, body_of, session_of
from tools.attack.server import Server
from tools.tiny import write_model

AT_A_TIME = 8
MAX_UNANSWERED = 12
HOSTILE = "hostile"
RANK = 4
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
}


def write_all(folder: Path) -> None:
    """The base model and the good adapters."""
    write_model(folder / "model", **MODEL)
    model = ModelConfig(model_id=str(folder / "model"), dtype="float32", load_format="dummy")
    layout, _, _ = adapter_layout(model)
    for i, name in enumerate((*RESIDENT, *ROTATING, GOOD)):
        targets = ["q_proj", "v_proj"]
        write_adapter(folder / "adapters" / name, layout, RANK, seed=i, targets=targets)


@dataclass
class Outcome:
    """What became of them."""

    asked: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    types: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    ran_code: int = 0
    unanswered: int = 0

    @property
    def hopeless(self) -> bool:
        """Whether so many were not answered at all that asking for more says nothing."""
        return self.unanswered >= MAX_UNANSWERED


async def ask_all(server: Server, count: int, seed: int, limit_s: float, found: Outcome) -> None:
    """Asks for `count` hostile adapters, a few at a time."""
    numbers = iter(enumerate(plan(count, seed)))
    writers = ProcessPoolExecutor(1, get_context("spawn"), begin_writing)

    async def client(session: aiohttp.ClientSession) -> None:
        for number, (kind, source) in numbers:
            if not server.alive or found.hopeless:
                return
            chosen = (kind, source, seed * 10_000 + number)
            await _one(server, session, writers, what=chosen, limit_s=limit_s, found=found)

    try:
        async with session_of(server) as session:
            await asyncio.gather(*(client(session) for _ in range(AT_A_TIME)))
    finally:
        writers.shutdown(wait=False, cancel_futures=True)


async def _one(
    server: Server,
    session: aiohttp.ClientSession,
    writers: ProcessPoolExecutor,
    what: tuple[str, str, int],
    limit_s: float,
    found: Outcome,
) -> None:
    kind, source, number = what
    name = f"h{number}"
    folder = server.folder / "adapters" / HOSTILE / name
    adapter = f"{HOSTILE}/{name}" if source == "local" else f"files/{name}"
    if kind.startswith("hub "):
        adapter = f"hostile/{kind.removeprefix('hub ')}-{number}"
    else:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(writers, write, folder, kind, number)
    ended = threading.Event()
    if kind in files.LIVE:
        threading.Thread(target=_keep_changing, args=(folder, kind, ended), daemon=True).start()
    start = time.monotonic()
    status, why = await ask(session, body_of("word1", adapter, source, max_new_tokens=1), limit_s)
    took = time.monotonic() - start
    ended.set()
    found.asked[kind] += 1
    found.types[why or str(status)] += 1
    found.slowest[kind] = max(found.slowest.get(kind, 0.0), took)
    found.unanswered += not status
    served = status == 200 and kind in MAY_SERVE
    if not served and not (400 <= status < 500 and why):
        found.wrong.append(f"{kind} ({source}): {status} {why} after {took:.1f} s")
    found.ran_code += (folder / pickles.CODE_MARK).exists()
    # A worker thread may still be at it.
    shutil.rmtree(folder, ignore_errors=True)


def _keep_changing(folder: Path, kind: str, ended: threading.Event) -> None:
    while not ended.wait(0.001):
        files.LIVE[kind](folder)
