"""Hostile `.bin` files: written opcode by opcode, since no honest writer makes them.

Each function puts `adapter_model.bin` in place of the good weights of a folder. Variations come from `chosen`.
"""

from __future__ import annotations

import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

Kind = Callable[[Path, random.Random], None]

BIN = "adapter_model.bin"
SAFE = "adapter_model.safetensors"
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
GIB = 1 << 30
CODE_MARK = "code-was-run"  # a file of this name beside the weights: the unpickler ran a command


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def tensor(key: str, numel: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """What torch.save writes for a float32 tensor on the storage `key`."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    storage += number(numel) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(number, row)) + b"t" for row in (shape, stride))
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + sizes + b"\x89" + hooks
    ) + b"tR"


def dictionary(*items: tuple[bytes, bytes]) -> bytes:
    return b"}" + b"".join(key + value + b"s" for key, value in items)


def write(folder: Path, body: bytes, records: dict[str, bytes], *, packed: bool = False) -> None:
    """The zip file of torch.save around one pickle."""
    (folder / SAFE).unlink(missing_ok=True)
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(folder / BIN, "w", method, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for key, data in records.items():
            archive.writestr(f"archive/data/{key}", data)


def raw(folder: Path, data: bytes) -> None:
    (folder / SAFE).unlink(missing_ok=True)
    (folder / BIN).write_bytes(data)


def bytearray_bomb(folder: Path, chosen: random.Random) -> None:
    """Some 400 bytes that ask for 6 GiB: bytearray is among the calls that weights_only allows."""
    call = b"cbuiltins\nbytearray\n" + number(6 * GIB + chosen.randrange(GIB)) + b"\x85R"
    write(folder, call if chosen.random() < 0.5 else dictionary((text(NAME), call)), {})


def zip_bomb(folder: Path, chosen: random.Random) -> None:
    """A record that unpacks a thousandfold."""
    size = chosen.choice([256, 512, 1024]) << 20
    body = dictionary((text(NAME), tensor("0", size // 4, (8, size // 32), (size // 32, 1))))
    write(folder, body, {"0": bytes(size)}, packed=True)


def pickle_bomb(folder: Path, chosen: random.Random) -> None:
    """The pickle itself unpacks a thousandfold: one text of zeros."""
    write(
        folder, dictionary((text("\0" * (chosen.choice([64, 256]) << 20)), b"N")), {}, packed=True
    )


def nested_key(folder: Path, chosen: random.Random) -> None:
    """A key of nested pairs of one and the same pair: hashing it takes 2^depth steps."""
    depth = chosen.randint(50, 90)
    key = number(0) + b"".join(b"q%bh%b\x86" % ((bytes([i]),) * 2) for i in range(depth))
    write(folder, b"}" + key + b"Ns", {})


def memo_bomb(folder: Path, chosen: random.Random) -> None:
    """Lists that hold the same list twice, 30 and more deep: whoever walks or prints them never ends."""
    depth = chosen.randint(30, 200)
    lists = b"".join(b"]q%b(" % bytes([i]) for i in range(depth)) + b"]q%b" % bytes([depth])
    lists += b"".join(b"h%be" % bytes([i]) for i in range(depth, 0, -1))
    write(folder, dictionary((text(NAME), lists)) if chosen.random() < 0.7 else lists, {})


def deep_lists(folder: Path, chosen: random.Random) -> None:
    """A list in a list, a million deep: a recursion in C has no stack for it."""
    depth = chosen.choice([20_000, 200_000, 1_000_000])
    write(folder, dictionary((text(NAME), b"]" * depth + b"a" * (depth - 1))), {})


def legacy_garbage(folder: Path, chosen: random.Random) -> None:
    """The format before zip: its magic number, then noise."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2)
    system = pickle.dumps({"little_endian": True}, protocol=2)
    raw(folder, magic + system * chosen.randint(0, 1) + chosen.randbytes(chosen.randint(1, 5000)))


def stride_zero(folder: Path, chosen: random.Random) -> None:
    """A matrix of terabytes on a storage of one number."""
    rows = chosen.choice([8, 1 << 20, 1 << 31])
    body = dictionary(
        (text(NAME), tensor("0", 1, (rows, 1 << 30), (0, 0))),
        (text(NAME.replace("lora_A", "lora_B")), tensor("0", 1, (1 << 30, rows), (0, 0))),
    )
    write(folder, body, {"0": bytes(4)})


def storage_lie(folder: Path, chosen: random.Random) -> None:
    """A storage that claims far more than its record has."""
    size = 1 << chosen.randint(30, 62)
    write(folder, dictionary((text(NAME), tensor("0", size, (size,), (1,)))), {"0": bytes(64)})


def truncated_bin(folder: Path, chosen: random.Random) -> None:
    write(folder, dictionary((text(NAME), tensor("0", 64, (8, 8), (8, 1)))), {"0": bytes(256)})
    data = (folder / BIN).read_bytes()
    raw(folder, data[: chosen.randint(1, len(data) - 1)])


def run_code(folder: Path, chosen: random.Random) -> None:
    """A call of os.system, subprocess or eval."""
    command = f"touch {folder / CODE_MARK}"
    calls = {
        b"cos\nsystem\n": command,
        b"cposix\nsystem\n": command,
        b"csubprocess\ngetoutput\n": command,
        b"c__builtin__\neval\n": f"__import__('os').system({command!r})",
    }
    function, argument = chosen.choice(list(calls.items()))
    write(folder, function + b"(" + text(argument) + b"tR", {})


def many_tensors_bin(folder: Path, chosen: random.Random) -> None:
    """100,000 tensors on one storage."""
    one = tensor("0", 1, (1, 1), (1, 1))
    count = chosen.choice([20_000, 100_000])
    write(folder, dictionary(*((text(f"t{i}"), one) for i in range(count))), {"0": bytes(4)})


def long_name_bin(folder: Path, chosen: random.Random) -> None:
    """One name of 31 MB."""
    name = chosen.choice("x\x1bé") * (31_000_000 - chosen.randrange(1000))
    write(folder, dictionary((text(name), tensor("0", 1, (1, 1), (1, 1)))), {"0": bytes(4)})


def not_text_keys(folder: Path, chosen: random.Random) -> None:
    """Keys that are tensors, numbers or None."""
    key = chosen.choice([b"N", number(1 << 4000), tensor("0", 1, (1,), (1,))])
    write(folder, dictionary((key, tensor("0", 1, (1, 1), (1, 1)))), {"0": bytes(4)})


KINDS: dict[str, Kind] = {
    "bin bytearray of 6 GiB": bytearray_bomb,
    "bin record unpacks 1000-fold": zip_bomb,
    "bin pickle unpacks 1000-fold": pickle_bomb,
    "bin key hashes for ever": nested_key,
    "bin lists doubling": memo_bomb,
    "bin lists a million deep": deep_lists,
    "bin legacy garbage": legacy_garbage,
    "bin huge shape, stride 0": stride_zero,
    "bin storage larger than record": storage_lie,
    "bin truncated": truncated_bin,
    "bin with code": run_code,
    "bin of 100,000 tensors": many_tensors_bin,
    "bin name of 31 MB": long_name_bin,
    "bin keys that are no text": not_text_keys,
}
