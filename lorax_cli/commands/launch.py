"""`lorax launch`: the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from engine.config import GIB, MIB, EngineConfig
from lorax_cli.options import LaunchCommand, with_config
from lorax_cli.output import Output, examples

if TYPE_CHECKING:
    from rich.table import Table

    from engine.messages import EngineInfo


def memory_table(info: EngineInfo) -> Table:
    """The memory plan."""
    from rich.table import Table

    table = Table("memory", "size")
    table.columns[1].justify = "right"
    for what, num_bytes in info.memory_plan:
        big = num_bytes >= GIB
        table.add_row(what, f"{num_bytes / GIB:.3f} GiB" if big else f"{num_bytes / MIB:.1f} MiB")
    return table


def announce(out: Output, info: EngineInfo, config: EngineConfig) -> None:
    """Prints on stderr the model, the memory plan, the backends, which adapters are served, and who is."""
    held = info.dtype if info.quantize is None else f"{info.dtype}, linears {info.quantize}"
    out.note(f"{info.model_id} on {info.device_name} ({held})")
    out.note(memory_table(info))
    by_backend: dict[str, list[str]] = {}
    for op, backend in info.backends.items():
        by_backend.setdefault(backend, []).append(op)
    for backend, ops in by_backend.items():
        out.note(f"{backend}: {', '.join(ops)}")
    if info.merged_adapter is not None:
        out.note(
            f"merged into the base model: {info.merged_adapter.name}; no other adapter is served"
        )
    else:
        out.note(f"local adapters: {', '.join(config.adapters.adapter_root)}")
    has_keys = config.server.api_key or config.server.api_keys_file
    out.note(f"API keys: {'required' if has_keys else 'none, every client is served'}")


@with_config("model", "adapters", "scheduler", "memory", "server", legacy=True)
def launch(config: EngineConfig) -> None:
    """Serve a base model and its adapters over HTTP.

    A request selects its adapter with `adapter_id`, or with `model` on the OpenAI routes. Adapters load on first use.
    """
    from lorax_cli.serving import serve

    out = Output()

    def started(info: EngineInfo, address: str) -> None:
        announce(out, info, config)
        out.note(f"listening on {address}")

    import asyncio

    asyncio.run(serve(config, started))


def register(app: typer.Typer) -> None:
    app.command(
        cls=LaunchCommand,
        epilog=examples(
            "lorax launch",
            "lorax launch --model-id Qwen/Qwen2.5-0.5B-Instruct --port 8080",
            "lorax launch --model-id ./model --adapter-root ./adapters --preloaded-adapter-ids sql",
            "lorax launch --config lorax.yaml",
        ),
    )(launch)
