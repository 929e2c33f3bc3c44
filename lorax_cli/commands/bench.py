"""`lorax bench`: engines in this process, without and with adapters; with --url, a running server over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.bench_options import Load, Workload, bench_options, fill
from engine.config import EngineConfig, flag_of
from engine.errors import ConfigError, LoraxError
from lorax_cli.options import UrlOption, with_bench_options, with_config
from lorax_cli.output import Output, QuietFlag, examples, warn

Given = dict[str, str | list[str]]


def check_given(given: Given, url: str | None) -> None:
    """Raises ConfigError for an option of the other way to measure."""
    allowed = {name for name, _ in bench_options(Workload if url is None else Load)}
    for name in given:
        if name not in allowed:
            problem = "needs --url" if url is None else "has no effect with --url"
            raise ConfigError(f"{flag_of(name)} {problem}", field=name)


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


def offline(config: EngineConfig, given: Given, out: Output) -> tuple[Any, Any, Any]:
    """(report, table, bare lines) of engines in this process."""
    workload = fill(Workload, given)
    workload.check()
    from engine.bench.offline import measure
    from lorax_cli.bench_tables import engine_lines, engine_table

    report = measure(config, workload, tell=lambda text: out.note(f"[dim]{text}[/dim]"))
    if not all(one.resident for one in report.measurements):
        warn(
            "adapters were copied to the device during the measurement; raise --adapter-memory-fraction"
        )
    return report, engine_table, engine_lines


def over_http(config: EngineConfig, given: Given, url: str, out: Output) -> tuple[Any, Any, Any]:
    """(report, table, bare lines) of a running server."""
    import asyncio

    from engine.bench.load.load_report import report_of
    from engine.bench.load.run import drive
    from lorax_cli.bench_tables import load_lines, load_table

    load = fill(Load, given)
    source = config.adapters.adapter_source
    outcome = asyncio.run(
        drive(
            url,
            load,
            None if source == "hub" else source,  # None: the server's default source
            tell=lambda text: out.note(f"[dim]{text}[/dim]"),
        )
    )
    return report_of(outcome, load), load_table, load_lines


@with_config("model", "adapters", "scheduler", "memory")
@with_bench_options(("In this process", Workload), ("With --url", Load))
def bench(
    config: EngineConfig,
    given: Given,
    url: Annotated[
        str | None,
        UrlOption(help="Measure the server at this address: LoRAX or any with OpenAI's API."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers to this file; - for stdout.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a plot to this file: .html or .png.")
    ] = None,
    quiet: QuietFlag = False,
) -> None:
    """Measure engines in this process without HTTP, or a running server with --url.

    In this process, cases with and without random adapters run in turn.

    The time of a decode step is (time of all tokens - time of 1 token) / (tokens - 1).

    The limit of a step is the time to read weights, KV cache and adapters at copy bandwidth.

    With --url, requests arrive at random with a given rate (--rate), or a new one starts when one ends (--concurrency).

    Long-running streams (--background) measure how other requests affect running streams.
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
        raise LoraxError(f"none of the {report.sent} requests completed")


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
