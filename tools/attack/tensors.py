"""Hostile safetensors files. Each function replaces the good weights of a folder; variations come from `chosen`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tools.attack.pickles import NAME, SAFE, Kind

PREFIX = "base_model.model.model.layers"


def write(
    folder: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int = -1
) -> None:
    """A file with this header and data, and `length` as the header's length if it is to lie."""
    packed = json.dumps(header).encode() if isinstance(header, dict) else header
    prefix = (len(packed) if length < 0 else length).to_bytes(8, "little")
    (folder / SAFE).write_bytes(prefix + packed + data)


def entry(shape: list[Any], start: int = 0, stop: int = 4, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def truncated(folder: Path, chosen: random.Random) -> None:
    data = (folder / SAFE).read_bytes()
    (folder / SAFE).write_bytes(data[: chosen.randrange(len(data))])


def absurd_length(folder: Path, chosen: random.Random) -> None:
    """A header length up to 2^64 - 1."""
    length = chosen.choice([(1 << 64) - 1, 1 << 63, 1 << 40, 1 << 25, 100_000])
    write(folder, b"{}", b"", length)


def large_header(folder: Path, chosen: random.Random) -> None:
    """A header just below 16 MiB, of entries of every kind."""
    size = (16 << 20) - chosen.randrange(1000, 100_000)
    one = json.dumps(entry([1]))
    items, total, i = [], 2, 0
    while total < size - 120:
        item = f'"{chosen.getrandbits(64):x}{i}": {one}'
        items.append(item)
        total, i = total + len(item) + 1, i + 1
    write(folder, ("{" + ",".join(items) + "}").encode(), bytes(4))


def many_tensors(folder: Path, chosen: random.Random) -> None:
    """200,000 tensors with a name that looks right."""
    half = chosen.choice(["A", "B"])
    count = 200_000 if chosen.random() < 0.5 else 50_000
    write(folder, {f"l.{i}.lora_{half}.weight": entry([1]) for i in range(count)}, bytes(4))


def foreign_modules(folder: Path, chosen: random.Random) -> None:
    """120,000 modules that the base model does not have."""
    count = chosen.choice([30_000, 60_000])  # two tensors each
    names = (f"m.{i}.x.lora_{half}.weight" for i in range(count) for half in "AB")
    write(folder, {name: entry([1, 1]) for name in names}, bytes(4))


def outside(folder: Path, chosen: random.Random) -> None:
    """Offsets beyond the file, before it, or the wrong way round."""
    start, stop = chosen.choice([(1 << 40, (1 << 40) + 4), (-4, 0), (8, 4), (0, 1 << 62)])
    write(folder, {NAME: entry([1, 1], start, stop)}, bytes(64))


def deep_json(folder: Path, chosen: random.Random) -> None:
    depth = chosen.choice([10_000, 500_000, 5_000_000])
    write(folder, b'{"a":' + b"[" * depth + b"]" * depth + b"}", bytes(4))


def duplicates(folder: Path, chosen: random.Random) -> None:
    """One key a thousand times and more."""
    item = f'"{NAME}": {json.dumps(entry([8, 8], 0, 256))}'
    write(folder, ("{" + ",".join([item] * chosen.randint(2, 20_000)) + "}").encode(), bytes(256))


def long_names(folder: Path, chosen: random.Random) -> None:
    """Names of megabytes, 31 MB in one variation, with control characters in another."""
    size = chosen.choice([31_000_000, 15_000_000, 1_000_000])
    write(folder, {chosen.choice("xé") * (size // 2): entry([1, 1])}, bytes(4))


def not_finite(folder: Path, chosen: random.Random) -> None:
    """NaN or infinity in one number of one matrix."""
    tensors = load_file(folder / SAFE)
    changed = dict(tensors)
    name = chosen.choice(sorted(changed))
    changed[name] = np.array(changed[name])
    changed[name].flat[chosen.randrange(changed[name].size)] = chosen.choice([np.nan, np.inf])
    save_file(changed, folder / SAFE)


def overflow(folder: Path, chosen: random.Random) -> None:
    """Shapes whose product overflows 64 bits, or is a number of a thousand digits."""
    shape = chosen.choice([[1 << 32] * 2, [1 << 62, 4], [1 << 31, 1 << 33], [2] * 4000, [-1, -4]])
    write(folder, {NAME: entry(shape)}, bytes(4))


def odd_shapes(folder: Path, chosen: random.Random) -> None:
    """Shapes and offsets that are no whole numbers."""
    shape = chosen.choice([["a"], [1.5, 1e308], [None], {"a": 1}, "12", [[1], [2]], [True, 1]])
    write(folder, {NAME: entry(shape)}, bytes(4))  # type: ignore[arg-type]


def large_numbers(folder: Path, chosen: random.Random) -> None:
    """Numbers of a million digits: reading one takes quadratic time."""
    digits = b"9" * chosen.choice([4_000, 1_000_000, 8_000_000])
    body = b'{"%b":{"dtype":"F32","shape":[%b],"data_offsets":[0,4]}}' % (NAME.encode(), digits)
    write(folder, body, bytes(4))


def overlapping(folder: Path, chosen: random.Random) -> None:
    """Every module of the model on the same bytes, and a few thousand others."""
    rank = chosen.choice([8, 64])
    names = [
        f"{PREFIX}.{i}.self_attn.q_proj.lora_{half}.weight" for i in range(4000) for half in "AB"
    ]
    write(folder, {name: entry([rank, 8], 0, rank * 32) for name in names}, bytes(rank * 32))


def escapes(folder: Path, chosen: random.Random) -> None:
    """ANSI codes, line ends and half characters in names that an error will repeat."""
    name = chosen.choice(
        ["\x1b[2J\x1b[31mERROR", "a\n2026-01-01 ERROR forged", "\ud800", "\0" * 40]
    )
    write(folder, {f"{name}.lora_A.weight": entry([1, 1])}, bytes(4))


def strange_dtypes(folder: Path, chosen: random.Random) -> None:
    dtype = chosen.choice(["I64", "F8_E4M3", "C64", "x" * 1_000_000, "\x1b[0m"])
    write(folder, {NAME: entry([1, 1], 0, 4, dtype)}, bytes(4))


KINDS: dict[str, Kind] = {
    "safetensors truncated": truncated,
    "safetensors header length absurd": absurd_length,
    "safetensors header of 16 MiB": large_header,
    "safetensors of 200,000 tensors": many_tensors,
    "safetensors of 120,000 foreign modules": foreign_modules,
    "safetensors outside of the file": outside,
    "safetensors deep JSON": deep_json,
    "safetensors duplicate keys": duplicates,
    "safetensors names of megabytes": long_names,
    "safetensors NaN or infinity": not_finite,
    "safetensors shape overflows": overflow,
    "safetensors odd shapes": odd_shapes,
    "safetensors numbers of a million digits": large_numbers,
    "safetensors overlapping": overlapping,
    "safetensors names with control codes": escapes,
    "safetensors strange dtype": strange_dtypes,
}
