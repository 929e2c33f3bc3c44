"""Names of an adapter's tensors, as PEFT writes them today.

Wrappers and older writers add parts to a name: `module.` (DDP), `_orig_mod.` (torch.compile),
`_fsdp_wrapped_module.`, and the adapter's own name (`lora_A.default.weight`). `plain_keys` removes them, and PEFT's
prefix `base_model.model.`. What remains is the module's path in the base model and the part of the adapter. If two
tensors get the same name, or several adapters are in the file, nothing says which of them is meant: a problem.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from engine.names import shown

# kind, text, tensor, remedy
Report = Callable[[str, str, str, str], None]  # kind, text, field, remedy

_WRAPPERS = re.compile(
    r"(?:(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
)
_PREFIX = re.compile(r"(?:module\.)*(?:base_model\.model\.(?:module\.)*)?")
_NAMED = re.compile(
    r"(?P<head>.+\.(?:lora_[AB]|lora_magnitude_vector))\.(?P<name>[^.]+)(?P<tail>\.(?:weight|bias))"
    r"|(?P<table>.+\.(?:lora_embedding_[AB]|trainable_tokens_delta))\.(?P<of>[^.]+)"
)


def plain_key(key: str) -> tuple[str, str]:
    """The name as PEFT writes it, without prefix, and the name of the adapter in it ("": none)."""
    key = _WRAPPERS.sub("", key)
    key = key[_match_end(key) :] or key
    if match := _NAMED.fullmatch(key):
        if match["table"]:
            return match["table"], match["of"]
        return match["head"] + match["tail"], match["name"]
    return key, ""


def _match_end(key: str) -> int:
    match = _PREFIX.match(key)
    return match.end() if match else 0


def plain_keys(keys: Iterable[str], report: Report) -> dict[str, str]:
    """Plain name -> name in the file. Calls `report` for names that are not unambiguous."""
    found: dict[str, str] = {}
    adapters: dict[str, str] = {}  # name of an adapter -> a tensor that has it
    for key in keys:
        plain, adapter = plain_key(key)
        if adapter:
            adapters.setdefault(adapter, key)
        if plain in found:
            report(
                "twice",
                f"{shown(key)} and {shown(found[plain])} name the same tensor",
                plain,
                "save the adapter again with PEFT's save_pretrained",
            )
        else:
            found[plain] = key
    if len(adapters) > 1:
        first, second = list(adapters)[:2]
        report(
            "several adapters",
            f"the file has tensors of {len(adapters)} adapters, '{shown(first)}' and '{shown(second)}' among them",
            adapters[second],
            "save each adapter to its own folder (save_pretrained, selected_adapters)",
        )
    return found
