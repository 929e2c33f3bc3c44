"""Adapters by name, as the commands of `lorax adapters` get them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.config import EngineConfig
from lorax_cli.output import Output

if TYPE_CHECKING:
    from engine.adapters.sources import AdapterFiles
    from engine.ops.layout import ShardLayout

Progress = Callable[[int, int], None]
Finder = Callable[[str, Progress], tuple[str, "AdapterFiles"]]  # name -> (source, open files)

AdapterNames = Annotated[
    list[str],
    typer.Argument(help="Adapter: a folder, or a name as in `adapter_id`.", show_default=False),
]


def finder(config: EngineConfig) -> Finder:
    """Finds adapters by name, as a server with this configuration does. Downloads missing files."""
    from engine.adapters.finder import finder as by_name

    look_up = by_name(config)

    def find(name: str, progress: Progress) -> tuple[str, AdapterFiles]:
        found = look_up(name)
        return found.version.source, found.fetch(progress)

    return find


@contextmanager
def bar(out: Output, name: str) -> Iterator[Progress]:
    """A progress bar for one adapter."""
    with out.progress() as progress:
        if progress is None:
            yield lambda done, total: None
            return
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


def opened(name: str, find: Finder, out: Output) -> AdapterFiles:
    """The files of a folder, or of an adapter by name."""
    from engine.adapters.sources import open_folder

    folder = Path(name).expanduser()
    if folder.is_dir():
        return open_folder(folder)
    with bar(out, name) as progress:
        return find(name, progress)[1]


def layout_of(config: EngineConfig) -> ShardLayout:
    """The layout of adapters for the base model. Its weights are not needed, and not downloaded."""
    from engine.adapters.base_model import fetch_base_model
    from engine.models import adapter_layout

    fetch_base_model(config, weights=False)
    layout: ShardLayout = adapter_layout(config.model)[0]
    return layout
