"""The `lorax` command: the Typer app, and the one place where errors become exit codes."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from engine import __version__
from engine.errors import LoraxError
from lorax_cli.commands import adapters, bench, cache, demo, generate, launch
from lorax_cli.output import fail


class ErrorTable(TyperGroup):
    """Turns a LoraxError into `error: ...`, `hint: ...` and its exit code. Ctrl-C exits with 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LoraxError as error:
            fail(error.message, error.hint)
            raise typer.Exit(error.exit_code) from None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lorax {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="lorax",
    cls=ErrorTable,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="To start: lorax demo",
)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve one language model and thousands of its LoRA adapters."""


for _command in (demo, launch, generate, adapters, cache, bench):
    _command.register(app)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="lorax")
