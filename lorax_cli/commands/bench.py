"""`lorax bench`: an engine in this process, base against adapters; with --url, a running server over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.bench.load.workload import Load
from engine.bench.options import asks, fill
from engine.bench.workload import Workload
from engine.config import EngineConfig, flag_of
from engine.errors import ConfigError, LoraxError
from lorax_cli.options import UrlOption, with_asks, with_config
from lorax_cli.output import Output, QuietFlag, examples, warn

Given = dict[str, str | list[str]]


def check_given(given: Given, url: str | None) -> None:
    """Raises ConfigError for an option of the other way to measure."""
    known = {name for name, _ in asks(Workload if url is None else Load)}
    for name in given:
        if name not in known:
            where = "needs --url" if url is None else "is for an engine in this process"
            raise ConfigError(f"{flag_of(name)} {where}", field=name)


def check_files(json_file: Path | None, plot: Path | None) -> None:
    """Raises ConfigError for a file that could not be written, before anything is measured."""
    if plot is not None:
        from engine.bench.plot import check_plot

        check_plot(plot)
    for field, file in (("json", json_file), ("plot", plot)):
        if file is None:
            continue
        folder = file.absolute().parent
        if not folder.is_dir():
            raise ConfigError(f"--{field} {file}: there is no folder {folder}", field=field)
        if file.is_dir():
            raise ConfigError(f"--{field} {file}: is a folder", field=field)


def offline(config: EngineConfig, given: Given, out: Output) -> tuple[Any, Any, Any]:
    """(report, table, bare lines) of engines in this process."""
    workload = fill(Workload, given)
    workload.check()
    from engine.bench.offline import measure
    from lorax_cli.bench_tables import engine_lines, engine_table

    report = measure(config, workload, tell=lambda text: out.note(f"[dim]{text}[/dim]"))
    if not all(one.resident for one in report.measurements):
        warn("adapters were placed anew while measuring; raise --adapter-memory-fraction")
    return report, engine_table, engine_lines


def over_http(config: EngineConfig, given: Given, url: str, out: Output) -> tuple[Any, Any, Any]:
    """(report, table, bare lines) of a running server."""
    import asyncio

    from engine.bench.load.report import report_of
    from engine.bench.load.run import drive
    from lorax_cli.bench_tables import load_lines, load_table

    load = fill(Load, given)
    source = config.adapters.adapter_source
    outcome = asyncio.run(
        drive(
            url,
            load,
            None if source == "hub" else source,  # else wherever the server looks by default
            tell=lambda text: out.note(f"[dim]{text}[/dim]"),
        )
    )
    return report_of(outcome, load), load_table, load_lines


@with_config("model", "adapters", "scheduler", "memory")
@with_asks(("In this process", Workload), ("With --url", Load))
def bench(
    config: EngineConfig,
    given: Given,
    url: Annotated[
        str | None,
        UrlOption(help="Measure the server at this address, ours or any OpenAI-like."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file; - for stdout.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw them: a file that ends in .html or .png.")
    ] = None,
    quiet: QuietFlag = False,
) -> None:
    """Measure engines in this process, without HTTP, or with --url a running server.

    In this process, base and random adapters take turns. A step is (time of all tokens - time of 1) / (tokens - 1).

    Its limit is what it must move (weights, KV cache, adapters) at the speed of a copy on this device.

    With --url, requests arrive by themselves (--rate) or as others end (--concurrency).

    Streams that never end (--background) show what the others do to them.
    """
    check_given(given, url)
    to_stdout = json_file is not None and str(json_file) == "-"
    file = None if to_stdout else json_file
    check_files(file, plot)
    out = Output.of(to_stdout, quiet)
    report, table, lines = (
        offline(config, given, out) if url is None else over_http(config, given, url, out)
    )
    value: dict[str, Any] = report.to_json()
    out.result(value, view=lambda: table(report), bare=lines(report))
    if file is not None:
        file.write_text(json.dumps(value, indent=2) + "\n")
    if plot is not None:
        from engine.bench.plot import draw

        draw(report, plot)
    if url is not None and not report.completed:
        raise LoraxError(f"none of {report.sent} requests was answered in full")


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "lorax bench --batch 16 --adapters 16 --ranks 8,16,64",
            "lorax bench --popularity distinct,zipf --json - --plot bench.html",
            "lorax bench --shape mistral-7b --batch 64 --input-tokens 128 --output-tokens 256 --adapters 64",
            "lorax bench --url http://localhost:3000 --rate 20 --adapters pirate,math",
            "lorax bench --url http://localhost:3000 --concurrency 64 --requests 256 --json load.json",
        )
    )(bench)
