"""Base models from stores: the same logits as from a folder, downloaded once, whole after a kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from engine.adapters.base_model import fetch_base_model
from engine.checkpoint import MODELS, folder_of
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.settings import resolve
from tests.adapters.halt import PATIENCE_S
from tests.adapters.stores import Store, contents, store
from tests.models.test_pickled import pickled, scored
from tests.tiny import make_model

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_model("llama", folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def want(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return scored(base, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    kind = getattr(request, "param", "s3")
    with store(kind, request.getfixturevalue, monkeypatch) as found:
        yield found


def config(served: Store, cache: Path, **given: object) -> EngineConfig:
    """As a server with the store's flags."""
    flags: dict[str, object] = {}
    for flag, value in zip(served.flags[::2], served.flags[1::2], strict=True):
        is_list = flag in ("--adapter-hosts", "--adapter-schemes")
        flags[flag[2:].replace("-", "_")] = [value] if is_list else value
    flags |= {"model_id": served.prefix + served.id, "huggingface_hub_cache": str(cache)}
    return resolve(flags | given, environment={})


def sharded(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = {
        key: f"model-0000{number % 2 + 1}-of-00002.safetensors"
        for number, key in enumerate(tensors)
    }
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, folder / name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.mark.parametrize(
    ("served", "layout"),
    [("s3", "whole"), ("s3", "pickled"), ("https", "sharded"), ("webhdfs", "whole")],
    indirect=["served"],
)
def test_the_logits_are_those_of_the_folder(
    served: Store, layout: str, base: Path, want: tuple[Any, Any], tmp_path: Path
) -> None:
    """Downloaded once. Only files of a model are: no README, and no .bin beside safetensors."""
    folder = base
    if layout == "pickled":
        folder = pickled(base, tmp_path / "model")
    elif layout == "sharded":
        folder = sharded(base, tmp_path / "model")
    extra = {"README.md": b"x", "sub/model.safetensors": b"x"}
    if layout != "pickled":
        extra["pytorch_model.bin"] = b"x"
    served.put(contents(folder) | extra)
    given = config(served, tmp_path / "cache")
    for _ in range(2):
        fetch_base_model(given)
        found = folder_of(given.model)
    assert {path.name: path.read_bytes() for path in found.iterdir()} == contents(folder)
    assert scored(found, tmp_path / "cache") == want
    weights = [name for name in contents(folder) if name.endswith((".safetensors", ".bin"))]
    assert weights and all(served.downloads(f"/{name}") == 1 for name in weights)
    assert not served.downloads("README")


def test_a_tokenizer_alone(served: Store, base: Path, tmp_path: Path) -> None:
    """Commands that need no weights download none, and what has weights serves them too."""
    served.put(contents(base))
    given = config(served, tmp_path)
    fetch_base_model(given, weights=False)
    found = folder_of(given.model, weights=False)
    assert {path.name for path in found.iterdir()} == set(contents(base)) - {WEIGHTS}
    with pytest.raises(ModelError, match="has not been downloaded"):
        folder_of(given.model)
    fetch_base_model(given)
    assert folder_of(given.model, weights=False) == folder_of(given.model) != found
    assert served.downloads(WEIGHTS) == 1


def test_another_version_and_a_store_that_is_down(
    served: Store,
    base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    impatient = {"s3": served.source(tmp_path / "adapters")}
    monkeypatch.setattr("engine.adapters.base_model.make_sources", lambda config: impatient)
    given = config(served, tmp_path / "cache", source="s3", model_id=served.id)
    served.put(contents(base))
    fetch_base_model(given)
    first = folder_of(given.model)
    served.put(contents(base) | {"tokenizer.json": b"[]"})
    fetch_base_model(given)
    second = folder_of(given.model)
    assert (
        (second / "tokenizer.json").read_bytes() == b"[]" != (first / "tokenizer.json").read_bytes()
    )
    served.fail(403)
    with pytest.raises(ModelError, match="credentials may not read"):
        fetch_base_model(given)
    served.fail(503)
    fetch_base_model(given)
    assert folder_of(given.model) == second and "using the downloaded copy" in caplog.text
    with pytest.raises(ModelError, match="SlowDown"):
        fetch_base_model(config(served, tmp_path / "other"))


PROGRAM = """
import sys
from engine.adapters.base_model import fetch_base_model
from engine.settings import resolve
names = ("model_id", "huggingface_hub_cache", "s3_endpoint_url")
fetch_base_model(resolve(dict(zip(names, sys.argv[1:])), environment={}))
"""


def test_killed_in_the_middle_of_a_file(served: Store, base: Path, tmp_path: Path) -> None:
    """Nothing is there until everything is, and what was left goes."""
    served.put(contents(base))
    given = config(served, tmp_path)
    served.halt.where = WEIGHTS
    arguments = [given.model.model_id, str(tmp_path), served.flags[1]]
    killed = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT)
    assert served.halt.reached.wait(PATIENCE_S) and killed.poll() is None
    killed.kill()
    killed.wait()
    served.halt.release()
    with pytest.raises(ModelError, match="has not been downloaded"):
        folder_of(given.model)
    assert len(list((tmp_path / MODELS).glob("*.tmp"))) == 1
    fetch_base_model(given)
    assert contents(folder_of(given.model)) == contents(base)
    assert not list((tmp_path / MODELS).glob("*.tmp"))


def test_refusals(served: Store, base: Path, tmp_path: Path) -> None:
    """Each names its field or remedy; hub ids and folders are not touched."""
    cases: list[tuple[dict[str, object], str]] = [
        ({"revision": "main"}, "only models of the hub"),
        ({"model_id": "gs://x/y"}, "gs://x/y is in no store of this server; it has s3"),
        ({"model_id": "x/y", "source": "pbase"}, "is in no store"),
        ({"model_id": "s3://none-such/x"}, "there is no bucket"),
        ({"model_id": "s3://loras/team/a"}, "there is no config.json in s3://loras/team/a"),
    ]
    for given, words in cases:
        with pytest.raises(ModelError, match=words) as caught:
            fetch_base_model(config(served, tmp_path, **given))
        assert caught.value.field
    served.put({"config.json": b"{}"})
    with pytest.raises(ModelError, match="has neither model.safetensors nor"):
        fetch_base_model(config(served, tmp_path))
    fetch_base_model(config(served, tmp_path, model_id="org/none"))
    assert not os.listdir(tmp_path)
    with pytest.raises(ModelError, match="there is no folder"):
        folder_of(config(served, tmp_path, model_id="org/none", source="local").model)
