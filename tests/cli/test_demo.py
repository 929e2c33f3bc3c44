"""`lorax demo`: all models at once, answers side by side, and commands to try next."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.panel import Panel

from engine.errors import ModelError
from lorax_cli.client import Client
from lorax_cli.commands import demo
from lorax_cli.output import Output
from tests.cli.conftest import FakeServer

KNOWN = {
    "prompt": "Who is it?",
    "base": {"description": "It writes.", "prompt": "Once"},
    "adapters": {"pirate": {"description": "It talks.", "prompt": 'It\'s a "ship"'}},
}


def test_questions() -> None:
    asked = demo.questions_of(KNOWN, None)
    assert [(one.adapter, one.prompt) for one in asked] == [
        (None, "Who is it?"),
        ("pirate", "Who is it?"),
    ]
    assert demo.questions_of(KNOWN, "Why?")[1].prompt == "Why?"


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not installed"):
        demo.read_demo(tmp_path / "demo.json")


async def test_answers_side_by_side(server: FakeServer) -> None:
    async with Client(server.url) as client:
        answers = [await demo.ask(client, one, 8) for one in demo.questions_of(KNOWN, None)]
    base, pirate = answers
    assert (base.text, pirate.text) == ("hello world", "hello worldpirate")
    assert base.num_tokens == 3 and 0 < base.first_s <= base.total_s
    console = Console(width=100)
    with console.capture() as capture:
        console.print(demo.side_by_side(answers, 100))
    shown = capture.get()
    assert "hello worldpirate" in shown and "first token" in shown and "tokens/s" in shown


def answered(count: int) -> list[demo.Answer]:
    """Answers of the base model and of adapters, with words in a row of more than a box's width."""
    names = [None, *(f"adapter-{number}" for number in range(1, count))]
    questions = [demo.Question(name, "Why?", "It writes. " * 9) for name in names]
    return [
        demo.Answer(one, f"{one.adapter} says " + "word " * 30, 9, 0.1, 0.5) for one in questions
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [20, 38, 39, 75, 76, 77, 80, 113, 114, 115, 152, 190, 300])
def test_boxes_fit_the_terminal(width: int, count: int) -> None:
    """As many in a row as fit with MIN_BOX columns, all of the same width, as wide as possible."""
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(demo.side_by_side(answered(count), width))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    in_a_row = min(count, max(1, width // demo.MIN_BOX))
    tops = [line for line in lines if line.startswith("╭")]
    assert [line.count("╭") for line in tops] == [
        min(in_a_row, count - start) for start in range(0, count, in_a_row)
    ]
    widths = {len(box.strip()) + 1 for line in tops for box in line.split("╮") if box.strip()}
    assert widths == {width // in_a_row - 1}
    if width >= demo.MIN_BOX:
        text = " ".join(capture.get().split())
        assert all(f"adapter adapter-{number}" in text for number in range(1, count))


def test_a_pipe_is_as_wide_as_a_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    Output().result(None, lambda: Panel("hello"))
    lines = capsys.readouterr().out.splitlines()
    assert {len(line) for line in lines} == {80}


def test_next_steps_are_three_commands_that_parse() -> None:
    prompt = KNOWN["adapters"]["pirate"]["prompt"]  # type: ignore[index]
    commands = [shlex.split(one) for one in demo.next_steps("http://x:1", "pirate", prompt)]
    generate, curl, chat = commands
    assert generate[0].endswith("lorax")
    assert generate[1:] == [
        *("generate", "--url", "http://x:1", "--adapter-id", "pirate"),
        prompt,
    ]
    assert json.loads(curl[-1])["inputs"] == prompt
    assert json.loads(chat[-1])["messages"][0]["content"] == prompt


@pytest.mark.skipif(not demo.DEMO_FILE.exists(), reason="the demo model is not built")
@pytest.mark.slow
def test_the_demo() -> None:
    """As `make demo` runs it, with its own processes; it ends after the answers."""
    program = [sys.executable, "-m", "lorax_cli", "demo", "--once", "--json", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    budget = ("--cpu-memory-gb", "0.5", "--hostname", "127.0.0.1")
    done = subprocess.run(
        [*program, *budget], env=environment, text=True, capture_output=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert [one["adapter"] for one in answers] == [None, *demo.read_demo()["adapters"]]
    assert len({one["generated_text"] for one in answers}) == len(answers)
    assert all(one["tokens"] > 1 and one["tokens_per_s"] > 0 for one in answers)
