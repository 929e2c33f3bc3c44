"""Files that are not what they seem: pipes, links, devices, and files that change while they are asked for.

Each function changes a good adapter's folder. `LIVE` are those that go on changing while the adapter is asked for: a
thread calls them again and again.
"""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tools.attack.configs import CONFIG
from tools.attack.pickles import SAFE, Kind

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{:064x}\nsize {}\n"


def either(folder: Path, chosen: random.Random) -> Path:
    """The configuration or the weights, out of the way."""
    path = folder / chosen.choice([CONFIG, SAFE])
    path.unlink()
    return path


def fifo(folder: Path, chosen: random.Random) -> None:
    os.mkfifo(either(folder, chosen))


def link_outside(folder: Path, chosen: random.Random) -> None:
    either(folder, chosen).symlink_to(
        chosen.choice(["/etc/hostname", "../../../model/config.json"])
    )


def link_loop(folder: Path, chosen: random.Random) -> None:
    path = either(folder, chosen)
    other = folder / "other"
    path.symlink_to(other)
    other.symlink_to(path)


def folder_as_file(folder: Path, chosen: random.Random) -> None:
    either(folder, chosen).mkdir()


def device(folder: Path, chosen: random.Random) -> None:
    """Endless zeros, or noise, behind a link."""
    either(folder, chosen).symlink_to(chosen.choice(["/dev/zero", "/dev/urandom", "/dev/stdin"]))


def unix_socket(folder: Path, chosen: random.Random) -> None:
    """A socket where a file is meant; its path is short whatever the folder's is."""
    path = either(folder, chosen)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{descriptor}/{path.name}")
    finally:
        os.close(descriptor)


def pointer(folder: Path, chosen: random.Random) -> None:
    """What git leaves where Git LFS is not installed."""
    (folder / SAFE).write_text(POINTER.format(chosen.getrandbits(256), chosen.randrange(1 << 30)))


def unreadable(folder: Path, chosen: random.Random) -> None:
    """No permission to read; for root, who has it, an empty file."""
    path = either(folder, chosen)
    path.write_bytes(b"")
    path.chmod(0)


def sharded(folder: Path, chosen: random.Random) -> None:
    """An index of parts, as whole models are saved."""
    (folder / SAFE).rename(folder / "adapter_model-00001-of-00002.safetensors")
    parts = {f"t{i}": "../" * chosen.randint(0, 9) + "etc/passwd" for i in range(100)}
    (folder / f"{SAFE}.index.json").write_text(json.dumps({"weight_map": parts}))


def sparse(folder: Path, chosen: random.Random) -> None:
    """Up to a terabyte that takes no room on disk."""
    path = folder / chosen.choice([CONFIG, SAFE, "adapter_model.bin"])
    if path.name == "adapter_model.bin":
        (folder / SAFE).unlink()
    with path.open("wb") as file:
        file.truncate(1 << chosen.randint(31, 40))


def missing(folder: Path, chosen: random.Random) -> None:
    either(folder, chosen)


def swapped(folder: Path, chosen: random.Random) -> None:
    """Changes places with a pipe as long as it is asked for; see `swap`."""
    broken = json.loads((folder / CONFIG).read_text()) | {"r": 3}
    (folder / CONFIG).write_text(json.dumps(broken))
    (folder / "spare").write_bytes((folder / SAFE).read_bytes())
    os.mkfifo(folder / "pipe")


def swap(folder: Path) -> None:
    """The weights and then the configuration are a pipe for a moment, then a file again."""
    for name in (SAFE, CONFIG):
        with suppress(OSError):
            kept = folder / f"{name}.kept"
            os.replace(folder / name, kept)
            os.link(folder / "pipe", folder / name)
            os.replace(kept, folder / name)


def growing(folder: Path, chosen: random.Random) -> None:
    """Grows, and shrinks again, as long as it is asked for; see `grow`."""
    broken = json.loads((folder / CONFIG).read_text()) | {"r": 3}
    (folder / CONFIG).write_text(json.dumps(broken))


def grow(folder: Path) -> None:
    path = folder / SAFE
    with suppress(OSError):
        size = path.stat().st_size
        os.truncate(path, size + (1 << 16) if size < 1 << 26 else 1000)


KINDS: dict[str, Kind] = {
    "file is a pipe": fifo,
    "file is a link outside": link_outside,
    "file is a link loop": link_loop,
    "file is a folder": folder_as_file,
    "file is a device": device,
    "file is a socket": unix_socket,
    "file is a Git LFS pointer": pointer,
    "file is unreadable": unreadable,
    "file is an index of parts": sharded,
    "file is sparse, of a terabyte": sparse,
    "file is missing": missing,
    "file swapped for a pipe": swapped,
    "file grows and shrinks": growing,
}

LIVE: dict[str, Callable[[Path], None]] = {
    "file swapped for a pipe": swap,
    "file grows and shrinks": grow,
}
