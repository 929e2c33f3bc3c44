"""A task of the sandbox: the base model's tokenizer as transformers loads it, which may rebuild what the file says.

Arguments: `folder`. The answer has the digest of what each part does, as text.
"""

from __future__ import annotations

from typing import Any

from engine.adapters.tokenizer_file import read_tokenizer
from engine.sandbox import Limits, SandboxError
from engine.sandbox import run as run_task

LIMITS = Limits(cpu_s=120, wall_s=300.0, memory_bytes=8 << 30)


def loaded_effects(folder: str) -> dict[str, bytes] | None:
    """The digests of the parts; None if the tokenizer cannot be loaded. Takes seconds, in a process of its own."""
    try:
        answer = run_task(__name__, {}, {"folder": folder}, LIMITS)
    except SandboxError:
        return None
    return {part: bytes.fromhex(digest) for part, digest in answer.items()}


def prepare() -> None:
    import transformers  # noqa: F401


def run(descriptors: dict[str, int], arguments: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(arguments["folder"])
    file = read_tokenizer(loaded.backend_tokenizer.to_str().encode(), None)
    return {part: digest.hex() for part, digest in file.effects.items()}
