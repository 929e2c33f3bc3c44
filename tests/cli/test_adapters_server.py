"""`lorax adapters list, info, load, prefetch, pin, unload`: what is asked of a server, and what is shown."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console
from typer.testing import CliRunner, Result

from engine.config import EngineConfig, ServerConfig
from engine.errors import AdapterNotFound, Forbidden
from engine.server.app import build_app
from engine.server.text import Text
from lorax_cli.app import app
from lorax_cli.client import Client
from lorax_cli.commands import adapters_server
from tests.cli.conftest import FakeServer, entry
from tests.server.fake import FakeBackend, write_tokenizer

LONG = "some-organisation/an-adapter-with-a-name-that-no-terminal-of-eighty-columns-can-hold@v17"
NOW = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)


def run(server: FakeServer, *words: str, **env: str) -> Result:
    given = {"LORAX_URL": server.url, "COLUMNS": "100"} | env
    return CliRunner().invoke(app, ["adapters", *words], env=given)


def shown(rows: list[dict[str, Any]], width: int, total: int | None = None) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(adapters_server.table_of(rows, width, total))
    return capture.get()


def test_list(server: FakeServer) -> None:
    server.adapters = [entry("a/one", pinned=True), entry("b", state="failed", tier="source")]
    words = "list --state ready --tier device --prefix a/ --limit 7 --api-key key --token mine"
    result = run(server, *words.split())
    assert result.exit_code == 0, result.output
    assert server.paths[-1] == "/adapters?state=ready&tier=device&prefix=a/&limit=7"
    assert server.headers[-1]["Authorization"] == "Bearer key"
    assert server.headers[-1]["x-adapter-token"] == "mine"
    assert "a/one (hub, pinned)" in result.stdout and "3.00" in result.stdout
    assert "2 of 5; --limit shows more" in result.stdout
    assert json.loads(run(server, "list", "--json").stdout) == server.adapters
    assert server.paths[-1] == "/adapters?limit=100"
    assert run(server, "list", "--quiet").stdout == "a/one\nb\n"
    server.adapters = []
    assert run(server, "list", "--quiet").stdout == ""


@pytest.mark.parametrize("width", [30, 40, 60, 76, 80, 100, 200])
def test_names_are_never_cut(width: int) -> None:
    """And no column is lost."""
    row = entry(LONG, source="s3", hits=123_456, last_used="2026-11-30T00:00:00Z")
    lines = shown([row], width).splitlines()
    assert max(map(len, lines)) <= width
    (head,) = [line for line in lines if "state" in line]
    column = "".join(line[: head.index("state")] for line in lines[lines.index(head) + 2 :])
    assert "".join(column.split()) == f"{LONG}(s3)"
    text = "\n".join(lines)
    assert "…" not in text and "ready" in text and "device" in text
    assert ("123456" in text) == (width >= adapters_server.WIDE)


def test_odd_names_are_text() -> None:
    assert "[bold]x[/bold]" in shown([entry("[bold]x[/bold]", source="[red]")], 100)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-5, "0 s"), (0, "0 s"), (59, "59 s"), (61, "1 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_times_in_their_largest_unit(seconds: int, words: str) -> None:
    then = (NOW - timedelta(seconds=seconds)).isoformat()
    assert adapters_server.ago(then, NOW) == f"{words} ago"
    assert adapters_server.ago(None) == "-"


def test_info(server: FakeServer) -> None:
    result = run(server, "info", "a b/c?d#e%f@g", "--source", "s3")
    assert result.exit_code == 0, result.output
    assert server.paths[-1] == "/adapters/a%20b/c%3Fd%23e%25f@g?source=s3"
    for words in ("a b/c?d#e%f@g", "8, 16", "q_proj, v_proj", "3.00 MiB", "fetch 0.500 s"):
        assert words in result.stdout
    assert json.loads(run(server, "info", "a", "--json").stdout) == entry("a")
    result = run(server, "info", "missing")
    assert (result.exit_code, result.stdout) == (AdapterNotFound.exit_code, "")
    assert "error: no missing" in result.stderr


def test_info_of_a_failed_adapter() -> None:
    error = {"error_type": "adapter", "message": "it broke", "field": None, "hint": "mend it"}
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(adapters_server.details_of(entry("a", state="failed", error=error)))
    assert "it broke" in capture.get() and "mend it" in capture.get()


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (["load"], {}),
        (["prefetch"], {}),
        (["unload"], {}),
        (["pin"], {"pinned": True}),
        (["pin", "--unpin"], {"pinned": False}),
        (["load", "--source", "s3"], {"adapter_source": "s3"}),
    ],
    ids=" ".join,
)
def test_what_is_asked(server: FakeServer, words: list[str], body: dict[str, Any]) -> None:
    before = len(server.bodies)
    result = run(server, *words, "one", "two", "--quiet")
    assert (result.exit_code, result.stdout) == (0, "one\ntwo\n")
    assert server.paths[-1] == f"/adapters/{words[0]}"
    assert server.bodies[before:] == [{"adapter_id": name, **body} for name in ("one", "two")]
    rows = json.loads(run(server, *words, "one", "--json").stdout)
    assert rows == [entry("one")]
    assert "one" in run(server, *words, "one").stdout


def test_the_others_go_on_after_a_failure(server: FakeServer) -> None:
    result = run(server, "load", "one", "missing", "base", "two", "--quiet")
    assert result.exit_code == AdapterNotFound.exit_code, "that of the first"
    assert result.stdout == "one\ntwo\n"
    assert "error: missing: no missing" in result.stderr and "error: base:" in result.stderr
    assert json.loads(run(server, "load", "missing", "--json").stdout) == []


def test_a_key_without_the_right_ends_the_command(server: FakeServer) -> None:
    before = len(server.bodies)
    result = run(server, "pin", "mine", "one")
    assert result.exit_code == Forbidden.exit_code == 17
    assert len(server.bodies) == before + 1


def test_where_the_server_is(server: FakeServer) -> None:
    """The flag goes before the variable; without both it is this machine's port 3000."""
    nowhere = "http://127.0.0.1:9"
    assert run(server, "list", "--url", server.url, LORAX_URL=nowhere).exit_code == 0
    result = run(server, "list", LORAX_URL=nowhere)
    assert result.exit_code == 22 and nowhere in result.stderr
    assert run(server, "list", LORAX_URL="ftp://x").exit_code == 2
    text = CliRunner().invoke(app, ["adapters", "list", "--help"], env={"COLUMNS": "200"}).stdout
    assert "env LORAX_URL; default http://127.0.0.1:3000" in text


@asynccontextmanager
async def real_server(folder: Path, **server: Any) -> AsyncIterator[str]:
    """The address of the real application on a fake backend."""
    text = Text(str(write_tokenizer(folder)))
    backend = FakeBackend(text)
    config = EngineConfig(server=ServerConfig(**server))
    runner = web.AppRunner(build_app(backend, text, config))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()
    text.close()


async def test_the_real_routes(tmp_path: Path) -> None:
    """Names with every kind of character arrive as they are, and what is shown has all its fields."""
    odd = "https://host/a b/c?d#e%f+g&h"
    async with real_server(tmp_path, api_key=("key",)) as url, Client(url, api_key="key") as client:
        await client.manage("load", odd, adapter_source="hub")
        await client.manage("prefetch", "second")
        assert (await client.manage("pin", odd, pinned=True))["pinned"]
        found = await client.adapter(odd, "hub")
        assert found["id"] == odd and found["tier"] == "device"
        listed = await client.adapters(prefix=odd, state="ready", limit=3, tier=None)
        assert (listed["adapters"], listed["total"]) == ([found], 1)
        assert odd in shown(listed["adapters"], 200)
        console = Console(width=200)
        with console.capture() as capture:
            console.print(adapters_server.details_of(found))
        assert odd in capture.get()
        assert await client.manage("unload", odd) == {"id": odd, "unloaded": [odd.encode().hex()]}
        assert (await client.cache())["host"]["pinned"] == 0
