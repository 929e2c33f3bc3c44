"""The exchange's process is killed, or stopped for good, again and again."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp
import psutil

from tools.attack.load import ANSWER_S, ROTATING, ask, body_of, session_of
from tools.attack.pickles import SAFE
from tools.attack.server import Server

LOOK_S = 0.2


@dataclass
class Faults:
    """What became of them."""

    done: int = 0
    recovered: list[float] = field(
        default_factory=list
    )  # seconds until another process loaded an adapter
    answered: list[float] = field(default_factory=list)  # seconds of a request sent at once
    wrong: list[str] = field(default_factory=list)


async def strike_all(
    server: Server, kills: int, freezes: int, spacing_s: float, found: Faults
) -> None:
    """So many of each, in random order, at least `spacing_s` apart."""
    strikes = [signal.SIGKILL] * kills + [signal.SIGSTOP] * freezes
    random.Random(1).shuffle(strikes)
    async with session_of(server) as session:
        for number, strike in enumerate(strikes):
            start = time.monotonic()
            await _strike(server, session, strike, ROTATING[number % len(ROTATING)], found)
            if not server.alive:
                return
            await asyncio.sleep(max(0.0, start + spacing_s - time.monotonic()))


async def _strike(
    server: Server, session: aiohttp.ClientSession, strike: signal.Signals, name: str, found: Faults
) -> None:
    struck = server.exchange()
    if struck is None:
        found.wrong.append("there is no process of the exchange")
        return
    body = body_of("word1", name, max_new_tokens=1)
    os.utime(server.folder / "adapters" / name / SAFE)
    start = time.monotonic()
    struck.send_signal(strike)
    found.done += 1
    status, why = await ask(session, body, ANSWER_S)
    took = time.monotonic() - start
    found.answered.append(took)
    if status != 200 and not why:
        found.wrong.append(f"{strike.name}: a request was answered {status} after {took:.1f} s")
    while server.alive and time.monotonic() - start < ANSWER_S:
        os.utime(server.folder / "adapters" / name / SAFE)
        status, why = await ask(session, body, ANSWER_S)
        now = server.exchange()
        if status == 200 and now is not None and now.pid != struck.pid:
            found.recovered.append(time.monotonic() - start)
            return
        await asyncio.sleep(LOOK_S)
    found.wrong.append(
        f"{strike.name}: no adapter loads after {time.monotonic() - start:.0f} s ({status} {why})"
        if server.alive
        else f"{strike.name}: the server ended with it, code {server.process.returncode}"
    )
    with suppress(psutil.Error):  # the next one shall have something to strike
        struck.send_signal(signal.SIGCONT)
