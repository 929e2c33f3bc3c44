"""Files that strangers may have written."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from engine.errors import MAX_MESSAGE, AdapterIncompatible, from_wire
from engine.files import Changed, NotRegular, OpenFile, Outside


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "plain").write_bytes(b"0123456789" * 300_000)
    return folder


def test_what_is_read_is_what_was_opened(root: Path) -> None:
    contents = (root / "plain").read_bytes()
    with OpenFile(root / "plain", [root]) as file:
        os.replace(root / "plain", root / "elsewhere")
        (root / "plain").write_bytes(b"another")
        assert file.read() == contents and file.size == len(contents)
        assert file.sha256() == hashlib.sha256(contents).digest()
        piece = bytearray(7)
        file.read_into(piece, 12)
        assert bytes(piece) == contents[12:19]


@pytest.mark.parametrize("roots", [True, False])
def test_what_is_no_regular_file_is_refused_without_waiting(root: Path, roots: bool) -> None:
    os.mkfifo(root / "pipe")
    (root / "folder").mkdir()
    (root / "link").symlink_to(root / "pipe")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(root / "socket"))
        for name in ("pipe", "folder", "link"):
            with pytest.raises(NotRegular):
                OpenFile(root / name, [root] if roots else None)
        with pytest.raises(OSError):
            OpenFile(root / "socket")
    for name in ("/dev/zero", "/dev/tty", "/proc/self/fd/0/x", "none\0"):
        with pytest.raises(OSError):
            OpenFile(Path(name))


def test_links_are_judged_by_where_they_lead(root: Path, tmp_path: Path) -> None:
    """Links inside a cache or a volume are normal."""
    (tmp_path / "secret").write_text("secret")
    (root / "inside").symlink_to(root / "plain")
    (root / "outside").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to(tmp_path, target_is_directory=True)
    OpenFile(root / "inside", [root]).close()
    for name in ("outside", "up/secret", "../secret"):
        with pytest.raises(Outside):
            OpenFile(root / name, [root])
        OpenFile(root / name, [root, tmp_path]).close()


def test_where_the_system_does_not_tell_paths(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.files.DESCRIPTORS", tmp_path / "none")
    test_links_are_judged_by_where_they_lead(root, tmp_path)


def test_a_file_that_changes_is_noticed(root: Path) -> None:
    with OpenFile(root / "plain") as file:
        before = file.fingerprint
        with (root / "plain").open("r+b") as other:
            other.truncate(10)
        for read in (file.read, file.sha256, file.verify):
            with pytest.raises(Changed):
                read()
        assert file.fingerprint == before
    with OpenFile(root / "plain") as file:
        assert file.fingerprint != before
    file.close()


def test_nothing_is_left_open(root: Path) -> None:
    os.mkfifo(root / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("plain", "pipe", "none"):
        with pytest.raises(OSError):
            OpenFile(root / name, [root.parent / "other"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_messages_are_cut() -> None:
    """Names from files go into them, and they are kept, sent on and listed."""
    error = AdapterIncompatible("a" + "n" * 10**6 + "z", field="f" * 10**6, hint="h" * 10**6)
    again = from_wire(error.to_wire())
    for text in (again.message, again.field, again.hint):
        assert text is not None and len(text) <= MAX_MESSAGE and " ... " in text
    assert again.message[0] == "a" and again.message[-1] == "z"
