"""Refusals by file contents: the same files under another name are refused at once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.adapters.versions import Lru
from engine.errors import AdapterIncompatible, from_wire
from engine.files import OpenFile
from engine.lora.peft_config import MAX_CONFIG_BYTES
from engine.lora.tensors import reading
from engine.safetensors import MAX_HEADER_BYTES

MAX_REFUSED = 512


class Refusals:
    """Refusals by the digest of the configuration and the header of the weights. Thread-safe."""

    def __init__(self) -> None:
        # In wire form: an exception would keep its frames, which hold what they read.
        self._known: Lru[bytes, dict[str, Any]] = Lru(MAX_REFUSED)
        self._lock = threading.Lock()

    @contextmanager
    def remembered(self, config: OpenFile, weights: OpenFile) -> Iterator[None]:
        """Raises the earlier refusal of these files, if any; remembers a refusal that the block raises."""
        digest = _digest(config, weights)
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


def _digest(config: OpenFile, weights: OpenFile) -> bytes:
    """Digest of everything that is read before the values: configuration, header, file sizes."""
    state = hashlib.sha256(f"{config.size} {weights.size} ".encode())
    with reading(config):
        if config.size <= MAX_CONFIG_BYTES:
            state.update(config.read())
    with reading(weights):
        length = bytearray(min(8, weights.size))
        weights.read_into(length, 0)
        rest = min(int.from_bytes(length, "little"), MAX_HEADER_BYTES, weights.size - len(length))
        header = bytearray(rest)
        weights.read_into(header, len(length))
        state.update(length + header)
    return state.digest()
