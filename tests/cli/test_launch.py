"""`lorax launch`: its settings, its messages, and its end."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.messages import MergedAdapter
from engine.process import ProcessBackend
from engine.server.front import FRONT
from lorax_cli import serving
from lorax_cli.app import app
from lorax_cli.client import Client
from lorax_cli.commands.launch import announce
from lorax_cli.output import Output
from tests.cli.conftest import BUDGET
from tests.engine_info import INFO

BASE = replace(
    INFO,
    model_id="base",
    device_name="a processor",
    backends={"lora_shrink": "extension", "linear": "reference"},
    memory_plan=[("weights", 3 << 29), ("records", 3 << 19)],
)


def test_shows_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EngineConfig] = []

    async def serve(config: EngineConfig, started: serving.Started) -> None:
        seen.append(config)
        started(BASE, "http://127.0.0.1:1234")

    monkeypatch.setattr(serving, "serve", serve)
    command = [
        "launch",
        "--model-id",
        "base",
        "--port",
        "0",
        "--adapter-root",
        "/a",
        "--adapter-root",
        "/b",
    ]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    assert seen[0].model.model_id == "base" and seen[0].server.port == 0
    assert result.stdout == ""
    for words in (
        "base on a processor (float32)",
        "weights",
        "1.500 GiB",
        "1.5 MiB",
        "extension: lora_shrink",
        "reference: linear",
        "local adapters: /a, /b",
        "API keys: none, every client is served",
        "listening on http://127.0.0.1:1234",
    ):
        assert words in result.stderr


def test_shows_the_quantisation(capsys: pytest.CaptureFixture[str]) -> None:
    announce(Output(), replace(BASE, quantize="bitsandbytes-nf4"), EngineConfig())
    assert "base on a processor (float32, linears bitsandbytes-nf4)" in capsys.readouterr().err


def test_shows_the_merged_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    merged = MergedAdapter("org/sql", "hub", "", "org/sql", "abc")
    announce(Output(), replace(BASE, merged_adapter=merged), EngineConfig())
    shown = capsys.readouterr().err
    assert "merged into the base model: org/sql; no other adapter is served" in shown
    assert "local adapters" not in shown


def test_a_merge_without_adapter_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessBackend, "start", None)
    result = CliRunner().invoke(app, ["launch", "--merge-adapter-weights", "--port", "0"])
    assert result.exit_code == ConfigError.exit_code
    assert "--merge-adapter-weights needs an adapter" in result.stderr
    assert "hint: set --adapter-id" in result.stderr


@pytest.mark.slow
async def test_serves_until_sigterm(demo_folder: Path) -> None:
    """The whole program, with its processes: prints its free port, answers, exits with 0 after SIGTERM."""
    given = ["--model-id", "base", "--port", "0", "--hostname", "127.0.0.1", *BUDGET]
    program = [sys.executable, "-m", "lorax_cli", "launch", "--json-output", *given]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        program, cwd=demo_folder, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        try:
            assert running.stderr is not None
            output = ""
            while (found := re.search(r"listening on (http://127\.0\.0\.1:\d+)", output)) is None:
                line = running.stderr.readline()
                assert line, output
                output += line
            assert '"process":"shard[' in output
            async with Client(found[1]) as client:
                assert await client.health()
                assert (await client.info())["model_id"] == "base"
                answer = await client.generate("Hello", {"max_new_tokens": 3})
                parameters = {"max_new_tokens": 3, "adapter_id": "adapters/one"}
                events = [event async for event in client.stream("Hello", parameters)]
            assert answer["generated_text"] is not None
            assert len(events) <= 3 and events[-1].generated_text is not None
            running.send_signal(signal.SIGTERM)
            rest = running.stderr.read()
            assert running.wait(30) == 0, output + rest
        finally:
            running.kill()


@pytest.mark.parametrize(
    ("end_in", "least", "most"), [(None, 10.0, 10.0), (3.0, 2.0, 3.0), (-5.0, 0.5, 0.5)]
)
async def test_the_processes_get_what_is_left_of_the_end(
    demo_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    end_in: float | None,
    least: float,
    most: float,
) -> None:
    """The rest of the time in which the program must end after a signal."""
    timeouts: list[float] = []

    class Backend(ProcessBackend):
        info = BASE

        @classmethod
        async def start(cls, config: EngineConfig, parts: object = None) -> Backend:
            return cls.__new__(cls)

        async def close(self, timeout: float = 0.0) -> None:
            timeouts.append(timeout)

    monkeypatch.setattr("engine.process.ProcessBackend", Backend)
    config = EngineConfig(model=ModelConfig(model_id=str(demo_folder / "base")))
    async with serving.opened(config, local=False) as served:
        if end_in is not None:
            served[FRONT].end_by = time.monotonic() + end_in
    (timeout,) = timeouts
    assert least <= timeout <= most


def test_a_failure_of_the_start_is_not_blamed_on_the_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def opened(config: EngineConfig, local: bool) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "model.safetensors")

    monkeypatch.setattr(serving, "opened", opened)
    result = CliRunner().invoke(app, ["launch", "--hostname", "127.0.0.1", "--port", "0"])
    assert isinstance(result.exception, PermissionError)
    assert "cannot listen" not in result.output


def test_taken_port(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error before anything starts."""
    monkeypatch.chdir(demo_folder)
    monkeypatch.setattr(serving, "opened", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [
            "launch",
            "--model-id",
            "base",
            "--hostname",
            "127.0.0.1",
            "--port",
            port,
            *BUDGET,
        ]
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert f"127.0.0.1:{port} is already in use" in result.stderr and "hint: " in result.stderr


def test_unknown_source(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error before the processes start."""
    monkeypatch.chdir(demo_folder)
    monkeypatch.setattr(ProcessBackend, "start", None)
    command = ["launch", "--model-id", "base", "--port", "0", "--adapter-source", "ftp"]
    result = CliRunner().invoke(app, [*command, "--hostname", "127.0.0.1"])
    assert result.exit_code == 2, result.output
    assert "--adapter-source 'ftp' is not a source of this server" in result.stderr
