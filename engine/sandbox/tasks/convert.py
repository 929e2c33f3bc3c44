"""Converts a `.bin` of torch.save to safetensors with the same bytes, dtypes and shapes.

Descriptors: `source` to read, `target` to write. The answer is {}, {"refused": the problem of the file}, or
{"failed": the error of the system}.
"""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from engine.safetensors import ITEM_BYTES, MAX_DIMENSIONS, MAX_NAME, MAX_TENSORS, Entry, header_of

if TYPE_CHECKING:
    from torch import Tensor

GROWTH = 2  # tensors may take this many times the file's bytes, and SLACK_BYTES more
SLACK_BYTES = 1 << 20
PIECE_BYTES = 16 << 20
_ZIP = b"PK\x03\x04"
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


class Refused(Exception):
    """The problem of a file, as the end of a sentence that begins with its name."""


def max_tensor_bytes(packed: int) -> int:
    """Bytes that the tensors of a file of `packed` bytes may take."""
    return GROWTH * packed + SLACK_BYTES


def prepare() -> None:
    import torch

    torch.set_num_threads(1)


def run(descriptors: dict[str, int], arguments: dict[str, Any]) -> dict[str, Any]:
    source, target = descriptors["source"], descriptors["target"]
    try:
        tensors = _check(_load(source), max_tensor_bytes(os.fstat(source).st_size))
        _write(tensors, target)
    except Refused as refused:
        return {"refused": str(refused)[:1000]}
    except OSError as error:
        return {"failed": error.strerror or str(error)}
    return {}


def _load(source: int) -> object:
    """The content of the file, mapped into memory if possible."""
    import torch

    path = f"/proc/self/fd/{source}"
    try:
        mapped = os.pread(source, len(_ZIP), 0) == _ZIP and not _is_packed(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except (pickle.UnpicklingError, zipfile.BadZipFile):
        raise Refused("holds more than tensors and is not unpickled") from None
    except Exception as error:  # a boundary: the file may fail in any way
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        why = str(error).split("\n", 1)[0]
        if "allocate memory" in why:
            raise MemoryError from None
        raise Refused(f"cannot be read: {why}") from None


def _is_packed(path: str) -> bool:
    """Whether a record is compressed, which torch.save does not do. Such a record cannot be mapped."""
    with zipfile.ZipFile(path) as file:
        return any(record.compress_type != zipfile.ZIP_STORED for record in file.infolist())


def _check(loaded: object, limit: int) -> dict[str, tuple[str, Tensor]]:
    """Name -> dtype's name in the format, and tensor. Raises Refused."""
    import torch

    if not isinstance(loaded, dict) or not all(map(_is_plain, loaded.values())):
        raise Refused("is not a dictionary of tensors")
    if len(loaded) > MAX_TENSORS:
        raise Refused(f"holds {len(loaded)} tensors; the limit is {MAX_TENSORS}")
    names = {getattr(torch, name): spelling for spelling, name in _DTYPES.items()}
    found, total = {}, 0
    for name, tensor in loaded.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise Refused("is not a dictionary of tensors with names")
        if len(name) > MAX_NAME:
            raise Refused(f"holds a name of {len(name)} characters; the limit is {MAX_NAME}")
        if name != name.encode("utf-8", "replace").decode():  # half a surrogate pair
            raise Refused("holds a name that is not valid text")
        if tensor.dtype not in names:
            raise Refused(f"holds {name} as {tensor.dtype}")
        if tensor.dim() > MAX_DIMENSIONS:
            raise Refused(
                f"holds {name} of {tensor.dim()} dimensions; the limit is {MAX_DIMENSIONS}"
            )
        total += tensor.numel() * tensor.element_size()
        if total > limit:
            raise Refused(f"unpacks to more than {limit} bytes, {GROWTH} times its own size")
        found[name] = names[tensor.dtype], tensor
    return found


def _is_plain(value: object) -> bool:
    """A tensor whose elements are in memory, at regular distances."""
    from torch import Tensor, strided

    return (
        isinstance(value, Tensor)
        and value.layout == strided
        and value.device.type == "cpu"
        and not value.is_nested
    )


def _write(tensors: dict[str, tuple[str, Tensor]], target: int) -> None:
    """Writes wide elements first, so that each tensor is aligned to the size of its elements."""
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name][0]], name))
    entries, end = {}, 0
    for name in order:
        dtype, tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = Entry(dtype, tuple(tensor.shape), (start, end))
    try:
        header = header_of(entries)
    except ValueError as error:
        raise Refused(f"cannot be converted: {error}") from None
    with open(target, "wb", buffering=0, closefd=False) as file:
        _write_all(file, header)
        for name in order:
            for piece in _pieces(tensors[name][1].detach()):
                _write_all(file, piece)


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The elements in order, as bytes. A tensor that is not contiguous is copied in pieces."""
    import torch

    if tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data
    elif tensor.numel() * tensor.element_size() <= PIECE_BYTES:
        yield from _pieces(tensor.resolve_conj().resolve_neg().contiguous())
    else:
        row_bytes = tensor[0].numel() * tensor.element_size()
        rows = max(1, PIECE_BYTES // row_bytes)
        for start in range(0, len(tensor), rows):
            part = tensor[start : start + rows]
            yield from _pieces(part[0] if len(part) == 1 else part)


def _write_all(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
