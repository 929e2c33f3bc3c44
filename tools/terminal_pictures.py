"""Draws docs/pictures: what `lorax adapters list` and `lorax cache` print, on the demo model with some requests.

python -m tools.terminal_pictures

A later run changes numbers only. The pictures need no network: they use the reader's own monospaced font.
"""

from __future__ import annotations

import asyncio
import io
import tempfile
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME

from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, ServerConfig
from lorax_cli.app import app
from lorax_cli.client import Client
from lorax_cli.output import Output
from lorax_cli.serving import serve_while

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"
COLUMNS = 84
PICTURES = {"adapters": ["adapters", "list"], "cache": ["cache"]}  # name -> command
REQUESTS = ("pirate", "math", "math", "pirate", "math")
PINNED = "pirate"
FORMAT = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def draw(name: str, command: list[str], url: str) -> str:
    """Runs a command and returns its terminal as SVG."""
    terminal = Console(
        record=True,
        width=COLUMNS,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
    )
    words = " ".join(["lorax", *command])
    terminal.print(f"[bold]$ {words}[/bold]")
    with patch.object(Output, "console", lambda self, stderr=False: terminal):
        app([*command, "--url", url], standalone_mode=False)
    svg = terminal.export_svg(
        title=words, theme=SVG_EXPORT_THEME, code_format=FORMAT, unique_id=f"lorax-{name}"
    )
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


async def visit(url: str) -> bool:
    """Uses the adapters, then draws all pictures. Ends the server."""
    async with Client(url) as client:
        await client.manage("pin", PINNED)
        for adapter in REQUESTS:
            await client.generate("Hello", {"adapter_id": adapter, "max_new_tokens": 4})
    FOLDER.mkdir(exist_ok=True)
    for name, command in PICTURES.items():
        path = FOLDER / f"{name}.svg"
        path.write_text(await asyncio.to_thread(draw, name, command, url))
        print(path)
    return False


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="lorax-pictures-") as cache:
        config = EngineConfig(
            model=ModelConfig(huggingface_hub_cache=cache),
            adapters=AdapterConfig(host_cache_gb=0.0078125, adapter_memory_fraction=0.05),
            memory=MemoryConfig(device="cpu", cpu_memory_gb=0.15),
            server=ServerConfig(hostname="127.0.0.1", port=0),
        )
        asyncio.run(serve_while(config, lambda info, address: None, visit))


if __name__ == "__main__":
    main()
