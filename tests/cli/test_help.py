"""Every command has examples in its help, and every example parses."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lorax_cli.app import app
from tools.docs import commands

ROOT = Path(__file__).parents[2]
COMMANDS = dict(commands(typer.main.get_command(app), "lorax"))


def example_lines() -> list[tuple[str, str]]:
    """(full name of the command, example)."""
    return [
        (path, line)
        for path, command in COMMANDS.items()
        for line in (command.epilog or "").split("\n\n")[1:]
    ]


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_has_examples(path: str) -> None:
    result = CliRunner().invoke(app, [*path.split()[1:], "--help"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert path in result.stdout


@pytest.mark.parametrize(("path", "line"), example_lines())
def test_examples_parse(path: str, line: str) -> None:
    words = shlex.split(line)
    name = path.split()
    assert words[: len(name)] == name
    command: Any = COMMANDS[path]
    with command.make_context(name[-1], words[len(name) :]) as context:
        assert not context.args


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--load-format", ["safetensors", "dummy"]),
        ("--adapter-source", ["local", "hub", "s3", "pbase"]),
    ],
)
def test_completion_asks_the_program(flag: str, values: list[str]) -> None:
    environment = {
        **os.environ,
        "COMP_WORDS": f"lorax launch {flag} ",
        "COMP_CWORD": "3",
        "_LORAX_COMPLETE": "complete_bash",
    }
    program = [sys.executable, "-m", "lorax_cli"]
    done = subprocess.run(program, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert done.stdout.split() == values
