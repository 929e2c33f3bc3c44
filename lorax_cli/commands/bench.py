"""`lorax bench`: decode steps, prefill and throughput of one engine in this process, base against adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from engine.config import EngineConfig
from engine.errors import ConfigError
from lorax_cli.options import with_config
from lorax_cli.output import Output, QuietFlag, examples, warn

if TYPE_CHECKING:
    from rich.table import Table

    from engine.bench import Report

Popularity = Literal["distinct", "uniform", "zipf", "identical"]
POPULARITIES: tuple[Popularity, ...] = get_args(Popularity)


def table_of(report: Report) -> Table:
    """One row for each case."""
    from rich.table import Table

    workload = report.workload
    title = (
        f"{report.model_id}, {report.dtype} on {report.device}: batch {workload.batch}, "
        f"{workload.input_tokens} + {workload.output_tokens} tokens, {workload.adapters} adapters "
        f"of rank {', '.join(map(str, workload.ranks))}"
    )
    table = Table("case", title=title, caption=f"copy: {report.copy_bytes_per_s / 1e9:.1f} GB/s")
    heads = (
        "adapters",
        "step ms",
        "best",
        "p90",
        "x base",
        "prefill tok/s",
        "tok/s",
        "must move MB",
        "ms",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for one in report.measurements:
        table.add_row(
            one.case,
            str(one.adapters),
            f"{one.step_ms:.2f}",
            f"{one.step_ms_best:.2f}",
            f"{one.step_ms_p90:.2f}",
            f"{one.ratio:.2f}",
            f"{one.prefill_tokens_per_s:.0f}",
            f"{one.tokens_per_s:.1f}",
            f"{one.must_move_bytes / 1e6:.1f}",
            f"{one.must_move_ms:.2f}",
        )
    return table


def numbers(text: str) -> tuple[int, ...]:
    """`8,16` as (8, 16)."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise ConfigError(f"--ranks: {text!r} is not a list of ranks", field="ranks")
    return values


def kinds(text: str) -> tuple[Popularity, ...]:
    """`distinct,zipf` as its parts."""
    names = [part.strip() for part in text.split(",")]
    if unknown := [name for name in names if name not in POPULARITIES]:
        raise ConfigError(
            f"--popularity: {unknown[0]!r} must be one of {', '.join(POPULARITIES)}",
            field="popularity",
        )
    return tuple(kind for name in names for kind in POPULARITIES if kind == name)


@with_config("model", "adapters", "scheduler", "memory")
def bench(
    config: EngineConfig,
    batch: Annotated[int, typer.Option(help="Requests that run at the same time.")] = 8,
    input_tokens: Annotated[int, typer.Option(help="Tokens of every prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated for every prompt.")] = 32,
    adapters: Annotated[int, typer.Option(help="Adapters to make.")] = 8,
    ranks: Annotated[str, typer.Option(help="Their ranks, given out in turn: 8,16,32.")] = "16",
    targets: Annotated[
        str, typer.Option(help="Their targets: q_proj,v_proj. Empty: every linear of the layers.")
    ] = "",
    popularity: Annotated[
        str, typer.Option(help="Who uses which adapter: distinct,uniform,zipf,identical.")
    ] = "distinct",
    repeat: Annotated[int, typer.Option(help="Rounds of every case.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of adapters, prompts and popularity.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file; - for stdout.")
    ] = None,
    quiet: QuietFlag = False,
) -> None:
    """Measure an engine in this process, without HTTP: the base model and its adapters in turn.

    Adapters are random. "must move" is what a decode step has to read at least (weights, KV cache, adapters), and how
    long that takes at the speed of a copy on this machine.
    """
    given_ranks = numbers(ranks)
    from engine.bench import Bench, Workload

    to_stdout = json_file is not None and str(json_file) == "-"
    out = Output.of(to_stdout, quiet)
    workload = Workload(
        batch=batch,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        adapters=adapters,
        ranks=given_ranks,
        targets=tuple(part for part in targets.split(",") if part),
        popularity=kinds(popularity),
        repeat=repeat,
        seed=seed,
    )
    running = Bench(config, workload)
    try:
        report = running.run(tell=lambda text: out.note(f"[dim]{text}[/dim]"))
    finally:
        running.close()
    if not all(one.resident for one in report.measurements):
        warn("adapters were placed anew while measuring; raise --adapter-memory-fraction")
    value: dict[str, Any] = report.to_json()
    if json_file is not None and not to_stdout:
        json_file.write_text(json.dumps(value, indent=2) + "\n")
    out.result(value, view=lambda: table_of(report))


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "lorax bench --batch 16 --adapters 16 --ranks 8,16,64",
            "lorax bench --popularity distinct,zipf,identical --json -",
            "lorax bench --model-id ./model --load-format dummy --targets q_proj,v_proj",
        )
    )(bench)
