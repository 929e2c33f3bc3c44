"""The header of a safetensors file: what is taken, what is refused before it costs memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from engine.files import OpenFile
from engine.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, Entry, header_of, read_header

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def parse(path: Path, text: bytes, data: int = 16) -> dict[str, Entry]:
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    with OpenFile(path) as file:
        entries, start = read_header(file)
    assert start == 8 + len(text)
    return entries


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def test_what_is_written_is_read(path: Path) -> None:
    entries = {"ä": Entry("BF16", (), (0, 2)), "b": Entry("F8_ODD", (1, 5), (2, 9))}
    header = header_of(entries)
    assert len(header) % 8 == 0
    assert parse(path, header[8:], data=9) == entries


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"format": "pt"},
        {
            "a": '{"b": [1, {"data_offsets": 2}]}',
            "data_offsets": "text",
            "shape": "x",
            "dtype": "F",
        },
    ],
)
def test_metadata_is_skipped(metadata: dict[str, str], path: Path) -> None:
    second = ENTRY | {"data_offsets": [16, 32], "new": [1]}
    entries = {"__metadata__": metadata, "a": ENTRY, "data_offsets and shape": second}
    found = parse(path, json.dumps(entries).encode(), data=32)
    assert set(found) == {"a", "data_offsets and shape"} and found["a"].shape == (2, 2)


def entry(**fields: Any) -> bytes:
    return json.dumps({"a": ENTRY | fields}).encode()


REFUSED = {
    "name twice": (b'{"a": %b, "a": %b}' % ((json.dumps(ENTRY).encode(),) * 2), "twice"),
    "offsets twice": (b'{"a": {"dtype":"F32","shape":[4],"data_offsets":[0,1],"data_offsets":[0,16]}}',
                      "twice"),
    "surrogate": (b'{"\\ud800": %b}' % json.dumps(ENTRY).encode(), "surrogate"),
    "not text": (b'{"\xff": %b}' % json.dumps(ENTRY).encode(), "utf-8"),
    "no object": (b"[]", "object"),
    "entry no object": (b'{"a": [1]}', "object"),
    "nothing": (b'{"a": {}}', "lacks"),
    "no dtype": (entry(dtype=""), "lacks"),
    "shape is text": (entry(shape="4"), "lacks"),
    "negative": (entry(shape=[-2, -2]), ">= 0"),
    "fraction": (entry(shape=[1.5]), "int"),
    "infinite": (entry(shape=[]).replace(b"[]", b"[1e999]"), "range"),
    "huge": (entry(shape=[10**400]), "shape"),
    "huge product": (entry(shape=[1 << 48] * 8), "16 bytes for the shape"),
    "dimensions": (entry(shape=[1] * 9), "length <= 8"),
    "backwards": (entry(data_offsets=[16, 0]), "before it begins"),
    "outside": (entry(data_offsets=[16, 32]), "after the end"),
    "hole": (entry(shape=[2], data_offsets=[8, 16]), "8 bytes before a belong to no tensor"),
    "overlap": (json.dumps({"a": ENTRY, "b": ENTRY}).encode(),
                "b and a overlap"),
    "long name": (json.dumps({"n" * 513: ENTRY}).encode(), "513 characters"),
    "deep": (b'{"a": {"dtype": "F32", "x": ' + b"[" * 1_000_000, "recursion|truncated"),
    "many tensors": (json.dumps(dict.fromkeys(map(str, range(MAX_TENSORS + 1)), ENTRY)).encode(),
                     "tensors"),
    "many objects": (b'{"a":' + b"{}," * (4 << 20), "tensors"),
    "many sizes": (b'{"a":{"shape":[' + b"1," * (7 << 20), "tensors"),
    "many small": (b'{"a":1' + b',"b":1' * (2 << 20), "tensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, path: Path) -> None:
    text, words = REFUSED[kind]
    assert len(text) <= MAX_HEADER_BYTES
    with pytest.raises(ValueError, match=words):
        parse(path, text)


def test_bytes_after_the_last_tensor(path: Path) -> None:
    with pytest.raises(ValueError, match="the last 3 bytes belong to no tensor"):
        parse(path, entry(), data=19)


def test_memory(path: Path) -> None:
    """The worst of MAX_HEADER_BYTES costs a few times its bytes."""
    one = {"dtype": "U8", "shape": [1]}
    tensors = {f"{n:0170}": one | {"data_offsets": [n, n + 1]} for n in range(MAX_TENSORS)}
    worst = json.dumps(tensors).encode()
    assert len(worst) < MAX_HEADER_BYTES
    tracemalloc.start()
    try:
        assert len(parse(path, worst, data=MAX_TENSORS)) == MAX_TENSORS
        for kind in ("many objects", "many sizes", "many small"):
            with pytest.raises(ValueError):
                parse(path, REFUSED[kind][0])
        assert tracemalloc.get_traced_memory()[1] < 150 << 20
    finally:
        tracemalloc.stop()


def test_length(path: Path) -> None:
    for data in (b"", b"1234567", (1 << 60).to_bytes(8, "little") + bytes(100)):
        path.write_bytes(data)
        with OpenFile(path) as file, pytest.raises(ValueError, match="bytes"):
            read_header(file)
    with pytest.raises(ValueError, match="take"):
        header_of({f"{n:0400}": Entry("F32", (), (0, 4)) for n in range(MAX_TENSORS)})
