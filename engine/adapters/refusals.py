"""Refusals by file contents: the same files under another name are refused at once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from engine.adapters.versions import Lru
from engine.errors import AdapterIncompatible, from_wire
from engine.files import OpenFile
from engine.lora.tensors import reading
from engine.safetensors import MAX_HEADER_BYTES, MAX_INDEX_BYTES

MAX_REFUSED = 512


class Refusals:
    """Refusals by the digest of the configuration and the header of the weights. Thread-safe."""

    def __init__(self) -> None:
        # In wire form: an exception would keep its frames, which hold what they read.
        self._known: Lru[bytes, dict[str, Any]] = Lru(MAX_REFUSED)
        self._lock = threading.Lock()

    @contextmanager
    def remembered(
        self, config: OpenFile, weights: OpenFile, shards: Sequence[OpenFile] = ()
    ) -> Iterator[None]:
        """Raises the earlier refusal of these files, if any; remembers a refusal that the block raises."""
        digest = _digest(config, weights, *shards)
        with self._lock:
            known = self._known.get(digest)
        if known is not None:
            raise from_wire(known)
        try:
            yield
        except AdapterIncompatible as error:
            with self._lock:
                self._known.put(digest, error.to_wire())
            raise


def _digest(config: OpenFile, *weights: OpenFile) -> bytes:
    """Digest of everything that is read before the values: configuration, index, headers, file sizes."""
    state = hashlib.sha256()
    wholes = (
        (config, weights[0]) if len(weights) > 1 else (config,)
    )  # an index comes before its shards
    for whole in wholes:
        state.update(f"{whole.size} ".encode())
        with reading(whole):
            if whole.size <= MAX_INDEX_BYTES:
                state.update(whole.read())
    for file in weights:
        state.update(f"{file.size} ".encode())
        with reading(file):
            length = bytearray(min(8, file.size))
            file.read_into(length, 0)
            rest = min(int.from_bytes(length, "little"), MAX_HEADER_BYTES, file.size - len(length))
            header = bytearray(rest)
            file.read_into(header, len(length))
            state.update(length + header)
    return state.digest()
