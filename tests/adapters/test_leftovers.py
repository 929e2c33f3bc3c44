"""Unfinished files of killed processes are removed at the start, those of running ones are not."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from engine.adapters.leftovers import remove_leftovers

REPOSITORY = "models--org--a"
KINDS = ("hub", "tenant", "download", "conversion")


def unfinished(cache: Path, kind: str, name: str) -> tuple[Path, Path]:
    """An unfinished file or folder, and what its process locks."""
    if kind == "download":
        path = cache / "lorax-downloads" / f"{name}.tmp"
        path.mkdir(parents=True)
        (path / "adapter_model.safetensors").touch()
        return path, path
    if kind == "conversion":
        path = lock = cache / "lorax-converted" / f"{name}.tmp"
    else:
        hub = cache if kind == "hub" else cache / "lorax-tenants/0123"
        path = hub / REPOSITORY / "blobs" / f"{name}.0123abcd.incomplete"
        lock = hub / ".locks" / REPOSITORY / f"{name}.lock"
    for one in (path, lock):
        one.parent.mkdir(parents=True, exist_ok=True)
        one.touch()
    return path, lock


def test_only_what_nobody_holds_is_removed(tmp_path: Path) -> None:
    dead = [unfinished(tmp_path, kind, "dead")[0] for kind in KINDS]
    alive = [unfinished(tmp_path, kind, "alive") for kind in KINDS]
    whole = tmp_path / REPOSITORY / "blobs" / "whole"
    whole.touch()
    held = []
    for _, lock in alive:
        held.append(os.open(lock, os.O_RDONLY))
        fcntl.flock(held[-1], fcntl.LOCK_EX)
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path in dead)
    assert all(path.exists() for path, _ in alive) and whole.exists()
    for fd in held:
        os.close(fd)
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path, _ in alive) and whole.exists()


def test_a_folder_without_a_cache(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "none")
    assert not list(tmp_path.iterdir())
