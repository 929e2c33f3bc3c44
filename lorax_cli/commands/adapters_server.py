"""`lorax adapters list, info, load, prefetch, pin, unload`: the adapters of a running server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.config import MIB
from engine.errors import AdapterError, InvalidRequest
from engine.messages import AdapterPhase, Tier
from lorax_cli.client import Client, Server
from lorax_cli.options import with_server
from lorax_cli.output import JsonFlag, Output, QuietFlag, examples, fail

if TYPE_CHECKING:
    from rich.console import RenderableType

Names = Annotated[
    list[str], typer.Argument(help="Adapter, as in `adapter_id`, or an alias.", show_default=False)
]
SourceOption = Annotated[
    str | None, typer.Option("--source", help="Source of the adapter.", show_default=False)
]
NUMBERS = ("MiB", "rank", "open", "hits")
WIDE = 76  # columns, from which on all fields of a table fit
STYLES = {"ready": "green", "failed": "red", "fetching": "yellow", "parsing": "yellow"}


def ago(iso: str | None, now: datetime | None = None) -> str:
    """The time since a moment, in its largest unit."""
    if iso is None:
        return "-"
    seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(iso)).total_seconds()
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def text_of(value: object) -> str:
    """A field of an entry."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value in (None, "") else str(value)


def table_of(rows: list[dict[str, Any]], width: int, total: int | None = None) -> RenderableType:
    """One row per adapter, in `width` columns. Names are folded, never cut; a narrow table has fewer columns.

    `total`: the number of adapters, if there may be more.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    table.add_column("adapter (source)", overflow="fold")
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "state": _state,
        "tier": lambda row: str(row["tier"]),
    }
    if width >= WIDE:
        columns |= {
            "MiB": lambda row: f"{row['bytes'] / MIB:.2f}" if row["bytes"] else "-",
            "rank": lambda row: str(row["rank"] or "-"),
            "open": lambda row: str(row["requests"]),
            "hits": lambda row: str(row["hits"]),
            "last used": lambda row: ago(row["last_used"]),
        }
    for name in columns:
        table.add_column(name, no_wrap=True, justify="right" if name in NUMBERS else "left")
    for row in rows:
        marks = [mark for mark in ("pinned", "preloaded", "merged") if row[mark]]
        more = escape(", ".join(filter(None, [row["source"], *marks])))
        name = f"{escape(row['id'])} [dim]({more})[/dim]" if more else escape(row["id"])
        table.add_row(name, *(cell(row) for cell in columns.values()))
    if total is not None and total > len(rows):
        table.caption = f"{len(rows)} of {total}; --limit shows more"
    return table


def _state(row: dict[str, Any]) -> str:
    style = STYLES.get(row["state"], "default")
    return f"[{style}]{row['state']}[/{style}]"


def details_of(row: dict[str, Any]) -> RenderableType:
    """Every field of one adapter."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    shown = {
        "size": f"{row['bytes'] / MIB:.2f} MiB",
        "ranks": ", ".join(map(str, row["ranks"])),
        "targets": ", ".join(row["targets"]),
        "last used": f"{row['last_used']} ({ago(row['last_used'])})" if row["last_used"] else None,
        "last load": ", ".join(f"{name} {time:.3f} s" for name, time in row["seconds"].items()),
        "error": row["error"] and row["error"]["message"],
        "hint": row["error"] and row["error"]["hint"],
    }
    plain = ("id", "source", "revision", "digest", "state", "tier", "base_model")
    counts = ("pinned", "preloaded", "merged", "requests", "hits")
    values = {name.replace("_", " "): row[name] for name in (*plain, *counts)} | shown
    for name, value in values.items():
        table.add_row(name, escape(text_of(value)))
    return table


@with_server
def list_(
    server: Server,
    state: Annotated[AdapterPhase | None, typer.Option(help="Only adapters in this state.")] = None,
    tier: Annotated[
        Tier | None, typer.Option(help="Only adapters whose fastest place is this.")
    ] = None,
    prefix: Annotated[str | None, typer.Option(help="Only names that begin with this.")] = None,
    limit: Annotated[int, typer.Option(help="Maximum number of adapters.")] = 100,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """List the adapters that a running server knows: where each is, its size and its use."""
    out = Output.of(as_json, quiet)

    async def ask(client: Client) -> None:
        query = {"state": state, "tier": tier, "prefix": prefix, "limit": limit}
        found = await client.adapters(**query)
        rows = found["adapters"]
        names = "\n".join(row["id"] for row in rows) or None
        out.result(
            rows, view=lambda: table_of(rows, out.console().width, found["total"]), bare=names
        )

    _run(server, ask)


@with_server
def info(
    name: Annotated[str, typer.Argument(help="Adapter, or an alias.", show_default=False)],
    server: Server,
    source: SourceOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show all that a running server knows of one adapter."""
    out = Output.of(as_json)

    async def ask(client: Client) -> None:
        row = await client.adapter(name, source)
        out.result(row, view=lambda: details_of(row))

    _run(server, ask)


@with_server
def load(
    adapter: Names,
    server: Server,
    source: SourceOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Load adapters into the host memory of a running server, and wait for them."""
    _manage("load", adapter, server, source, Output.of(as_json, quiet))


@with_server
def prefetch(
    adapter: Names,
    server: Server,
    source: SourceOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Let a running server load adapters in the background. `lorax adapters list` shows when they are ready."""
    _manage("prefetch", adapter, server, source, Output.of(as_json, quiet))


@with_server
def pin(
    adapter: Names,
    server: Server,
    unpin: Annotated[
        bool, typer.Option("--unpin", help="End the pin.", show_default=False)
    ] = False,
    source: SourceOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Keep adapters in the host memory and on the device of a running server, until they are unpinned or unloaded."""
    out = Output.of(as_json, quiet)
    _manage("pin", adapter, server, source, out, pinned=not unpin)


@with_server
def unload(
    adapter: Names,
    server: Server,
    source: SourceOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Free the memory of adapters on a running server, once the requests that use them have ended.

    A later request loads the adapter again.
    """
    _manage("unload", adapter, server, source, Output.of(as_json, quiet))


def _manage(
    what: str,
    names: list[str],
    server: Server,
    source: str | None,
    out: Output,
    **fields: Any,
) -> None:
    """Asks for each adapter. A failure is printed, the others go on, and the first one's code is the exit code."""
    if source:
        fields["adapter_source"] = source
    failures: list[AdapterError | InvalidRequest] = []
    rows: list[dict[str, Any]] = []

    async def ask(client: Client) -> None:
        for name in names:
            try:
                rows.append(await client.manage(what, name, **fields))
            except (AdapterError, InvalidRequest) as error:
                fail(f"{name}: {error.message}", error.hint)
                failures.append(error)

    _run(server, ask)
    done = {"prefetch": "loading in the background", "unload": "unloaded"}.get(what)

    def view() -> RenderableType:
        if done is None:
            return table_of(rows, out.console().width)
        return "\n".join(f"{row['id']}: {done}" for row in rows)

    if rows or out.mode == "json":
        out.result(rows, view=view, bare="\n".join(row["id"] for row in rows))
    if failures:
        raise typer.Exit(failures[0].exit_code)


def _run(server: Server, ask: Callable[[Client], Awaitable[None]]) -> None:
    import asyncio

    async def run() -> None:
        async with server.client() as client:
            await ask(client)

    asyncio.run(run())


def add_to(group: typer.Typer) -> None:
    """Adds the commands to `lorax adapters`."""
    group.command(
        "list",
        epilog=examples(
            "lorax adapters list", "lorax adapters list --tier device --url http://localhost:8080"
        ),
    )(list_)
    group.command(epilog=examples("lorax adapters info pirate", "lorax adapters info a/b --json"))(
        info
    )
    group.command(epilog=examples("lorax adapters load user/adapter user/other@v2"))(load)
    group.command(epilog=examples("lorax adapters prefetch user/adapter"))(prefetch)
    group.command(
        epilog=examples("lorax adapters pin user/adapter", "lorax adapters pin a/b --unpin")
    )(pin)
    group.command(epilog=examples("lorax adapters unload user/adapter"))(unload)
