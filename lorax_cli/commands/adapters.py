"""`lorax adapters`: download adapters, check them before they are served, merge them, and manage a server's."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.config import MIB, EngineConfig
from engine.errors import (
    AdapterError,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
    LoraxError,
)
from lorax_cli.adapter_files import AdapterNames, bar, finder, layout_of, opened
from lorax_cli.commands import adapters_server
from lorax_cli.commands.adapters_merge import merge
from lorax_cli.options import with_config
from lorax_cli.output import JsonFlag, Output, QuietFlag, examples, fail, warn

if TYPE_CHECKING:
    from rich.table import Table

    from engine.adapters.sources import AdapterFiles
    from engine.lora.report import AdapterReport
    from engine.messages import AdapterText

Inspect = Callable[["AdapterFiles"], tuple["AdapterReport", "AdapterText | None"]]


def _strict(note: str) -> AdapterIncompatible:
    return AdapterIncompatible(note, hint="without --strict this is a warning")


def similar(name: str, roots: Iterable[str]) -> list[str]:
    """Folders whose names resemble a missing one: next to its path, and below the adapter roots."""
    wanted, found = Path(name), []
    for root in dict.fromkeys(("", *roots)):
        parent = (Path(root) / wanted).parent
        with suppress(OSError):
            folders = [path.name for path in parent.iterdir() if path.is_dir()]
            close = difflib.get_close_matches(wanted.name, folders, n=3)
            found += [str(wanted.with_name(one)) for one in close]
    return list(dict.fromkeys(found))[:3]


def each(
    names: list[str],
    run: Callable[[str], dict[str, Any]],
    failures: list[AdapterError],
    roots: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """`run` for every name. A failure is printed and kept in `failures`; the other names still run."""
    rows = []
    for name in names:
        try:
            rows.append(run(name))
        except AdapterError as error:
            if isinstance(error, AdapterNotFound | AdapterLoadFailed) and (
                others := similar(name, roots)
            ):
                error.hint = f"did you mean {' or '.join(others)}?"
            fail(f"{name}: {error.message}", error.hint)
            rows.append({"adapter": name, "ok": False, "errors": [error_entry(error)]})
            failures.append(error)
    return rows


def error_entry(error: LoraxError) -> dict[str, Any]:
    return {
        "error_type": error.error_type,
        "message": error.message,
        "field": error.field,
        "hint": error.hint,
    }


def end(failures: list[AdapterError]) -> None:
    """Exits with the code of the first failure, if any."""
    if failures:
        raise typer.Exit(failures[0].exit_code)


def pulled_table(rows: list[dict[str, Any]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("adapter", "source", "revision", "MiB", "folder")
    for row in rows:
        if row["ok"]:
            size = f"{row['bytes'] / MIB:.2f}"
            cells = (row["adapter"], row["source"], row["revision"][:12], size, row["folder"])
            table.add_row(*map(escape, cells))
    return table


@with_config("model", "adapters")
def pull(
    adapter: AdapterNames,
    config: EngineConfig,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Download adapters before a server needs them.

    With --quiet, prints only the folders, one per line. If adapters fail, the exit code is that of the first failure.
    """
    out = Output.of(as_json, quiet)
    find = finder(config)

    def run(name: str) -> dict[str, Any]:
        with bar(out, name) as progress:
            source, files = find(name, progress)
        with files:
            return {
                "adapter": name,
                "ok": True,
                "source": source,
                "revision": files.revision,
                "folder": str(files.folder),
                "bytes": files.num_bytes,
            }

    failures: list[AdapterError] = []
    rows = each(adapter, run, failures, config.adapters.adapter_root)
    folders = [row["folder"] for row in rows if row["ok"]]
    if folders or as_json:
        out.result(rows, view=lambda: pulled_table(rows), bare="\n".join(folders))
    end(failures)


def report_entry(
    name: str, report: AdapterReport, text: AdapterText | None, failures: list[AdapterError]
) -> dict[str, Any]:
    """`failures`: those of this adapter, with the notes that --strict turned into errors."""
    return {
        "adapter": name,
        "ok": not failures,
        "folder": report.folder,
        "base_model": report.base_model,
        "base_matches": report.base_matches,
        "targets": report.targets,
        "coverage": report.coverage,
        "ranks": report.ranks,
        "scales": report.scales,
        "bytes": report.data_bytes,
        "digest": report.digest,
        "own_tokens": [token.content for token in text.tokens] if text else [],
        "own_chat_template": text is not None and text.template is not None,
        "notes": report.notes,
        "errors": [error_entry(error) for error in failures],
    }


def show_problems(name: str, errors: list[AdapterError], notes: list[str]) -> None:
    """Errors and warnings of one adapter on stderr."""
    for error in errors:
        fail(f"{name}: {error.message}", error.hint)
    for note in notes:
        warn(f"{name}: {note}")


def report_table(rows: list[dict[str, Any]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("adapter", "base model", "ranks", "targets (layers)", "MiB", "result")
    matches = {True: "same name", False: "other name", None: "unknown"}
    for row in rows:
        result = "[green]can be served[/green]" if row["ok"] else "[red]refused[/red]"
        own = [f"{len(row['own_tokens'])} own tokens"] if row.get("own_tokens") else []
        own += ["its own chat template"] if row.get("own_chat_template") else []
        result += f" with {' and '.join(own)}" if own and row["ok"] else ""
        by_layers: dict[str, list[str]] = {}
        for name in row.get("targets", {}):
            by_layers.setdefault(row["coverage"][name], []).append(name)
        targets = "; ".join(f"{', '.join(names)} ({layers})" for layers, names in by_layers.items())
        table.add_row(
            escape(row["adapter"]),
            escape(f"{row.get('base_model') or ''} ({matches[row.get('base_matches')]})"),
            ", ".join(map(str, row.get("ranks", []))),
            targets,
            f"{row.get('bytes', 0) / MIB:.2f}",
            result,
        )
    return table


@contextmanager
def inspector(config: EngineConfig) -> Iterator[Inspect]:
    """Checks the files of adapters for the base model of the configuration."""
    from engine.adapters.own_text import Reading, TextReader
    from engine.checkpoint import cache_folder
    from engine.lora.folder import folder_notes
    from engine.lora.report import inspect
    from engine.sandbox import Converter

    layout, given = layout_of(config), config.adapters
    texts, base = TextReader(config.model), Path(config.model.model_id).expanduser()
    converter = Converter(cache_folder(config.model.huggingface_hub_cache))

    def look(files: AdapterFiles) -> tuple[AdapterReport, AdapterText | None]:
        with converter.readable(files.weights) as weights:
            report = inspect(
                files.config,
                weights,
                layout,
                shards=files.shards,
                max_rank=given.max_adapter_rank,
                max_added_tokens=given.max_added_tokens,
                base_model=config.model.model_id.partition("@")[0],
            )
        reading = Reading()
        try:
            if files.texts:
                reading = texts.read(files.texts, report.vocab or layout.targets.vocab)
        except AdapterError as error:
            report.errors.append(error)
        report.notes.extend((*reading.notes, *folder_notes(files.folder, base)))
        return report, reading.text

    with closing(converter):
        yield look


@with_config("model", "adapters")
def validate(
    adapter: AdapterNames,
    config: EngineConfig,
    strict: Annotated[
        bool, typer.Option("--strict", help="Treat notes as errors.", show_default=False)
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Check that adapters can be served with the base model of --model-id, without loading its weights.

    Every problem is printed with the module, the field and the remedy. The exit code is 0 if all adapters can be
    served, else that of the first problem: for example 11 if an adapter is missing, 13 if it is incompatible. Warnings
    name what may be a mistake: another base model, other target_modules than the file has tensors for, a tokenizer or
    head in the folder that the server does not use. Tokens and a chat template of the adapter's own are listed.
    """
    out = Output.of(as_json, quiet)
    find = finder(config)
    failures: list[AdapterError] = []

    def run(name: str) -> dict[str, Any]:
        with opened(name, find, out) as files:
            report, text = look(files)
        found = [*report.errors, *(_strict(note) for note in report.notes if strict)]
        failures.extend(found)
        show_problems(name, found, [] if strict or quiet else report.notes)
        return report_entry(name, report, text, found)

    with inspector(config) as look:
        rows = each(adapter, run, failures, config.adapters.adapter_root)
    bare = "\n".join(row["adapter"] for row in rows if row["ok"]) or None
    out.result(rows, view=lambda: report_table(rows), bare=bare)
    end(failures)


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Download, check and merge adapters, and manage those of a running server.",
        no_args_is_help=True,
    )
    adapters_server.add_to(group)
    group.command(
        epilog=examples(
            "lorax adapters pull user/adapter",
            "lorax adapters pull user/adapter@v2 user/other --quiet",
        )
    )(pull)
    group.command(
        epilog=examples(
            "lorax adapters validate ./adapters/sql --model-id ./model",
            "lorax adapters validate user/adapter --model-id Qwen/Qwen2.5-0.5B-Instruct --json",
        )
    )(validate)
    group.command(
        epilog=examples(
            "lorax adapters merge ./sql ./chat --model-id ./model -o ./both",
            "lorax adapters merge a b --weight 0.7 --weight 0.3 --merge-strategy ties --density 0.5 -o ./ab",
        )
    )(merge)
    app.add_typer(group, name="adapters")
