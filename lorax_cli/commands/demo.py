"""`lorax demo`: a server on the demo model, and one prompt to the base and every adapter, side by side."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.checkpoint import DEMO_FOLDER
from engine.config import AdapterConfig, EngineConfig, ModelConfig
from engine.errors import ModelError
from lorax_cli.client import Client
from lorax_cli.options import with_config
from lorax_cli.output import JsonFlag, Output, examples

if TYPE_CHECKING:
    from rich.console import RenderableType

    from engine.messages import EngineInfo

DEMO_FILE = DEMO_FOLDER / "demo.json"
MIN_BOX = 38  # least width of a box, in columns


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt for the base model or an adapter."""

    adapter: str | None  # None: the base model
    prompt: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer and its timing."""

    question: Question
    text: str
    num_tokens: int
    first_s: float  # time to the first token
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """From the question to the last token. Answers may have two tokens, too few for a rate between tokens."""
        return self.num_tokens / self.total_s


async def ask(client: Client, question: Question, max_new_tokens: int) -> Answer:
    """Sends one question and collects its stream."""
    parameters: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if question.adapter:
        parameters["adapter_id"] = question.adapter
    start = time.perf_counter()
    first, num_tokens, text = 0.0, 0, ""
    async for event in client.stream(question.prompt, parameters):
        num_tokens += 1
        first = first or time.perf_counter() - start
        if event.generated_text is not None:
            text = event.generated_text
        elif not event.special:
            text += event.text
    return Answer(question, text.strip(), num_tokens, first, time.perf_counter() - start)


def read_demo(file: Path = DEMO_FILE) -> dict[str, Any]:
    """The description of the demo: `base`, `adapters` by name, and a `prompt` for all. Raises ModelError."""
    try:
        demo: dict[str, Any] = json.loads(file.read_text())
    except OSError:
        raise ModelError(
            "the demo model is not installed", hint="in a checkout, run: make demo-model"
        ) from None
    return demo


def questions_of(demo: dict[str, Any], prompt: str | None) -> list[Question]:
    """The prompt for the base and for every adapter."""
    prompt = prompt or str(demo["prompt"])
    questions = [Question(None, prompt, demo["base"].get("description", ""))]
    for name, adapter in demo["adapters"].items():
        questions.append(Question(name, prompt, adapter.get("description", "")))
    return questions


def side_by_side(answers: Sequence[Answer], width: int) -> RenderableType:
    """The prompt, then one box per model, as many in a row as fit into `width`."""
    from rich.columns import Columns
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    boxes = []
    for answer in answers:
        name = answer.question.adapter
        body = Text.assemble((f"{answer.question.description}\n\n", "dim"), answer.text)
        boxes.append(
            Panel(
                body,
                title=f"adapter {name}" if name else "base model",
                subtitle=f"first token {answer.first_s * 1000:.0f} ms, {answer.tokens_per_s:.0f} tokens/s",
                width=width // max(1, min(len(answers), width // MIN_BOX)) - 1,
            )
        )
    return Group(Text(f"\n{answers[0].question.prompt}\n", "bold"), Columns(boxes))


def program() -> str:
    """The `lorax` to run in another terminal: its name, or its path if it is not on PATH."""
    script = Path(sys.executable).with_name("lorax")
    if shutil.which("lorax") or not script.exists():
        return "lorax"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)


def next_steps(address: str, adapter: str, prompt: str) -> list[str]:
    """Three commands to try against the running server."""
    body = json.dumps({"inputs": prompt, "parameters": {"adapter_id": adapter}})
    chat = json.dumps({"model": adapter, "messages": [{"role": "user", "content": prompt}]})
    kind = "-H 'Content-Type: application/json'"
    return [
        f"{program()} generate --url {address} --adapter-id {adapter} {shlex.quote(prompt)}",
        f"curl {address}/generate {kind} -d {shlex.quote(body)}",
        f"curl {address}/v1/chat/completions {kind} -d {shlex.quote(chat)}",
    ]


@with_config("scheduler", "memory", "server")
def demo(
    config: EngineConfig,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt to send. Unset: the prompt of the demo.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens of each answer.")] = 64,
    once: Annotated[bool, typer.Option("--once", help="Exit after the answers.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Serve the demo model, and send one prompt to the base and every adapter at once over HTTP.

    The model ships with the code: no download, no GPU. The server runs until Ctrl-C.
    """
    import asyncio

    from lorax_cli.commands.launch import announce
    from lorax_cli.serving import serve_while

    out = Output.of(as_json)
    content = read_demo()
    questions = questions_of(content, prompt)
    config = dataclasses.replace(config, model=ModelConfig(), adapters=AdapterConfig())

    async def show(address: str) -> bool:
        key = next(iter(config.server.api_key), None)
        async with Client(address, api_key=key) as client:
            asks = [ask(client, question, max_new_tokens) for question in questions]
            answers = await asyncio.gather(*asks)
        out.result(
            [entry(answer) for answer in answers],
            view=lambda: side_by_side(answers, out.console().width),
        )
        if once:
            return False
        name = next(iter(content["adapters"]))
        commands = next_steps(address, name, content["adapters"][name]["prompt"])
        out.note("\nServing until Ctrl-C. In another terminal:")
        for command in commands:
            out.line(f"\n  {command}")
        return True

    def started(info: EngineInfo, address: str) -> None:
        announce(out, info, config)
        out.note(f"listening on {address}\n")

    asyncio.run(serve_while(config, started, show))


def entry(answer: Answer) -> dict[str, Any]:
    return {
        "adapter": answer.question.adapter,
        "prompt": answer.question.prompt,
        "generated_text": answer.text,
        "tokens": answer.num_tokens,
        "time_to_first_token_s": answer.first_s,
        "tokens_per_s": answer.tokens_per_s,
    }


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "lorax demo",
            "lorax demo --once --port 0",
            'lorax demo --once --json --prompt "Hello there"',
        )
    )(demo)
