"""The examples of the client's README and of docs/python-client.md run as they stand, but for the server's address."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from aiohttp.test_utils import TestServer

from clients.python.tests.stand_in import StandIn
from tests.server.fake import FakeBackend, Start

ROOT = Path(__file__).parents[3]
ADDRESS = "http://127.0.0.1:3000"


def examples() -> list[tuple[str, str]]:
    found = []
    for page in ("clients/python/README.md", "docs/python-client.md"):
        text = (ROOT / page).read_text()
        found += [(page, code) for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    return found


async def run(code: str, url: str) -> None:
    assert ADDRESS in code
    program = compile(code.replace(ADDRESS, url.rstrip("/")), "example", "exec")
    await asyncio.to_thread(exec, program, {"__name__": "__main__"})


@pytest.mark.parametrize(("page", "code"), examples())
async def test_an_example(
    page: str, code: str, start: Start, backend: FakeBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    backend.say(" Ahoy!")
    if "client.adapters" in code:
        async with TestServer(StandIn().app()) as server:
            await run(code, str(server.make_url("/")))
    else:
        await run(code, str((await start()).make_url("/")))
    assert capsys.readouterr().out


def test_there_are_examples() -> None:
    assert len(examples()) >= 6
