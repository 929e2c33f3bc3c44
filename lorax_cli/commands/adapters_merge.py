"""`lorax adapters merge`: several adapters as one, written as a PEFT folder."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.config import MIB, EngineConfig
from engine.errors import ConfigError, LoraxError
from engine.lora.recipe import MajoritySign, Recipe, Strategy, check_count
from lorax_cli.adapter_files import AdapterNames, finder, layout_of, opened
from lorax_cli.options import with_config
from lorax_cli.output import JsonFlag, Output, QuietFlag, fail

if TYPE_CHECKING:
    from engine.lora.weights import LoraWeights
    from engine.ops.targets import ModelTargets


def write(
    names: list[str], recipe: Recipe, folder: Path, config: EngineConfig, out: Output
) -> dict[str, Any]:
    """Merges adapters into a new folder and describes it. Raises LoraxError."""
    from engine.checkpoint import cache_folder
    from engine.lora.merge import Part, merge
    from engine.lora.save import save_peft
    from engine.sandbox import Converter

    if folder.exists():
        raise ConfigError(
            f"{folder} exists already", field="output", hint="give a folder that does not exist yet"
        )
    targets, find = layout_of(config).targets, finder(config)
    with ExitStack() as stack:
        converter = Converter(cache_folder(config.model.huggingface_hub_cache))
        stack.callback(converter.close)
        parts = []
        for name in names:
            files = stack.enter_context(opened(name, find, out))
            readable = stack.enter_context(converter.readable(files.weights))
            weights = load(files.config, readable, files.shards, targets, config)
            parts.append(Part(name, weights))
        result = merge(parts, recipe, max_rank=config.adapters.max_adapter_rank)
        num_bytes = save_peft(result, targets, folder)
        ranks = sorted({pair.rank for pair in result.pairs.values()})
    return {
        "folder": str(folder),
        "bytes": num_bytes,
        "ranks": ranks,
        "merge_strategy": recipe.strategy,
        "weights": list(recipe.weights),
    }


def load(
    config_file: Any, weights: Any, shards: Any, targets: ModelTargets, config: EngineConfig
) -> LoraWeights:
    """The tensors of one adapter."""
    from engine.lora.formats import load_peft

    given = config.adapters
    return load_peft(
        config_file,
        weights,
        targets,
        shards=shards,
        max_rank=given.max_adapter_rank,
        max_added_tokens=given.max_added_tokens,
    )


@with_config("model", "adapters")
def merge(
    adapter: AdapterNames,
    config: EngineConfig,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder to write. It must not exist yet.", show_default=False
        ),
    ],
    weight: Annotated[
        list[float] | None,
        typer.Option(
            help="Weight of an adapter, once for each. Default: 1 divided by their number.",
            show_default=False,
        ),
    ] = None,
    merge_strategy: Annotated[
        Strategy, typer.Option(help="How weights are combined; see docs/merging.md.")
    ] = "linear",
    density: Annotated[
        float | None,
        typer.Option(
            help="Fraction of values that ties, dare and magnitude_prune keep.", show_default=False
        ),
    ] = None,
    majority_sign_method: Annotated[
        MajoritySign, typer.Option(help="How ties and dare_ties count signs.")
    ] = "total",
    seed: Annotated[int, typer.Option(help="Of the values that dare drops.")] = 0,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Merge adapters into one, with the numbers of PEFT's add_weighted_adapter.

    The result is an ordinary adapter in float32, for any server and for PEFT. A request with the same
    `merged_adapters` gets the same.
    """
    out = Output.of(as_json, quiet)
    try:
        weights = weight or [1 / len(adapter)] * len(adapter)
        check_count(adapter, weights)
        recipe = Recipe.parse(weights, merge_strategy, density, majority_sign_method, seed)
        row = write(adapter, recipe, output.expanduser(), config, out)
    except LoraxError as error:
        fail(error.message, error.hint)
        raise typer.Exit(error.exit_code) from None
    ranks = ", ".join(map(str, row["ranks"]))
    size = f"{row['bytes'] / MIB:.2f} MiB"
    text = f"{output}: {len(adapter)} adapters by {recipe.strategy}, rank {ranks}, {size}"
    out.result(row, view=lambda: text, bare=str(output))
