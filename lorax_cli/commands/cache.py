"""`lorax cache`: how full the tiers of adapters of a running server are."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from engine.config import GIB, MIB
from engine.errors import ConfigError
from lorax_cli.client import Client, Server
from lorax_cli.options import with_server
from lorax_cli.output import JsonFlag, Output, examples

if TYPE_CHECKING:
    from rich.console import RenderableType

TIERS = ("device", "host", "disk")
BAR_COLUMNS = 20
MIN_INTERVAL_S = 0.1


def size(num_bytes: int) -> str:
    """Bytes in a unit that fits."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.2f} MiB"


def tiers_view(cache: dict[str, Any]) -> RenderableType:
    """A bar per tier, a table of what each holds and did, and the loads."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    bars = Table.grid(padding=(0, 2, 0, 0))
    for tier in TIERS:
        level = cache[tier]
        room = level["capacity_bytes"]
        share = (room or 1, min(level["bytes"], room) if room else 0)
        used = f"{size(level['bytes'])} of {'no limit' if room is None else size(room)}"
        bars.add_row(tier, ProgressBar(*share, width=BAR_COLUMNS), used)
    device, host, disk = (cache[tier] for tier in TIERS)
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("tier", no_wrap=True)
    for name in ("adapters", "pinned", "in use", "evicted", "requests"):
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[str, tuple[Any, ...]] = {
        "device": (device["adapters"], "", device["in_use"], device["evictions"]),
        "host": (host["adapters"], host["pinned"], size(host["leased_bytes"]), host["evictions"]),
        "disk": (disk["entries"], "", "", disk["evictions"]),
        "source": ("", "", "", ""),
    }
    for tier, values in rows.items():
        table.add_row(tier, *map(str, values), str(cache["hits"][tier]))
    return Group(bars, table, loads_of(cache))


def loads_of(cache: dict[str, Any]) -> str:
    loads, disk = cache["loads"], cache["disk"]
    text = (
        f"loads: {loads} ({size(cache['loaded_bytes'])}), failed {cache['load_failures']}; "
        f"from disk {disk['hits']}, downloaded {disk['misses']}"
    )
    each = [f"{stage} {time / loads:.3f} s" for stage, time in cache["seconds"].items() if loads]
    return f"{text}\ntime per load: {', '.join(each)}" if each else text


def line_of(cache: dict[str, Any]) -> str:
    """All tiers in one line, for logs."""
    parts = []
    for tier in TIERS:
        level = cache[tier]
        room = "" if level["capacity_bytes"] is None else f" of {size(level['capacity_bytes'])}"
        parts.append(f"{tier} {size(level['bytes'])}{room}")
    hits = " ".join(f"{tier}={count}" for tier, count in cache["hits"].items())
    return f"{', '.join(parts)}; hits {hits}; loads {cache['loads']}"


async def watch(client: Client, interval: float, out: Output) -> NoReturn:
    """Shows the state until the command is interrupted: in place on a terminal, else a line each time."""
    from asyncio import sleep

    console = out.console()
    if out.mode == "json" or not console.is_terminal:
        while True:
            found = await client.cache()
            print(json.dumps(found) if out.mode == "json" else line_of(found), flush=True)
            await sleep(interval)
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(tiers_view(await client.cache()), refresh=True)
            await sleep(interval)


@with_server
def cache(
    server: Server,
    watching: Annotated[
        bool, typer.Option("--watch", help="Refresh until Ctrl-C.", show_default=False)
    ] = False,
    interval: Annotated[
        float, typer.Option(help="Seconds between two refreshes of --watch.")
    ] = 1.0,
    as_json: JsonFlag = False,
) -> None:
    """Show how full the tiers of adapters of a running server are: device, host memory and disk.

    With --watch the view is refreshed in place. If stdout is not a terminal, each refresh is a line. Ctrl-C ends it.
    """
    if not MIN_INTERVAL_S <= interval < 1e6:
        raise ConfigError(
            f"--interval {interval:g} is not a number of seconds from {MIN_INTERVAL_S:g} on",
            field="interval",
            hint="use 1, or leave it out",
        )
    out = Output.of(as_json)

    async def show() -> None:
        async with server.client() as client:
            if watching:
                await watch(client, interval, out)
            found = await client.cache()
            out.result(found, view=lambda: tiers_view(found))

    import asyncio

    asyncio.run(show())


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "lorax cache",
            "lorax cache --watch --interval 5",
            "lorax cache --json --url http://localhost:8080",
        )
    )(cache)
