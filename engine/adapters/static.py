"""The adapter of --merge-adapter-weights: found, opened and checked by the process that merges it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from engine.adapters.finder import Found, finder
from engine.adapters.own_text import Reading, TextReader
from engine.adapters.registry import check_merging
from engine.checkpoint import cache_folder
from engine.config import EngineConfig
from engine.lora.formats import load_peft
from engine.lora.own import CheckpointTables, without_base_rows
from engine.lora.weights import LoraWeights
from engine.messages import AdapterText, MergedAdapter
from engine.ops.layout import ShardLayout
from engine.sandbox import Converter

logger = logging.getLogger(__name__)


class StaticAdapter(NamedTuple):
    about: MergedAdapter
    weights: LoraWeights


@contextmanager
def static_adapter(
    config: EngineConfig, layout: ShardLayout, base: Path
) -> Iterator[StaticAdapter]:
    """The adapter of --adapter-id, open in the block. `base`: the folder of the base model.

    Raises ConfigError and AdapterError.
    """
    adapters, model = config.adapters, config.model
    name = check_merging(config)
    found = finder(config, adapters.adapter_source)(name)
    converter = Converter(cache_folder(model.huggingface_hub_cache))
    with closing(converter), found.fetch() as files, converter.readable(files.weights) as readable:
        loaded = load_peft(
            files.config,
            readable,
            layout.targets,
            shards=files.shards,
            max_rank=adapters.max_adapter_rank,
            max_added_tokens=adapters.max_added_tokens,
            base_model=model.model_id.partition("@")[0],
        )
        with loaded:
            reading = Reading()
            if files.texts:
                reading = TextReader(model).read(files.texts, layout.targets.vocab)
            for note in (*loaded.notes, *reading.notes):
                logger.info("%s: %s", name, note)
            weights = without_base_rows(loaded, layout, CheckpointTables(base, layout.targets))
            yield StaticAdapter(_about(name, found, reading.text), weights)


def _about(name: str, found: Found, text: AdapterText | None) -> MergedAdapter:
    return MergedAdapter(
        name=name,
        source=found.version.source,
        prefix=found.source.prefix,
        id=found.ref.id,
        revision=found.version.revision,
        text=text,
    )
