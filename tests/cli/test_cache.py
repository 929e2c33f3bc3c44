"""`lorax cache`: bars and counters, once or again and again."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lorax_cli.app import app
from lorax_cli.client import Client
from lorax_cli.commands import cache as command
from lorax_cli.output import Output
from tests.cli.conftest import FakeServer

GIB, MIB = 1 << 30, 1 << 20
CACHE: dict[str, Any] = {
    "device": {
        "bytes": 15 * MIB,
        "capacity_bytes": 30 * MIB,
        "adapters": 31,
        "in_use": 2,
        "placements": 40,
        "evictions": 9,
    },
    "host": {
        "bytes": 3 * GIB,
        "capacity_bytes": 4 * GIB,
        "adapters": 77,
        "leased_bytes": 5 * MIB,
        "pinned": 3,
        "evictions": 8,
    },
    "disk": {
        "bytes": 12 * GIB,
        "capacity_bytes": None,
        "entries": 99,
        "hits": 4,
        "misses": 6,
        "evictions": 0,
    },
    "hits": {"device": 1000, "host": 200, "disk": 30, "source": 5},
    "loads": 10,
    "load_failures": 1,
    "loaded_bytes": 64 * MIB,
    "seconds": {"fetch": 5.0, "parse": 1.0},
}


@pytest.fixture(autouse=True)
def full(server: FakeServer) -> None:
    server.cache = CACHE


def shown(cache: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(command.tiers_view(cache))
    return capture.get()


def test_what_is_shown(server: FakeServer) -> None:
    result = CliRunner().invoke(app, ["cache", "--url", server.url, "--api-key", "k"])
    assert result.exit_code == 0, result.output
    assert server.paths[-1] == "/cache" and server.headers[-1]["Authorization"] == "Bearer k"
    text = " ".join(result.stdout.split())
    for words in (
        "15.00 MiB of 30.00 MiB",
        "3.00 GiB of 4.00 GiB",
        "12.00 GiB of no limit",
        "device 31 2 9 1000",
        "host 77 3 5.00 MiB 8 200",
        "disk 99 0 30",
        "source 5",
        "loads: 10 (64.00 MiB), failed 1; from disk 4, downloaded 6 time per load: fetch 0.500 s",
    ):
        assert words in text, words
    result = CliRunner().invoke(app, ["cache", "--url", server.url, "--json"])
    assert json.loads(result.stdout) == CACHE


@pytest.mark.parametrize("width", [60, 80, 200])
def test_figures_are_never_cut(width: int) -> None:
    text = shown(CACHE, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert all(f"{number}" in text for number in (31, 77, 99, 1000, "5.00 MiB"))


def test_bars_are_as_long_as_what_they_show() -> None:
    """Half, three quarters, and none where there is no limit or nothing."""
    bars = [line.count("━") for line in shown(CACHE).splitlines()[:3]]
    assert bars == [command.BAR_COLUMNS // 2, command.BAR_COLUMNS * 3 // 4, 0]
    empty = {"bytes": 0, "capacity_bytes": 0}
    assert "━" not in shown({**CACHE, "device": CACHE["device"] | empty}).splitlines()[0]


def test_a_server_that_has_loaded_nothing() -> None:
    text = shown({**CACHE, "loads": 0, "seconds": {}})
    assert "loads: 0" in text and "time per load" not in text


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "1e6"])
def test_bad_intervals(server: FakeServer, given: str) -> None:
    command = ["cache", "--url", server.url, "--watch", "--interval", given]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "--interval" in result.stderr


# A shell lets background processes ignore Ctrl-C, and their children with them.
PROGRAM = """\
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from lorax_cli.app import main
main()
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_watch_without_a_terminal(server: FakeServer, as_json: bool) -> None:
    """A line each time, until Ctrl-C."""
    words = ["cache", "--watch", "--interval", "0.1", *(["--json"] if as_json else [])]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        env={**os.environ, "LORAX_URL": server.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()
    if as_json:
        assert [json.loads(line) for line in lines] == [CACHE] * 3
    else:
        assert lines == [command.line_of(CACHE) + "\n"] * 3
        assert "device 15.00 MiB of 30.00 MiB, host 3.00 GiB" in lines[0]
        assert "hits device=1000 host=200 disk=30 source=5; loads 10" in lines[0]


async def test_watch_on_a_terminal(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The view is drawn again in its place; the cursor comes back at the end."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr(Output, "console", lambda self: terminal)
    times, interval = 0, 123.0
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        nonlocal times
        if seconds != interval:  # another one's
            return await real(seconds)
        times += 1
        server.cache = {**CACHE, "loads": 10 + times}
        if times == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "sleep", sleep)
    async with Client(server.url) as client:
        with pytest.raises(KeyboardInterrupt):
            await command.watch(client, interval, Output())
    drawn = screen.getvalue()
    assert [f"loads: {10 + n} " in drawn for n in range(4)] == [True, True, True, False]
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") == 1, "hidden, and shown again"


def test_a_server_that_is_not_there() -> None:
    result = CliRunner().invoke(app, ["cache", "--watch", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 22 and "hint: start one with: lorax launch" in result.stderr
