"""Where base models come from: the embedded demo, a local folder, the hub, a store. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from engine.config import ModelConfig
from engine.errors import ModelError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).resolve().parent / "demo"
MODELS = "lorax-models"  # base models of stores, in the folder of downloads
TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
WHOLE_NAMES = ("model.safetensors", "pytorch_model.bin")  # of weights, in the order of preference


def cache_folder(configured: str | None = None) -> Path:
    """The folder of downloads: `--huggingface-hub-cache`, or that of huggingface_hub."""
    from huggingface_hub import constants

    return Path(configured or constants.HF_HUB_CACHE).expanduser()


def folder_of(config: ModelConfig, weights: bool = True) -> Path:
    """The folder with config, tokenizer and (if wanted) weights of `--model-id`, downloaded if needed.

    A store's files must have been downloaded before (`engine.adapters.base_model`).
    Raises ModelError that says what is missing: the folder, the repository, the permission, the network.
    """
    if config.model_id == DEMO:
        return DEMO_FOLDER / "base"
    if is_stored(config):
        return _stored(config, weights)
    local = Path(config.model_id).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or config.model_id.startswith(".") or config.source == "local":
        raise ModelError(f"there is no folder {config.model_id}", field="model_id")
    repository, _, revision = config.model_id.partition("@")
    if revision and config.revision:
        raise ModelError("give the revision in --model-id or in --revision", field="revision")
    return _download(config, repository, revision or config.revision, weights)


def is_stored(config: ModelConfig) -> bool:
    """Whether the base model comes from a store, such as S3."""
    return "://" in config.model_id or config.source not in ("hub", "local")


def stored_link(config: ModelConfig, weights: bool) -> Path:
    """The link to the files of a store's base model, with or without weights."""
    name = "\n".join((config.source, config.model_id, "weights" if weights else "tokenizer"))
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder(config.huggingface_hub_cache) / MODELS / f"{digest}.model"


def _stored(config: ModelConfig, weights: bool) -> Path:
    for whole in (True,) if weights else (True, False):
        if (link := stored_link(config, whole)).is_dir():
            return link.resolve()
    raise ModelError(
        f"{config.model_id} has not been downloaded",
        field="model_id",
        hint="lorax launch and lorax generate download it",
    )


def tokenizer_json(folder: Path) -> str:
    """The text of a model's tokenizer.json, or what it would be. Raises ModelError. It may import transformers."""
    try:
        return (folder / "tokenizer.json").read_text()
    except OSError:
        from transformers import AutoTokenizer
    try:
        loaded = AutoTokenizer.from_pretrained(folder)
        return str(loaded.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder} has no tokenizer that grammars can use: {error}",
            field="model_id",
            hint="add a tokenizer.json",
        ) from None


def _download(config: ModelConfig, repository: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def download(*weight_files: str) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                token=config.hub_token,
                cache_dir=config.huggingface_hub_cache,
                allow_patterns=[*TOKENIZER_FILES, *weight_files],
            )
        )

    try:
        if not weights:
            return download()
        folder = download("*.safetensors")
        # Many repositories hold the same weights twice, as safetensors and as .bin.
        return folder if any(folder.glob("*.safetensors")) else download("pytorch_model*.bin")
    except HFValidationError as error:
        raise ModelError(
            f"{repository!r} is neither a folder nor a hub id: {error}", field="model_id"
        ) from None
    except GatedRepoError:
        raise ModelError(
            f"access to {repository} is restricted", field="model_id", hint="set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{repository} has no revision {revision!r}", field="revision") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"there is no folder and no hub model {repository!r}",
            field="model_id",
            hint="a private model needs HF_TOKEN",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(f"cannot download {repository}: {error}", field="model_id") from None
