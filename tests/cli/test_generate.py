"""`lorax generate`: on a server, and in this process with the same answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from typer.testing import CliRunner

from engine.config import EngineConfig, ServerConfig
from engine.server.app import build_app
from engine.server.text import Text
from lorax_cli import serving
from lorax_cli.app import app
from tests.cli.conftest import BUDGET, FakeServer
from tests.server.fake import FakeBackend, write_tokenizer


def test_server(server: FakeServer) -> None:
    result = CliRunner().invoke(app, ["generate", "--url", server.url, "Hi"])
    assert result.exit_code == 0
    assert result.stdout == "hello world\n"
    assert "3 tokens" in result.stderr


def test_an_address_needs_no_scheme(server: FakeServer) -> None:
    bare = server.url.removeprefix("http://")
    result = CliRunner().invoke(app, ["generate", "--url", f"{bare}/", "Hi"])
    assert result.stdout == "hello world\n", result.output


@pytest.mark.parametrize("url", ["ftp://x", "http://", "x:port", "http://[::1", "http://x:0"])
def test_a_bad_address_is_refused(url: str) -> None:
    result = CliRunner().invoke(app, ["generate", "--url", url, "Hi"])
    assert result.exit_code == 2
    assert f"--url {url!r} is not a valid server URL" in result.stderr


def test_settings_that_url_ignores_are_named(server: FakeServer) -> None:
    mine = ["--model-id", "./mine", "--adapter-id", "x", "--max-batch-size", "3"]
    result = CliRunner().invoke(app, ["generate", "--url", server.url, "Hi", *mine])
    assert result.exit_code == 0
    assert "warning: --model-id, --max-batch-size: ignored, because --url" in result.stderr


def test_parameters_are_those_given(server: FakeServer) -> None:
    given = "--max-new-tokens 5 --temperature 0.5 --top-k 3 --seed 7 --stop a --stop b"
    adapter = "--adapter-id x --adapter-source local --api-token mine"
    command = ["generate", "--url", server.url, "Hi", *given.split(), *adapter.split()]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert server.bodies[-1]["parameters"] == {
        "adapter_id": "x",
        "adapter_source": "local",
        "details": True,
        "do_sample": True,
        "max_new_tokens": 5,
        "seed": 7,
        "stop": ["a", "b"],
        "temperature": 0.5,
        "top_k": 3,
    }
    assert server.headers[-1]["Authorization"] == "Bearer mine"
    assert CliRunner().invoke(app, [*command, "--api-key", "key"]).exit_code == 0
    assert server.headers[-1]["Authorization"] == "Bearer key"


def test_secrets_of_the_environment_stay_here(server: FakeServer) -> None:
    command = ["generate", "--url", server.url, "Hi"]
    env = {"HF_TOKEN": "secret", "LORAX_API_KEY": "secret"}
    assert CliRunner().invoke(app, command, env=env).exit_code == 0
    assert "Authorization" not in server.headers[-1]
    assert server.bodies[-1]["parameters"]["do_sample"] is False


def test_json_and_quiet(server: FakeServer) -> None:
    command = ["generate", "--url", server.url, "--adapter-id", "x", "Hi"]
    result = CliRunner().invoke(app, [*command, "--json"])
    answer = json.loads(result.stdout)
    assert answer["generated_text"] == "hello worldx"
    assert answer["details"] == {"finish_reason": "eos_token"}
    assert 0 < answer["time_to_first_token_s"] <= answer["total_s"]
    assert result.stderr == ""
    result = CliRunner().invoke(app, [*command, "--quiet"])
    assert (result.stdout, result.stderr) == ("hello world\n", "")


@pytest.mark.parametrize(("adapter", "code"), [("missing", 11), ("broken", 21)])
def test_errors(server: FakeServer, adapter: str, code: int) -> None:
    command = ["generate", "--url", server.url, "--adapter-id", adapter, "Hi", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == code
    assert result.stdout == "" and result.stderr.startswith("error: ")


def test_no_server() -> None:
    result = CliRunner().invoke(app, ["generate", "--url", "http://127.0.0.1:9", "Hi"])
    assert result.exit_code == 22
    assert "hint: start one with: lorax launch" in result.stderr


def test_in_this_process(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base, an adapter, and a missing adapter. Greedy, so that two runs are equal."""
    monkeypatch.chdir(demo_folder)
    command = [
        "generate",
        "--model-id",
        "base",
        "--max-new-tokens",
        "6",
        "--json",
        *BUDGET,
        "Hello",
    ]

    def answer(*more: str) -> str:
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 0, result.output
        value = json.loads(result.stdout)
        assert value["details"]["generated_tokens"] <= 6
        return str(value["generated_text"])

    base = answer()
    assert answer() == base
    assert answer("--adapter-id", "adapters/one") != base
    result = CliRunner().invoke(
        app, [*command, "--adapter-id", "nobody", "--adapter-source", "local"]
    )
    assert result.exit_code == 11 and "nobody" in result.stderr


def test_unknown_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["generate", "--model-id", str(tmp_path / "none"), "Hello"])
    assert result.exit_code == 3
    assert "none" in result.stderr


def test_transformers_is_there_before_two_threads_want_it() -> None:
    """Its import replaces its own module at the end; a second thread would see it half imported."""
    code = """
import asyncio, sys
import engine.process, engine.server.text
from engine.config import EngineConfig
from lorax_cli.serving import opened

seen = []

class Text:
    def __init__(self, *given):
        seen.append(sys.modules.get("transformers"))

async def start(config):
    seen.append(sys.modules.get("transformers"))
    raise RuntimeError("enough")

engine.server.text.Text, engine.process.LocalBackend.start = Text, start
assert "transformers" not in sys.modules

async def main():
    try:
        async with opened(EngineConfig(), local=True):
            pass
    except RuntimeError:
        pass

try:
    asyncio.run(main())
except AttributeError:  # the Text of this test has no close
    pass
import transformers
assert seen == [transformers, transformers], seen
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


async def test_the_engine_in_this_process_needs_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of the environment are for servers."""
    text = Text(str(write_tokenizer(tmp_path)))
    backend = FakeBackend(text)
    backend.say("hi")
    server = ServerConfig(api_key=("key",), prefix_cache_per_tenant=True)

    @asynccontextmanager
    async def opened(config: EngineConfig, local: bool) -> AsyncIterator[web.Application]:
        yield build_app(backend, text, config)

    monkeypatch.setattr(serving, "opened", opened)
    async with serving.local_client(EngineConfig(server=server)) as client:
        assert (await client.generate("Hello", {}))["generated_text"] == "hi"
    text.close()
