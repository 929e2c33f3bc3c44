"""A download that is killed in the middle of a file, from every source over a network: the next one is right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.halt import PATIENCE_S
from tests.adapters.stores import STORES, Store, contents, store

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(params=STORES)
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with store(request.param, request.getfixturevalue, monkeypatch) as found:
        yield found


def pull(served: Store, cache: Path) -> subprocess.Popen[bytes]:
    name = served.prefix + served.id
    command = [sys.executable, "-m", "lorax_cli", "adapters", "pull", name, "--json"]
    command += [*served.flags, f"--huggingface-hub-cache={cache}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def unfinished(cache: Path) -> set[Path]:
    return {path for path in cache.rglob("*") if path.suffix in (".tmp", ".incomplete")}


def finished(cache: Path) -> list[bytes]:
    """The contents of every file that is not in a temporary place."""
    left = unfinished(cache)
    files = [path for path in cache.rglob("*") if path.is_file() and path not in left]
    return [path.read_bytes() for path in files if left.isdisjoint(path.parents)]


def test_killed_in_the_middle_of_a_file(served: Store, saved: Path, tmp_path: Path) -> None:
    """Nothing half-written has a final name, and the next download is exact and removes what was left."""
    files = contents(saved / "a")
    served.put(files)
    served.halt.where = WEIGHTS
    killed = pull(served, tmp_path)
    assert served.halt.reached.wait(PATIENCE_S) and killed.poll() is None
    killed.kill()
    killed.communicate()
    served.halt.release()
    assert unfinished(tmp_path)
    longest = max(map(len, finished(tmp_path)), default=0)
    assert longest < len(files[WEIGHTS]) // 2, "a part of the weights has a final name"
    (row,) = json.loads(pull(served, tmp_path).communicate()[0])
    assert row["ok"], row
    for name in ("adapter_config.json", WEIGHTS):
        assert (Path(row["folder"]) / name).read_bytes() == files[name]
    assert files[WEIGHTS] in finished(tmp_path) and not unfinished(tmp_path)
