"""The header of a safetensors file, typed and bounded: what is wrong with it is said before it costs memory.

A file is an 8-byte length, a JSON header of that length, then the tensors' bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated

import msgspec

from engine.files import OpenFile

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 1 << 16
MAX_NAME = 512  # characters
MAX_DIMENSIONS = 8
MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 32
_BRACES = 2 * MAX_TENSORS  # one opens each tensor; metadata may hold some
_COMMAS = 16 * MAX_TENSORS  # a tensor of MAX_DIMENSIONS has 11

# name of a dtype -> bytes of an element
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip

_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
_Shape = Annotated[list[_Size], msgspec.Meta(max_length=MAX_DIMENSIONS)]


class Incomplete(ValueError):
    """The file ends early: it is still being written, or a copy was broken off."""


class _Entry(msgspec.Struct):
    """A tensor; or the metadata, a mapping of strings whose names may be these too."""

    dtype: str = ""
    shape: _Shape | str = ""
    data_offsets: tuple[_Size, _Size] | str | None = None


class Entry(msgspec.Struct, frozen=True):
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]  # bytes, first and behind the last, after the header


_DECODER = msgspec.json.Decoder(dict[str, _Entry])


def read_header(file: OpenFile) -> tuple[dict[str, Entry], int]:
    """The tensors by name, and where in the file their bytes begin.

    Raises ValueError that says what is wrong with the file (Incomplete: it ends early), or OSError.
    """
    if file.size < 8:
        raise Incomplete(f"it has {file.size} bytes")
    prefix = bytearray(8)
    file.read_into(prefix, 0)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes")
    if length > file.size - 8:
        raise Incomplete(f"it has {file.size} bytes, its header alone {length}")
    text = bytearray(length)
    file.read_into(text, 8)
    try:
        return _parse(text, file.size - 8 - length), 8 + length
    except Incomplete:
        raise
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise ValueError(f"its header cannot be read ({error})") from None


def _parse(text: bytearray, data_bytes: int) -> dict[str, Entry]:
    if text.count(b"{") > _BRACES or text.count(b",") > _COMMAS:
        raise ValueError(f"more than {MAX_TENSORS} tensors")
    entries = _DECODER.decode(text)
    metadata = entries.pop("__metadata__", _Entry())
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"{len(entries)} tensors, the limit is {MAX_TENSORS}")
    if text.count(b'"data_offsets"') > len(entries) + (metadata.data_offsets is not None):
        raise ValueError("a name stands twice")
    return {name: _checked(name, entry, data_bytes) for name, entry in entries.items()}


def _checked(name: str, entry: _Entry, data_bytes: int) -> Entry:
    if len(name) > MAX_NAME:
        raise ValueError(f"a name has {len(name)} characters, the limit is {MAX_NAME}")
    if not (
        entry.dtype and isinstance(entry.shape, list) and isinstance(entry.data_offsets, tuple)
    ):
        raise ValueError(f"{name} lacks its dtype, shape or data_offsets")
    first, last = entry.data_offsets
    if first > last:
        raise ValueError(f"{name} ends before it begins")
    item_bytes = ITEM_BYTES.get(entry.dtype)
    if item_bytes is not None and last - first != math.prod(entry.shape) * item_bytes:
        raise ValueError(f"{name} has {last - first} bytes for the shape {entry.shape}")
    if last > data_bytes:
        raise Incomplete(f"{name} ends {last - data_bytes} bytes after the end of the file")
    return Entry(entry.dtype, tuple(entry.shape), entry.data_offsets)


def header_of(entries: Mapping[str, Entry]) -> bytes:
    """The beginning of a file with these tensors: length and header, padded to 8 bytes.

    Raises ValueError if it is longer than MAX_HEADER_BYTES.
    """
    text = msgspec.json.encode({"__metadata__": {"format": "pt"}, **entries})
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"the names of its tensors take {len(text)} bytes")
    return len(text).to_bytes(8, "little") + text


class _Index(msgspec.Struct):
    """The index of a sharded file."""

    weight_map: dict[str, str]


_INDEX_DECODER = msgspec.json.Decoder(_Index)
_SHARD = re.compile(r"[\w-][\w.-]{0,200}\.safetensors", re.ASCII)


def read_index(file: OpenFile) -> dict[str, str]:
    """Name of each tensor -> name of the file that has it, in the index's own folder.

    Raises ValueError that says what is wrong with the index, or OSError.
    """
    if file.size > MAX_INDEX_BYTES:
        raise ValueError(f"it has {file.size} bytes, the limit is {MAX_INDEX_BYTES}")
    return parse_index(file.read())


def parse_index(text: bytes, max_shards: int = MAX_SHARDS) -> dict[str, str]:
    """As `read_index`, from the contents of an index of at most MAX_INDEX_BYTES."""
    try:
        found = _INDEX_DECODER.decode(text).weight_map
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be read ({error})") from None
    shards = set(found.values())
    if not shards:
        raise ValueError("it names no file")
    if len(shards) > max_shards:
        raise ValueError(f"it names {len(shards)} files, the limit is {max_shards}")
    for shard in sorted(shards):
        if not _SHARD.fullmatch(shard):
            raise ValueError(f"it names {shard!r}, which is not a safetensors file of its folder")
    return found
