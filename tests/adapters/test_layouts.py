"""Which files are an adapter: shards, Ludwig's folders, pointers of Git LFS, other tools' files; from disk and hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from engine.adapters.exchange import Exchange
from engine.adapters.hub import HubSource
from engine.adapters.ref import AdapterRef
from engine.adapters.sources import LocalSource, Source
from engine.adapters.tiers import HostRegion
from engine.config import AdapterConfig, EngineConfig, ModelConfig
from engine.errors import (
    AdapterError,
    AdapterForbidden,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterTooLarge,
)
from engine.lora import report
from tests.adapters.fake_hub import FakeHub, Repo
from tests.lora import tiny

CONFIG, WEIGHTS, INDEX = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
)
LUDWIG = "ludwig/model/model_weights"
LAYOUT = tiny.llama_layout("bfloat16")


def shard(folder: Path, number: int = 3) -> Path:
    """Cuts the weights into shards, as huggingface_hub's split_torch_state_dict_into_shards names them."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    listed: dict[str, str] = {}
    for part in range(number):
        name = f"adapter_model-{part + 1:05}-of-{number:05}.safetensors"
        keys = sorted(tensors)[part::number]
        save_file({key: tensors[key] for key in keys}, folder / name)
        listed |= dict.fromkeys(keys, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """`plain`, `sharded`, Ludwig's `ludwig` and `saved` (by LudwigModel.save), and `both`: Ludwig's, sharded."""
    root = tmp_path / "root"
    for name in ("plain", "sharded", LUDWIG, "saved/model_weights", "both/model/model_weights"):
        shutil.copytree(saved / "a", root / name)
    shard(root / "sharded")
    shard(root / "both/model/model_weights", 2)
    return root


def digest(source: Source, name: str, token: str | None = None) -> str | None:
    version = source.resolve(AdapterRef.parse(name), token)
    with source.fetch(version, token, lambda done, total: None) as files:
        found = report.inspect(files.config, files.weights, LAYOUT, shards=files.shards)
    assert not found.errors
    return found.digest


@pytest.mark.parametrize("name", ["sharded", "ludwig", "saved", "both"])
def test_a_local_layout_is_the_same_adapter(name: str, root: Path) -> None:
    source = LocalSource([root])
    assert digest(source, name) == digest(source, "plain")


def upload(hub: FakeHub, folder: Path, name: str) -> str:
    repo = hub.repos.setdefault(name, Repo())
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    return repo.commit(files | {"README.md": b"x", "other.safetensors": b"x"})


@pytest.mark.parametrize("name", ["sharded", "ludwig", "saved", "both"])
def test_a_hub_layout_is_the_same_adapter(
    name: str, root: Path, hub: FakeHub, tmp_path: Path
) -> None:
    """Only its files are downloaded, and what was downloaded serves when the hub is away."""
    commit = upload(hub, root / name, f"org/{name}")
    source = HubSource(None, tmp_path / "cache", endpoint=hub.url, attempts=1)
    want = digest(LocalSource([root]), "plain")
    assert source.resolve(AdapterRef.parse(f"org/{name}"), None).revision == commit
    assert digest(source, f"org/{name}") == want
    assert not hub.count("README") and not hub.count("other.safetensors")
    hub.stop()
    version = source.resolve(AdapterRef.parse(f"org/{name}"), None)
    assert version.revision == commit
    snapshot = next((tmp_path / "cache").glob("models--org*/snapshots/*"))
    if name == "sharded":
        (snapshot / "adapter_model-00002-of-00003.safetensors").unlink()
        with pytest.raises(AdapterLoadFailed):
            source.resolve(AdapterRef.parse(f"org/{name}"), None)


def test_the_limit_of_downloads_is_for_all_shards(root: Path, hub: FakeHub, tmp_path: Path) -> None:
    shutil.copytree(root / "plain", root / "sharded" / "checkpoint-1")  # not counted
    upload(hub, root / "sharded", "org/sharded")
    sizes = [path.stat().st_size for path in (root / "sharded").glob("*.safetensors")]
    for limit, fits in ((sum(sizes) + 1, True), (sum(sizes) - 1, False)):
        source = HubSource(None, tmp_path / "c", endpoint=hub.url, max_file_bytes=limit, attempts=1)
        if fits:
            assert digest(source, "org/sharded")
        else:
            with pytest.raises(AdapterTooLarge):
                digest(source, "org/sharded")


@pytest.mark.parametrize("file", [CONFIG, INDEX, "adapter_model-00002-of-00003.safetensors"])
def test_the_revision_is_of_all_files(file: str, root: Path) -> None:
    source = LocalSource([root])
    version = source.resolve(AdapterRef.parse("sharded"), None)
    path = root / "sharded" / file
    path.write_bytes(path.read_bytes() + b" ")
    assert source.resolve(AdapterRef.parse("sharded"), None).revision != version.revision
    with pytest.raises(AdapterLoadFailed, match="sharded changed"):
        source.fetch(version, None, lambda done, total: None)


def edit(folder: Path, **shards: str) -> None:
    """Other names of files in the index."""
    index = json.loads((folder / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    renames = {names[int(number[1:])]: name for number, name in shards.items()}
    index["weight_map"] = {
        key: renames.get(name, name) for key, name in index["weight_map"].items()
    }
    (folder / INDEX).write_text(json.dumps(index))


def many(folder: Path) -> None:
    names = {str(number): f"{number}.safetensors" for number in range(33)}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


FIRST = "adapter_model-00001-of-00003.safetensors"
SECOND = "adapter_model-00002-of-00003.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], Any], type[AdapterError], str]] = {
    "outside": (lambda f: edit(f, _1="../plain/" + WEIGHTS), AdapterIncompatible, "not a safetensors file of"),
    "absolute": (lambda f: edit(f, _1=f"{f.parent}/plain/{WEIGHTS}"), AdapterIncompatible, "not a safetensors"),
    "forged": (lambda f: edit(f, _1="x\n\x1b[31mERROR.safetensors"), AdapterIncompatible, "not a safetensors"),
    "pickle": (lambda f: edit(f, _1="adapter_model.bin"), AdapterIncompatible, "not a safetensors"),
    "missing": (lambda f: (f / SECOND).unlink(), AdapterLoadFailed, "cannot read adapter_model-00002"),
    "link": (
        lambda f: (f / SECOND).unlink() or (f / SECOND).symlink_to("/etc/passwd"),
        AdapterForbidden,
        "sharded/adapter_model-00002",
    ),
    "many": (many, AdapterIncompatible, "names 33 files, the limit is 32"),
    "none": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), AdapterIncompatible, "names no file"),
    "nonsense": (lambda f: (f / INDEX).write_text("[1"), AdapterIncompatible, "is damaged"),
    "not listed": (lambda f: edit(f, _1=FIRST), AdapterIncompatible, "lacks"),
    "twice": (lambda f: shutil.copy(f / FIRST, f / SECOND), AdapterIncompatible, "two files"),
    "truncated": (lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-1]), AdapterLoadFailed, "incomplete"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
async def test_broken_shards(case: str, root: Path, tmp_path: Path) -> None:
    change, error, words = BROKEN[case]
    change(root / "sharded")
    async with exchange(root, tmp_path) as served:
        with pytest.raises(error) as caught:
            await served.acquire(AdapterRef.parse("sharded"))
        assert words in caught.value.message and caught.value.message.isprintable()
        assert str(tmp_path) not in str(caught.value) or case == "absolute"
        (await served.acquire(AdapterRef.parse("plain"))).release()


class exchange:
    """An exchange of local adapters."""

    def __init__(self, root: Path, cache: Path) -> None:
        model = ModelConfig(model_id="org/base", huggingface_hub_cache=str(cache / "cache"))
        config = AdapterConfig(
            adapter_root=(str(root),), adapter_source="local", default_adapter_source="local"
        )
        self.region = HostRegion.create(1 << 20)
        self.exchange = Exchange(EngineConfig(model, config), LAYOUT, self.region)

    async def __aenter__(self) -> Exchange:
        return self.exchange

    async def __aexit__(self, *given: object) -> None:
        await self.exchange.close()
        self.region.close()


async def test_sharded_and_ludwig_through_the_exchange(root: Path, tmp_path: Path) -> None:
    async with exchange(root, tmp_path) as served:
        leases = [
            await served.acquire(AdapterRef.parse(name))
            for name in ("plain", "sharded", "ludwig", "both")
        ]
        assert len({lease.image.digest for lease in leases}) == 1
        for lease in leases:
            lease.release()


async def test_a_refusal_does_not_outlive_the_file(root: Path, tmp_path: Path) -> None:
    """Half written, refused, then complete: served at the next request, without a wait."""
    whole = (root / "plain" / WEIGHTS).read_bytes()
    config = (root / "plain" / CONFIG).read_text()
    async with exchange(root, tmp_path) as served:
        for size in (0, 50, 2000, len(whole) - 1):
            (root / "plain" / WEIGHTS).write_bytes(whole[:size])
            with pytest.raises(AdapterLoadFailed, match="incomplete"):
                await served.acquire(AdapterRef.parse("plain"))
        (root / "plain" / WEIGHTS).write_bytes(whole)
        (root / "plain" / CONFIG).write_text(json.dumps(json.loads(config) | {"use_dora": True}))
        for _ in range(2):
            with pytest.raises(AdapterIncompatible, match="use_dora"):
                await served.acquire(AdapterRef.parse("plain"))
        (root / "plain" / CONFIG).write_text(config)
        (await served.acquire(AdapterRef.parse("plain"))).release()


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 123456\n"
)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin", CONFIG])
def test_a_pointer_of_git_lfs(name: str, root: Path) -> None:
    if name.endswith(".bin"):
        (root / "plain" / WEIGHTS).unlink()
    (root / "plain" / name).write_bytes(POINTER)
    with pytest.raises(AdapterIncompatible, match=f"{name} is a Git LFS pointer") as caught:
        digest(LocalSource([root]), "plain")
    assert "git lfs pull" in (caught.value.hint or "")


OTHERS = {
    "mlx": ([CONFIG, "adapters.safetensors"], "mlx-lm", "mlx_lm.fuse"),
    "whole": (["config.json", "model.safetensors", "tokenizer.json"], "whole model", "--model-id"),
    "whole, by Ludwig": (["model/model_weights/model.safetensors"], "whole model", "--model-id"),
    "whole shards": (["config.json", "model.safetensors.index.json"], "whole model", "--model-id"),
    "nothing": (["README.md"], "has no adapter_config.json", "save_pretrained"),
    "no weights": ([CONFIG], "has neither", "save_pretrained"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_the_files_are_instead(case: str, tmp_path: Path) -> None:
    names, words, remedy = OTHERS[case]
    for name in names:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text("{}")
    with pytest.raises(AdapterIncompatible) as caught:
        LocalSource([tmp_path]).resolve(AdapterRef.parse("x"), None)
    assert words in caught.value.message and remedy in (caught.value.hint or "")
    assert str(tmp_path) not in str(caught.value)


def test_adapters_in_subfolders_of_a_repository(root: Path, hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["org/two"] = repo = Repo()
    repo.commit({"sql/adapter_config.json": b"{}", "sql/adapter_model.safetensors": b""})
    source = HubSource(None, tmp_path / "cache", endpoint=hub.url, attempts=1)
    with pytest.raises(AdapterIncompatible, match="of its own") as caught:
        source.resolve(AdapterRef.parse("org/two"), None)
    assert "sql" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["~root/x", "~/x", "~nobody-of-this-name/x"])
def test_home_folders_are_not_looked_up(name: str, root: Path) -> None:
    """Equal answers for users that exist and users that do not."""
    with pytest.raises(AdapterNotFound):
        LocalSource([root]).resolve(AdapterRef.parse(name), None)
    shutil.copytree(root / "plain", root / name)
    assert digest(LocalSource([root]), name)


@pytest.mark.parametrize("status", [401, 403])
def test_a_deleted_adapter_is_not_found(
    status: int, root: Path, hub: FakeHub, tmp_path: Path
) -> None:
    """Also where the hub refuses everything."""
    hub.broken, hub.broken_status = 99, status
    source = HubSource(None, tmp_path / "cache", endpoint=hub.url, attempts=1)
    with pytest.raises(AdapterNotFound):
        source.resolve(AdapterRef.parse("plain"), None)
    assert not hub.requests
