"""A `.bin` becomes the same tensors, once; what is more than tensors, or asks for more, is refused in the child."""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import pickle
import signal
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import AdapterIncompatible, AdapterLoadFailed, AdapterTooLarge
from engine.files import OpenFile
from engine.sandbox import CannotRun, Converter, Crashed, LimitReached, convert, parent
from engine.sandbox.call import Limits

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64, torch.bool, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def never_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is unpickled in this process."""

    def load(*given: Any, **fields: Any) -> Any:
        raise AssertionError("unpickled in the serving process")

    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr(pickle, "load", load)


@pytest.fixture
def converter(tmp_path: Path) -> Converter:
    return Converter(tmp_path / "cache")


def converted(converter: Converter, path: Path) -> dict[str, torch.Tensor]:
    with OpenFile(path) as file, converter.convert(file) as made:
        assert made.path.parent == converter._folder
        return load_file(made.path)


def refusal(converter: Converter, path: Path) -> AdapterIncompatible:
    with OpenFile(path) as file, pytest.raises(AdapterIncompatible) as caught:
        converter.convert(file)
    assert caught.value.message.startswith(path.name) and caught.value.hint
    assert not list(converter._folder.iterdir()), "nothing is left"
    return caught.value


def every_kind() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 2, (3, 16), generator=generator, dtype=torch.uint8)
    found = {str(dtype): noise.to(dtype) for dtype in DTYPES}
    plain = torch.randn(40, 50, generator=generator)
    found |= {
        "transposed": plain.t(),
        "strided": plain[::3, 1::7],
        "tied": plain,
        "tied again": plain,
        "view": plain[3],
        "expanded": torch.ones(3, 1).expand(3, 5),
        "empty": torch.ones(0, 4),
        "scalar": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "conjugate": torch.complex(plain, plain).conj(),
        "eight": torch.ones(1, 2, 1, 2, 1, 2, 1, 2),
    }
    return OrderedDict(found)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_same_tensors(legacy: bool, converter: Converter, tmp_path: Path) -> None:
    tensors = every_kind()
    if legacy:  # the old format has no names for what came after it
        for dtype in map(str, (*DTYPES[4:6], *DTYPES[12:15])):
            del tensors[dtype]
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
    found = converted(converter, tmp_path / "x.bin")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].resolve_conj().tolist() == tensor.resolve_conj().tolist(), name


def test_in_pieces(converter: Converter, tmp_path: Path) -> None:
    """What must be copied is copied piece by piece, also where its first dimension is one."""
    tensors = {
        "a": torch.arange(3 << 20).view(1536, 2048).t(),
        "b": torch.arange(4 << 20)[None, ::2],
    }
    torch.save(tensors, tmp_path / "x.bin")
    found = converted(converter, tmp_path / "x.bin")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def packed(path: Path, level: int = 9) -> None:
    """Compresses the records of a file of torch.save."""
    data = path.read_bytes()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=level) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))


def test_compressed_records(converter: Converter, tmp_path: Path) -> None:
    """They are read as torch.load reads them, not as they lie in the file."""
    tensors = {"a": torch.randint(0, 16, (1000, 10))}
    tensors["a"] += torch.randint(0, 1 << 40, (1000, 10))
    torch.save(tensors, tmp_path / "x.bin")
    packed(tmp_path / "x.bin")
    assert torch.equal(converted(converter, tmp_path / "x.bin")["a"], tensors["a"])


class Call:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *given: Any) -> None:
        self.call = function, given

    def __reduce__(self) -> Any:
        return self.call


def save(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def bomb(path: Path) -> None:
    torch.save({"a": torch.zeros(16 << 20)}, path)
    packed(path)
    assert path.stat().st_size < 1 << 20


def nested_key(path: Path) -> None:
    """A tuple of two tuples of two tuples...: its hash takes 2 ** 60 steps. Its pickle repeats by reference."""
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    with path.open("wb") as file:
        for part in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}):
            pickle.dump(part, file, protocol=2)
        text = pickle.dumps(nested, protocol=2)
        file.write(text[:2] + b"}" + text[2:-1] + b"Ns.")  # {nested: None}
        pickle.dump([], file, protocol=2)


POISON: dict[str, tuple[Callable[[Path], None], str]] = {
    "memory": (save({"a": Call(bytearray, 6 << 30)}), "MiB of memory"),
    "processor": (nested_key, "processor time"),
    "unpacks": (bomb, "unpacks to more than"),
    "expanded": (save({"a": torch.ones(1).expand(1 << 40)}), "unpacks to more than"),
    "tied often": (save(dict.fromkeys("abcdefghi", torch.ones(1 << 18))), "unpacks to more than"),
    "code": (save({"a": os.system}), "more than tensors"),
    "nonsense": (lambda path: path.write_bytes(b"nonsense"), "more than tensors"),
    "list": (save([torch.ones(1)]), "not a dictionary of tensors"),
    "text": (save({"a": "text"}), "not a dictionary of tensors"),
    "meta": (save({"a": torch.ones(2, 2, device="meta")}), "not a dictionary of tensors"),
    "sparse": (save({"a": torch.eye(3).to_sparse()}), "not a dictionary of tensors"),
    "nested": (save({"a": {"b": torch.ones(3)}}), "not a dictionary of tensors"),
    "no name": (save({1: torch.ones(3)}), "with names"),
    "half a pair": (save({"\ud800": torch.ones(3)}), "not valid text"),
    "metadata": (save({"__metadata__": torch.ones(3)}), "with names"),
    "long name": (save({"n" * 513: torch.ones(3)}), "513 characters; the limit is 512"),
    "many": (save(dict.fromkeys(map(str, range(65_537)), torch.ones(0))), "the limit is 65536"),
    "dimensions": (save({"a": torch.ones([1] * 9)}), "9 dimensions"),
    "complex128": (save({"a": torch.ones(3, dtype=torch.complex128)}), "torch.complex128"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["memory", "processor", "code"])
def test_refused(
    kind: str, converter: Converter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason; and asking again starts nothing."""
    make, words = POISON[kind]
    make(tmp_path / "x.bin")
    monkeypatch.setattr(convert, "_CPU_S", 1 if kind == "processor" else 10)
    first = refusal(converter, tmp_path / "x.bin")
    assert words in first.message
    monkeypatch.setattr(convert, "run", None)
    again = refusal(converter, tmp_path / "x.bin")
    assert again.message == first.message and again.hint == first.hint


def test_what_the_child_refuses(tmp_path: Path) -> None:
    """All that it finds itself, one after the other in one child."""
    kinds = POISON.keys() - {"memory", "processor"}  # limits end the child
    with contextlib.ExitStack() as stack:
        files = {}
        for kind in kinds:
            POISON[kind][0](tmp_path / kind)
            files[kind] = stack.enter_context((tmp_path / kind).open("rb")).fileno()
        limits = Limits(cpu_s=60, wall_s=600.0, memory_bytes=1 << 30)
        answers = parent.run("tests.sandbox.conversions", files, {}, limits)
    for kind in kinds:
        assert POISON[kind][1] in answers[kind].get("refused", ""), (kind, answers[kind])


def test_a_file_that_ends_early_is_not_refused_for_good(converter: Converter, plain: Path) -> None:
    """It is still being written: the next try may find all of it."""
    whole = plain.read_bytes()
    for part in (0.0, 0.5, 0.99):
        plain.write_bytes(whole[: int(part * len(whole))])
        with OpenFile(plain) as file, pytest.raises(AdapterLoadFailed, match="incomplete"):
            converter.convert(file)
    plain.write_bytes(whole)
    assert converted(converter, plain)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    torch.save({"a": torch.ones(3)}, tmp_path / "x.bin")
    return tmp_path / "x.bin"


def answers(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[Any]:
    """Instead of a child: this answer or error. Returns the calls."""
    calls: list[Any] = []

    def run(*given: Any) -> Any:
        calls.append(given)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(convert, "run", run)
    return calls


def test_refusals_are_forgotten_in_turn(
    converter: Converter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "MAX_REFUSED", 3)
    calls = answers(monkeypatch, {"refused": "is odd"})
    for number in (1, 2, 3, 4, 4, 3, 2, 1):
        (tmp_path / "x.bin").write_bytes(bytes([number]))
        refusal(converter, tmp_path / "x.bin")
    assert len(calls) == 5


FAILURES: list[tuple[Any, str]] = [
    (CannotRun("no processes"), "no processes"),
    (LimitReached("wall", "takes longer than 100 s"), "100 s"),
    (Crashed("died of SIGBUS", signal.SIGBUS), "SIGBUS"),
    ({"failed": "No space left on device"}, "No space left"),
]


def test_failures_of_the_machine_are_not_remembered(
    converter: Converter, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for answer, words in FAILURES:
        with monkeypatch.context() as patch, OpenFile(plain) as file:
            calls = answers(patch, answer)
            for _ in range(2):
                with pytest.raises(AdapterLoadFailed, match=words):
                    converter.convert(file)
            assert len(calls) == 2 and not list(converter._folder.iterdir())
    assert converted(converter, plain)["a"].tolist() == [1, 1, 1]


def test_what_the_child_wrote_is_not_believed(
    converter: Converter, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, {})
    assert "cannot be converted" in refusal(converter, plain).message


def test_once(converter: Converter, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By contents, for all threads and every later process; a damaged file is made anew."""
    calls: list[Any] = []
    monkeypatch.setattr(convert, "run", lambda *given: calls.append(given) or parent.run(*given))
    threads = [threading.Thread(target=converted, args=(converter, plain)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other = plain.with_name("other.bin")
    other.write_bytes(plain.read_bytes())
    converted(converter, other)
    converted(Converter(converter._folder.parent), plain)
    assert len(calls) == 1
    (made,) = converter._folder.iterdir()
    assert len(made.stem) == 64 and made.stat().st_mode == plain.stat().st_mode
    for damage in (lambda: os.truncate(made, made.stat().st_size - 1), made.unlink):
        damage()
        assert converted(converter, plain)["a"].tolist() == [1, 1, 1]
    assert len(calls) == 3


def test_leftovers(converter: Converter, plain: Path) -> None:
    """Those of a process that was killed go; what another is writing stays, and so does all else."""
    folder = converter._folder
    folder.mkdir(parents=True)
    (folder / "dead.tmp").write_bytes(b"half")
    (folder / "other").write_bytes(b"other")
    os.mkfifo(folder / "pipe.tmp")
    with (folder / "busy.tmp").open("wb") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        converted(converter, plain)
        names = {path.name for path in folder.iterdir()}
    assert {"other", "busy.tmp", "pipe.tmp"} < names and len(names) == 4


def test_a_cache_that_cannot_be_written(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private folder serves until the process ends. It is said once."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "cache").write_text("a file")
    converter = Converter(tmp_path / "cache")
    other = plain.with_name("other.bin")
    torch.save({"b": torch.ones(3)}, other)
    with caplog.at_level(logging.WARNING), OpenFile(plain) as file:
        for _ in range(2):
            with converter.convert(file) as made:
                assert made.path.is_relative_to(tmp_path / "tmp")
        with OpenFile(other) as another, converter.convert(another) as made:
            assert made.path.is_relative_to(tmp_path / "tmp")
    assert len(caplog.records) == 1 and "cannot be written" in caplog.text
    converter.close()
    converter.close()
    assert not list((tmp_path / "tmp").iterdir())


def test_a_full_disk(converter: Converter, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "_create", full)
    with OpenFile(plain) as file, pytest.raises(AdapterLoadFailed, match="No space left"):
        converter.convert(file)
    assert converter._private is None


def test_too_large(plain: Path, tmp_path: Path) -> None:
    """Said before it is read: a file with holes may be of any size."""
    os.truncate(plain, 1 << 40)
    with OpenFile(plain) as file, pytest.raises(AdapterTooLarge, match="1099511627776 bytes"):
        Converter(tmp_path / "cache", 1 << 30).convert(file)


def test_pause(converter: Converter, plain: Path) -> None:
    class Stop(Exception):
        pass

    calls = 0

    def pause() -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise Stop

    with OpenFile(plain) as file, pytest.raises(Stop):
        converter.convert(file, pause)
    assert not list(converter._folder.iterdir())
    assert converted(converter, plain)
