"""The small files of an adapter's folder that say how its text becomes tokens: tokenizer and chat template."""

from __future__ import annotations

from engine.errors import AdapterTooLarge

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"

# name -> limit in bytes. All are optional.
TEXT_FILES = {TOKENIZER: 64 << 20, TOKENIZER_CONFIG: 4 << 20, TEMPLATE: 1 << 20}


def check_size(name: str, size: int, where: str = "the adapter") -> None:
    """Raises AdapterTooLarge for a file of TEXT_FILES above its limit."""
    limit = TEXT_FILES[name]
    if size > limit:
        raise AdapterTooLarge(
            f"{name} of {where}: {size} bytes; the limit is {limit} bytes",
            field=name,
            hint="remove it to use the base model's",
        )
