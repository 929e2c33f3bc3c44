"""Where the commands of `lorax bench` write their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.errors import ConfigError
from lorax_cli.output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

Given = dict[str, str | list[str]]

JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write all numbers to this file; - for stdout.")
]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", help="Write a plot to this file: .html or .png.")
]


def check_files(json_file: Path | None, plot: Path | None) -> None:
    """Raises ConfigError for a file that cannot be written, before the measurement starts."""
    if plot is not None:
        from engine.bench.plot import check_plot

        check_plot(plot)
    for field, file in (("json", json_file), ("plot", plot)):
        if file is None:
            continue
        folder = file.absolute().parent
        if not folder.is_dir():
            raise ConfigError(f"--{field} {file}: folder {folder} does not exist", field=field)
        if file.is_dir():
            raise ConfigError(f"--{field} {file}: is a folder", field=field)


def output_of(json_file: Path | None, plot: Path | None, quiet: bool) -> Output:
    """The output for the flags. Raises ConfigError as `check_files`."""
    to_stdout = _is_stdout(json_file)
    check_files(None if to_stdout else json_file, plot)
    return Output.of(to_stdout, quiet)


def write(
    report: Any,
    out: Output,
    table: Callable[[Any], RenderableType],
    lines: Callable[[Any], str],
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Prints a report of `lorax bench`, and writes its files."""
    value: dict[str, Any] = report.to_json()
    out.result(value, view=lambda: table(report), bare=lines(report))
    if json_file is not None and not _is_stdout(json_file):
        json_file.write_text(json.dumps(value, indent=2) + "\n")
    if plot is not None:
        from engine.bench.plot import draw

        draw(report, plot)


def _is_stdout(file: Path | None) -> bool:
    return file is not None and str(file) == "-"
