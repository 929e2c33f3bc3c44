"""Saved adapters, a fake hub and an S3 server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.adapters.fake_hub import FakeHub, Repo
from tests.lora import tiny

if TYPE_CHECKING:
    from tests.adapters.fake_s3 import FakeS3

AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[FakeS3]:
    pytest.importorskip("boto3")
    pytest.importorskip("moto.server")
    from tests.adapters.fake_s3 import FakeS3

    with pytest.MonkeyPatch.context() as patch:
        for name, value in AWS.items():
            patch.setenv(name, value)
        server = FakeS3()
        server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(saved: Path, s3_server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    """The adapters `team/a` and `team/a-b`, and the server's credentials in the environment."""
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    s3_server.reset()
    s3_server.put_folder("team/a", saved / "a")
    s3_server.put_folder("team/a-b", saved / "b")
    s3_server.put("team/a/README.md", b"text")
    return s3_server
