"""Saved adapters and a fake hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.fake_hub import FakeHub, Repo
from tests.lora import tiny

NAMES = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six adapters, equal in size and different in values, and `large`, of three times the rank."""
    root = tmp_path_factory.mktemp("saved")
    model = tiny.llama()
    for seed, name in enumerate(NAMES):
        tiny.save(tiny.adapt(model, seed, r=4, target_modules=["q_proj", "up_proj"]), root / name)
    tiny.save(tiny.adapt(model, 9, r=12, target_modules=["q_proj", "up_proj"]), root / "large")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """What a repository of this adapter holds, and a file that nobody should ask for."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names} | {"README.md": os.urandom(10)}


@pytest.fixture
def hub(saved: Path) -> Iterator[FakeHub]:
    """`org/public`, `org/private` (alice and the operator), `org/gated` (alice), `org/empty`."""
    with FakeHub() as server:
        for name, repo in (
            ("public", Repo()),
            ("private", Repo(private=True, readers={"alice", "operator"})),
            ("gated", Repo(gated=True, readers={"alice"})),
        ):
            repo.commit(contents(saved / "a"))
            server.repos[f"org/{name}"] = repo
        server.repos["org/empty"] = empty = Repo()
        empty.commit({"README.md": b""})
        yield server
