"""The output of a command: data on stdout; progress, hints, warnings and errors on stderr.

Modes: `human` prints tables and text, `json` one JSON value, `quiet` the bare data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.console import Console, RenderableType
    from rich.progress import Progress

Mode = Literal["human", "json", "quiet"]

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")]


def examples(*lines: str) -> str:
    """The examples at the end of a command's help."""
    return "\n\n".join(("Examples:", *lines))


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def fail(message: str, hint: str | None = None) -> None:
    """Prints an error and its remedy. The caller chooses the exit code."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


class Output:
    """The output of one command."""

    def __init__(self, mode: Mode = "human") -> None:
        self.mode = mode

    @classmethod
    def of(cls, as_json: bool = False, quiet: bool = False) -> Output:
        """The output for the flags `--json` and `--quiet`."""
        return cls("json" if as_json else "quiet" if quiet else "human")

    @property
    def human(self) -> bool:
        return self.mode == "human"

    def console(self, stderr: bool = False) -> Console:
        from rich.console import Console

        return Console(stderr=stderr, highlight=False)

    def result(
        self, value: Any, view: Callable[[], RenderableType], bare: str | None = None
    ) -> None:
        """Prints the data: `value` as JSON, or `view()` for a person, or the `bare` text if quiet."""
        if self.mode == "json":
            print(json.dumps(value, ensure_ascii=False), flush=True)
        elif self.mode == "human":
            self.console().print(view())
        elif bare is not None:
            print(bare, flush=True)

    def stream(self, text: str) -> None:
        """Prints a piece of text as it arrives. JSON output has the whole text in `result` instead."""
        if self.mode != "json":
            print(text, end="", flush=True)

    def note(self, renderable: RenderableType) -> None:
        """Prints information for a person on stderr."""
        if self.human:
            self.console(stderr=True).print(renderable)

    def line(self, text: str) -> None:
        """Prints a note without wrapping and markup, so that it can be copied."""
        if self.human:
            print(text, file=sys.stderr)

    def hint(self, message: str) -> None:
        if self.human:
            print(f"hint: {message}", file=sys.stderr)

    def progress(self) -> AbstractContextManager[Progress | None]:
        """Progress bars on stderr; None in the modes json and quiet."""
        if not self.human:
            return nullcontext(None)
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
        )
        return Progress(*columns, console=self.console(stderr=True), transient=True)
