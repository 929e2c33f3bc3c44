"""Broken adapters in folders: what is done to a good one, and what the server must say."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tools.attack import pickles
from tools.attack.configs import CONFIG
from tools.attack.files import POINTER
from tools.attack.pickles import BIN, SAFE
from tools.attack.tensors import entry, write

ACCESS = "give the user that runs the server access"
HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n" * 20
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
OTHER = NAME.replace("lora_A", "lora_B")
FAILED, MISFIT = ("adapter_load_failed", 424), ("adapter_incompatible", 422)
NOT_FOUND, FORBIDDEN = ("adapter_not_found", 404), ("adapter_forbidden", 403)

Kind = tuple[str, int]
Break = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]


class Row(NamedTuple):
    """One broken input. `reason` and `remedy` are parts of the message."""

    spoil: Break
    kind: Kind  # type of the error, and status
    reason: str
    remedy: str


def cut(keep: Callable[[int, int], int]) -> Break:
    """Shortens the weights. `keep`: from the header's and the file's bytes to those that stay."""

    def spoil(folder: Path) -> None:
        data = (folder / SAFE).read_bytes()
        header = int.from_bytes(data[:8], "little")
        (folder / SAFE).write_bytes(data[: keep(header, len(data))])

    return spoil


def header(text: bytes | dict[str, Any], data: bytes = bytes(64), length: int = -1) -> Break:
    return lambda folder: write(folder, text, data, length)


def moved(**changed: Any) -> Break:
    """Changes the entry of one tensor."""

    def spoil(folder: Path) -> None:
        data = (folder / SAFE).read_bytes()
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + size])
        entries[NAME] |= changed
        write(folder, entries, data[8 + size :])

    return spoil


def pair(first: dict[str, Any], second: dict[str, Any], data: int) -> Break:
    """Two tensors on `data` bytes."""
    return header({NAME: first, OTHER: second}, bytes(data))


def tensors(change: Callable[[Tensors], Any]) -> Break:
    def spoil(folder: Path) -> None:
        loaded = load_file(folder / SAFE)
        change(loaded)
        save_file({name: tensor.contiguous() for name, tensor in loaded.items()}, folder / SAFE)

    return spoil


def value(number: float, dtype: torch.dtype = torch.float32) -> Break:
    """One value of one matrix."""

    def change(loaded: Tensors) -> None:
        loaded[NAME] = loaded[NAME].to(dtype)
        loaded[NAME][1, 2] = number

    return tensors(change)


def config(**fields: Any) -> Break:
    def spoil(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | fields))

    return spoil


def content(name: str, data: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(data)


def instead(name: str, make: Callable[[Path], object]) -> Break:
    """Puts something else where a file was."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def loop(path: Path) -> None:
    other = path.with_name("other")
    path.symlink_to(other)
    other.symlink_to(path)


def without(*names: str) -> Break:
    return lambda folder: [(folder / name).unlink() for name in names]


def packed(kind: pickles.Kind) -> Break:
    return lambda folder: kind(folder, random.Random(1))


def wide(loaded: Tensors) -> None:
    """The adapter of a wider model."""
    for name, tensor in loaded.items():
        rows, columns = tensor.shape
        loaded[name] = torch.ones(rows, 2 * columns) if "lora_A" in name else tensor


def renamed(old: str, new: str) -> Callable[[Tensors], Any]:
    def change(loaded: Tensors) -> None:
        for name in list(loaded):
            loaded[name.replace(old, new)] = loaded.pop(name)

    return change


WEIGHTS = {
    "cut in the length": Row(cut(lambda header, size: 5), FAILED, "incomplete", "copy it again"),
    "cut in the header": Row(
        cut(lambda header, size: 8 + header // 2), FAILED, "incomplete", "copy it again"
    ),
    "cut in the data": Row(cut(lambda header, size: size - 9), FAILED, "incomplete", "copy it again"),
    "empty": Row(content(SAFE, b""), FAILED, "it has 0 bytes", "copy it again"),
    "zeros": Row(content(SAFE, bytes(4096)), FAILED, "its header has 0 bytes", "copy it again"),
    "header of 2^63 bytes": Row(
        header(b"{}", length=1 << 63), MISFIT, "header claims 9223372036854775808 bytes", "save"
    ),
    "header of 0 bytes": Row(header(b""), FAILED, "its header has 0 bytes", "copy it again"),
    "header larger than the file": Row(
        header(b"{}", length=4096), FAILED, "its header alone 4096", "copy it again"
    ),
    "header is not JSON": Row(header(b"{'a': 1}"), MISFIT, "header cannot be read", "save"),
    "tensors overlap": Row(
        pair(entry([4, 64], 0, 1024), entry([64, 4], 512, 1536), 1536), MISFIT, "overlap", "save"
    ),
    "a hole between tensors": Row(
        pair(entry([4, 64], 0, 1024), entry([64, 4], 1088, 2112), 2112), MISFIT, "64 bytes", "save"
    ),
    "bytes after the last tensor": Row(
        pair(entry([4, 64], 0, 1024), entry([64, 4], 1024, 2048), 4096), MISFIT, "2048 bytes", "save"
    ),
    "negative offsets": Row(moved(data_offsets=[-4, 0]), MISFIT, ">= 0", "save"),
    "offsets backwards": Row(moved(data_offsets=[8, 4]), MISFIT, "ends before it begins", "save"),
    "unknown dtype": Row(moved(dtype="F13"), MISFIT, "dtype F13", "save the adapter in"),
    "integers": Row(moved(dtype="I32"), MISFIT, "dtype I32", "save the adapter in"),
    "shape overflows": Row(moved(shape=[1 << 40, 1 << 40]), MISFIT, "for the shape", "save"),
    "tensor of size 0": Row(
        tensors(lambda loaded: loaded.update({NAME: torch.ones(0, 64)})),
        MISFIT, "saved empty", "gather sharded weights",
    ),
    "NaN": Row(value(float("nan")), MISFIT, "not finite", "diverged"),
    "infinity": Row(value(float("inf")), MISFIT, "not finite", "diverged"),
    "too large for the served dtype": Row(
        value(1e300, torch.float64), MISFIT, "not finite in float32", "wider --dtype"
    ),
    "Git LFS pointer": Row(
        content(SAFE, POINTER.format(7, 99).encode()), MISFIT, "Git LFS pointer", "git lfs pull"
    ),
    "web page": Row(content(SAFE, HTML), MISFIT, "a web page", "download it again"),
    "pickle": Row(content(SAFE, b"PK\x03\x04" + bytes(99)), MISFIT, "a zip file", BIN),
    "half of a pair missing": Row(
        tensors(lambda loaded: loaded.pop(OTHER)), MISFIT, "has A but not B", "complete adapter"
    ),
    "another base model": Row(tensors(wide), MISFIT, "another base model", "serve the adapter's base"),
    "a layer too many": Row(
        tensors(renamed("layers.1.", "layers.7.")), MISFIT, "layers.7", "adapter of this base model"
    ),
    "an unknown module": Row(
        tensors(renamed("q_proj", "w_pack")), MISFIT, "w_pack is not a LoRA target", "train on"
    ),
}  # fmt: skip

CONFIGS = {
    "config missing": Row(without(CONFIG), MISFIT, f"no {CONFIG}", "save_pretrained"),
    "config is not JSON": Row(content(CONFIG, b"r = 4"), MISFIT, "not valid JSON", "save_pretrained"),
    "config cut off": Row(content(CONFIG, b'{"r": 4, '), FAILED, "incomplete", "copy it again"),
    "config empty": Row(content(CONFIG, b""), FAILED, "incomplete", "copy it again"),
    "config is a web page": Row(content(CONFIG, HTML), MISFIT, "a web page", "download it again"),
    "config is a list": Row(content(CONFIG, b"[1]"), MISFIT, "not a JSON object", "save_pretrained"),
    "config nested deep": Row(
        content(CONFIG, b"[" * 100_000 + b"]" * 100_000), MISFIT, "nested too deeply", "save_pretrained"
    ),
    "config of 5 MiB": Row(
        content(CONFIG, b" " * (5 << 20)), MISFIT, "larger than 4 MiB", "save_pretrained"
    ),
    "r is 0": Row(config(r=0), MISFIT, "r is 0", "value of the training"),
    "r is -1": Row(config(r=-1), MISFIT, "r is -1", "value of the training"),
    "r is absurd": Row(config(r=10**40), MISFIT, "not a positive whole number", "value of the training"),
    "r is text": Row(config(r="4"), MISFIT, "r is '4'", "value of the training"),
    "rank differs": Row(config(r=5), MISFIT, "has rank 4, but adapter_config.json says 5", "rank_pattern"),
    "alpha is NaN": Row(config(lora_alpha=float("nan")), MISFIT, "not a finite number", "value of the training"),
    "unknown peft_type": Row(config(peft_type="NOVEL"), MISFIT, "peft_type is 'NOVEL'", "LoRA adapter"),
}  # fmt: skip

PLACES = {
    "folder missing": Row(
        lambda folder: [*without(CONFIG, SAFE)(folder), folder.rmdir()],  # type: ignore[operator]
        NOT_FOUND, "no folder", "--adapter-root",
    ),
    "weights missing": Row(without(SAFE), MISFIT, "has neither", "save_pretrained"),
    "both missing": Row(without(SAFE, CONFIG), MISFIT, f"no {CONFIG}", "save_pretrained"),
    "folder as weights": Row(instead(SAFE, Path.mkdir), MISFIT, "not a regular file", "the file itself"),
    "pipe as weights": Row(instead(SAFE, os.mkfifo), MISFIT, "not a regular file", "the file itself"),
    "pipe as config": Row(instead(CONFIG, os.mkfifo), MISFIT, "not a regular file", "the file itself"),
    "loop of links": Row(instead(SAFE, loop), FAILED, "symbolic links", "where its links lead"),
    "broken link": Row(
        instead(SAFE, lambda path: path.symlink_to("gone")), FAILED, "No such file", "where its links lead"
    ),
    "link outside": Row(
        instead(CONFIG, lambda path: path.symlink_to("/etc/hostname")),
        FORBIDDEN, "outside every --adapter-root", "--adapter-root",
    ),
    "no permission": Row(
        lambda folder: (folder / SAFE).chmod(0), FAILED, "Permission denied", ACCESS
    ),
    "no permission for the folder": Row(
        lambda folder: folder.chmod(0), FAILED, "Permission denied", ACCESS
    ),
}  # fmt: skip

PICKLES = {
    "bin that runs code": Row(
        packed(pickles.run_code), MISFIT, "more than tensors", "save_pretrained (safetensors)"
    ),
    "bin cut off": Row(packed(pickles.truncated_bin), FAILED, "incomplete", "copy it again"),
    "bin that unpacks 1000-fold": Row(
        packed(pickles.zip_bomb), MISFIT, "adapter_model.bin", "save_pretrained (safetensors)"
    ),
}

FILES = WEIGHTS | CONFIGS | PLACES | PICKLES


def padded(folder: Path) -> None:
    """A good file whose header is so long that the file's first byte is <."""
    data = (folder / SAFE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size]
    write(folder, text + b" " * ((ord("<") - size) % 256), data[8 + size :])
