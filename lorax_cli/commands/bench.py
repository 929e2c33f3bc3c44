"""`lorax bench`: engines in this process, without and with adapters; with --url, a running server over HTTP."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from engine.bench_options import Load, Workload, bench_options, fill
from engine.config import EngineConfig, flag_of
from engine.errors import ConfigError, LoraxError
from lorax_cli.bench_files import Given, JsonFile, PlotFile, output_of, write
from lorax_cli.commands.bench_simulate import simulate
from lorax_cli.options import UrlOption, with_bench_options, with_config
from lorax_cli.output import Output, QuietFlag, examples, warn


def check_given(given: Given, url: str | None) -> None:
    """Raises ConfigError for an option of the other way to measure."""
    allowed = {name for name, _ in bench_options(Workload if url is None else Load)}
    for name in given:
        if name not in allowed:
            problem = "needs --url" if url is None else "has no effect with --url"
            raise ConfigError(f"{flag_of(name)} {problem}", field=name)


def check_none_given(context: typer.Context) -> None:
    """Raises ConfigError for an option before the name of a command, where it has no effect."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"{parameter.opts[0]} has no effect before {context.invoked_subcommand}",
                field=parameter.name,
                hint=f"lorax bench {context.invoked_subcommand} --help lists its options",
            )


def offline(config: EngineConfig, given: Given, out: Output) -> tuple[Any, Any, Any]:
    """(report, its table, its bare lines) of engines in this process."""
    workload = fill(Workload, given)
    workload.check()
    if config.adapters.merge_adapter_weights:
        raise ConfigError(
            "--merge-adapter-weights has no effect on steps: they take as long as the base model's",
            field="merge_adapter_weights",
            hint="leave it out, or measure a running server with --url",
        )
    from engine.bench.offline import measure
    from lorax_cli.bench_tables import engine_lines, engine_table

    report = measure(config, workload, tell=lambda text: out.note(f"[dim]{text}[/dim]"))
    if not all(one.resident for one in report.measurements):
        warn(
            "adapters were copied to the device during the measurement; raise --adapter-memory-fraction"
        )
    return report, engine_table, engine_lines


def over_http(
    config: EngineConfig, given: Given, url: str, api_key: str | None, out: Output
) -> tuple[Any, Any, Any]:
    """(report, its table, its bare lines) of a running server."""
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
            api_key=api_key,
        )
    )
    return report_of(outcome, load), load_table, load_lines


@with_config("model", "adapters", "scheduler", "memory")
@with_bench_options(("In this process", Workload), ("With --url", Load))
def bench(
    context: typer.Context,
    config: EngineConfig,
    given: Given,
    url: Annotated[
        str | None,
        UrlOption(help="Measure the server at this address: LoRAX or any with OpenAI's API."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="API key of the server of --url, if it has keys.", show_default=False),
    ] = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    quiet: QuietFlag = False,
) -> None:
    """Measure engines in this process without HTTP, or a running server with --url.

    In this process, cases with and without random adapters run in turn.

    The time of a decode step is (time of all tokens - time of 1 token) / (tokens - 1).

    The limit of a step is the time to read weights, KV cache and adapters at copy bandwidth.

    With --url, requests arrive at random with a given rate (--rate), or a new one starts when one ends (--concurrency).

    Long-running streams (--background) measure how other requests affect running streams.
    """
    if context.invoked_subcommand is not None:
        check_none_given(context)
        return
    check_given(given, url)
    if api_key is not None and url is None:
        raise ConfigError("--api-key needs --url", field="api_key")
    out = output_of(json_file, plot, quiet)
    report, table, lines = (
        offline(config, given, out) if url is None else over_http(config, given, url, api_key, out)
    )
    write(report, out, table, lines, json_file, plot)
    if url is not None and not report.completed:
        raise LoraxError(f"none of the {report.sent} requests completed")


def register(app: typer.Typer) -> None:
    group = typer.Typer()
    group.callback(
        invoke_without_command=True,
        epilog=examples(
            "lorax bench --batch 16 --adapters 16 --ranks 8,16,64",
            "lorax bench --popularity distinct,zipf --json - --plot bench.html",
            "lorax bench --shape mistral-7b --batch 64 --input-tokens 128 --output-tokens 256 --adapters 64",
            "lorax bench --url http://localhost:3000 --rate 20 --adapters pirate,math",
            "lorax bench --url http://localhost:3000 --concurrency 64 --requests 256 --json load.json",
        ),
    )(bench)
    group.command(
        epilog=examples(
            "lorax bench simulate --adapters 5000 --rate 60 --host-cache-gb 32",
            "lorax bench simulate --requests 20000 --flood-every 30 --flood-size 200 --plot flood.html",
        )
    )(simulate)
    app.add_typer(group, name="bench")
