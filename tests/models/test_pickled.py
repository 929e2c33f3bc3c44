"""Base models saved as `pytorch_model.bin`, whole and sharded, and what an index may name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine import checkpoint
from engine.config import ModelConfig
from engine.errors import ModelError
from engine.models import spec_from
from engine.models.decoder import Decoder
from engine.models.weights import load, weight_files
from tests.engine.harness import Harness, config_of, request
from tests.tiny import make_model

PROMPT = list(range(2, 40))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_model("llama", folder)
    return folder


def pickled(base: Path, folder: Path, shards: int = 1) -> Path:
    """The same model as `.bin`."""
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    tensors = load_file(base / "model.safetensors")
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def scored(folder: Path, cache: Path) -> tuple[Any, Any]:
    """Tokens, and log-probabilities of the prompt."""
    config = config_of(folder, max_batch_prefill_tokens=64)
    object.__setattr__(config.model, "huggingface_hub_cache", str(cache))
    harness = Harness(config)
    try:
        outcome = harness.run([request("r", PROMPT, None, 8, prompt_logprobs=True)])["r"]
        return outcome.tokens, outcome.prompt_logprobs
    finally:
        harness.close()


@pytest.mark.parametrize("shards", [1, 2])
def test_the_same_answers_as_of_safetensors(shards: int, base: Path, tmp_path: Path) -> None:
    folder = pickled(base, tmp_path / "model", shards)
    assert scored(folder, tmp_path / "cache") == scored(base, tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "lorax-converted-models").iterdir())) == shards


def test_safetensors_come_first(base: Path, tmp_path: Path) -> None:
    folder = pickled(base, tmp_path / "model", shards=2)
    assert weight_files(folder)[1] and len(weight_files(folder)[0]) == 2
    shutil.copy(base / "model.safetensors", folder)
    assert weight_files(folder) == ([folder / "model.safetensors"], False)
    for path in folder.glob("*model*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        weight_files(folder)


def loaded(folder: Path, cache: Path) -> Decoder:
    model = Decoder(spec_from(folder), torch.float32, torch.device("cpu"))
    load(model, folder, cache)
    return model


def test_what_is_more_than_tensors(base: Path, tmp_path: Path) -> None:
    folder = pickled(base, tmp_path / "model")
    torch.save({"a": os.system}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin holds more than tensors") as caught:
        loaded(folder, tmp_path / "cache")
    assert "save_pretrained" in (caught.value.hint or "")


def test_what_an_index_names(base: Path, tmp_path: Path) -> None:
    """Files of the model's folder, or of the cache that its links lead to."""
    folder, cache = tmp_path / "model", tmp_path / "cache"
    folder.mkdir()
    (cache / "blobs").mkdir(parents=True)
    shutil.copy(base / "config.json", folder)
    shutil.copy(base / "model.safetensors", cache / "blobs" / "x")
    shutil.copy(base / "model.safetensors", tmp_path / "outside.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    names = load_file(base / "model.safetensors").keys()
    index = folder / "model.safetensors.index.json"

    def name(file: str) -> None:
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))

    (folder / "one.safetensors").symlink_to(cache / "blobs" / "x")
    name("one.safetensors")
    assert loaded(folder, cache)
    (folder / "two.safetensors").symlink_to(tmp_path / "outside.safetensors")
    for file, words in (
        ("two.safetensors", "outside the model's folder"),
        ("../outside.safetensors", "outside the model's folder"),
        (str(tmp_path / "outside.safetensors"), "outside the model's folder"),
        ("none.safetensors", "does not exist"),
        ("pipe.safetensors", "not a regular file"),
        ("", "not a regular file"),
        ("n\0", "null"),
    ):
        name(file)
        with pytest.raises(ModelError, match=words):
            loaded(folder, cache)
    for text in ("[]", "{", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(ModelError, match="not an index"):
            loaded(folder, cache)
    index.unlink()
    os.mkfifo(index)
    with pytest.raises(ModelError, match="cannot read"):
        loaded(folder, cache)


@pytest.mark.parametrize(
    ("files", "asked"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["*.safetensors"]),
        (["pytorch_model.bin"], ["*.safetensors", "pytorch_model*.bin"]),
    ],
)
def test_downloads(
    files: list[str], asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.bin` files only of repositories that have no others."""
    seen: list[str] = []

    def download(repository: str, **given: Any) -> str:
        pattern = given["allow_patterns"][-1]
        seen.append(pattern)
        for name in files:
            if Path(name).match(pattern):
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert checkpoint.folder_of(ModelConfig(model_id="org/model")) == tmp_path
    assert seen == asked
    seen.clear()
    checkpoint.folder_of(ModelConfig(model_id="org/model"), weights=False)
    assert seen == ["*.txt"]
