"""Base models from the stores that adapters come from: `--model-id s3://bucket/folder`, or `--source s3`."""

from __future__ import annotations

import logging

from engine.adapters.disk_cache import DiskCache
from engine.adapters.registry import make_sources
from engine.adapters.store import StoreSource
from engine.checkpoint import MODELS, cache_folder, is_stored, stored_link
from engine.config import EngineConfig
from engine.errors import AdapterError, AdapterLoadFailed, ModelError

MAX_SECONDS = 7 * 24 * 3600.0  # limit of one download

logger = logging.getLogger(__name__)


def fetch_base_model(config: EngineConfig, weights: bool = True) -> None:
    """Downloads a store's base model, so that `engine.checkpoint.folder_of` finds it. Does nothing for other models.

    Each version is downloaded once, into `lorax-models` in the folder of downloads. While the store is down, the last
    one is used. Raises ModelError.
    """
    model = config.model
    if not is_stored(model):
        return
    if model.revision:
        raise ModelError("only models of the hub have a revision", field="revision")
    source, folder = _store(config)
    link = stored_link(model, weights)
    cache = DiskCache(
        cache_folder(model.huggingface_hub_cache), max_seconds=MAX_SECONDS, folder=MODELS
    )
    try:
        cache.link(link.name, source.keep_model(folder, weights, cache))
    except AdapterError as error:
        if not isinstance(error, AdapterLoadFailed) or not link.is_dir():
            raise ModelError(error.message, field="model_id", hint=error.hint) from None
        logger.warning("%s: using the downloaded copy: %s", model.model_id, error.message)
    except OSError as error:
        raise ModelError(
            f"cannot write {cache.folder}: {error.strerror}", field="model_id"
        ) from None


def _store(config: EngineConfig) -> tuple[StoreSource, str]:
    """The store of the base model, and the folder there."""
    id, sources = config.model.model_id, make_sources(config)
    stores = {name: one for name, one in sources.items() if isinstance(one, StoreSource)}
    for store in stores.values():
        if id.startswith(store.prefix):
            return store, id.removeprefix(store.prefix)
    if "://" not in id and config.model.source in stores:
        return stores[config.model.source], id
    raise ModelError(
        f"{id} is in no store of this server; it has {', '.join(stores)}",
        field="source" if "://" not in id else "model_id",
        hint="--adapter-hosts adds https, and --adapter-schemes others",
    )
