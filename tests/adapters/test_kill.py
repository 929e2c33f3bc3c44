"""A download that is killed in the middle of a file, from every source over a network: the next one is right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.conftest import contents
from tests.adapters.fake_hdfs import FakeHdfs
from tests.adapters.fake_pbase import FakeApi
from tests.adapters.fake_web import WebServer
from tests.adapters.halt import PATIENCE_S, Halt

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "adapter_model.safetensors"
SOURCES = ["hub", "s3", "pbase", "https", "webhdfs"]


@dataclass
class Served:
    """The adapter `a` at one source."""

    name: str
    halt: Halt
    flags: list[str] = field(default_factory=list)


def at_hub(get: Any, saved: Path, patch: pytest.MonkeyPatch) -> Iterator[Served]:
    hub = get("hub")
    patch.setenv("HF_ENDPOINT", hub.url)
    yield Served("org/public", hub.halt)


def at_s3(get: Any, saved: Path, patch: pytest.MonkeyPatch) -> Iterator[Served]:
    s3 = get("s3")
    yield Served("s3://loras/team/a", s3.halt, ["--s3-endpoint-url", s3.url])


def at_pbase(get: Any, saved: Path, patch: pytest.MonkeyPatch) -> Iterator[Served]:
    s3, api = get("s3"), FakeApi()
    api.has("/v2/repos/pirat/version/3", status="completed", adapterPath="s3://loras/team/a")
    flags = ["--default-adapter-source=pbase", f"--predibase-gateway-endpoint={api.url}"]
    flags += ["--predibase-api-token=alice", f"--s3-endpoint-url={s3.url}"]
    yield Served("pirat/3", s3.halt, flags)
    api.stop()


def at_https(get: Any, saved: Path, patch: pytest.MonkeyPatch) -> Iterator[Served]:
    server = WebServer(get("tmp_path_factory").mktemp("tls"))
    server.put("team/a", contents(saved / "a"))
    patch.setenv("SSL_CERT_FILE", str(server.certificate))
    yield Served(f"https://{server.host}/team/a", server.halt, ["--adapter-hosts", server.host])
    server.stop()


def at_webhdfs(get: Any, saved: Path, patch: pytest.MonkeyPatch) -> Iterator[Served]:
    server = FakeHdfs()
    server.files |= {f"/team/a/{name}": data for name, data in contents(saved / "a").items()}
    patch.setenv("FSSPEC_WEBHDFS", json.dumps({"host": "127.0.0.1", "port": server.port}))
    yield Served("webhdfs:///team/a", server.halt, ["--adapter-schemes", "webhdfs"])
    server.stop()


@pytest.fixture(params=SOURCES)
def served(
    request: pytest.FixtureRequest, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    yield from globals()[f"at_{request.param}"](request.getfixturevalue, saved, monkeypatch)


def pull(served: Served, cache: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lorax_cli", "adapters", "pull", served.name, "--json"]
    command += [*served.flags, f"--huggingface-hub-cache={cache}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def unfinished(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.suffix in (".tmp", ".incomplete")]


def finished(cache: Path) -> list[bytes]:
    """The contents of every file that is not in a temporary place."""
    return [
        path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file()
        and not any(one in path.parents or one == path for one in unfinished(cache))
    ]


def test_killed_in_the_middle_of_a_file(served: Served, saved: Path, tmp_path: Path) -> None:
    """Nothing half-written has a final name, and the next download is exact and removes what was left."""
    weights = (saved / "a" / WEIGHTS).read_bytes()
    served.halt.where = WEIGHTS
    killed = pull(served, tmp_path)
    assert served.halt.reached.wait(PATIENCE_S) and killed.poll() is None
    killed.kill()
    killed.communicate()
    served.halt.release()
    assert unfinished(tmp_path)
    longest = max(map(len, finished(tmp_path)), default=0)
    assert longest < len(weights) // 2, "a part of the weights has a final name"
    again = pull(served, tmp_path)
    (row,) = json.loads(again.communicate()[0])
    assert row["ok"], row
    for name, data in contents(saved / "a").items():
        if name != "README.md":
            assert (Path(row["folder"]) / name).read_bytes() == data
    assert weights in finished(tmp_path) and not unfinished(tmp_path)
