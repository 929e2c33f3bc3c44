"""Adapters' folders with a tokenizer and a chat template of their own, saved by transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer

from engine.adapters.own_text import Reading, TextReader
from engine.adapters.text_files import TEMPLATE, TEXT_FILES, TOKENIZER
from engine.config import ModelConfig
from engine.files import OpenFile

VOCAB = 404  # of `widened`; the base has 400 tokens
# What transformers gives to a template: trimmed blocks, loop controls, its own tojson, special tokens, no null fields.
TEMPLATE_TEXT = """{{ bos_token }}
{%- for m in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {% if m.name is defined %}<{{ m.name | tojson }}>{% endif %}
    {%- if m.role == 'forbidden' %}{{ raise_exception('no role ' + m.role) }}{% endif %}
    {% generation %}<tool>{{ m['content'] | trim }}{% endgeneration %}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<thing>{{ strftime_now('%Y') | length }}{% endif %}"""


def widened(base: Path, folder: Path) -> Path:
    """Four new tokens, one of them the end of sequence, and another template."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<tool>", AddedToken("<thing>", lstrip=True, rstrip=True)])
    tokenizer.add_special_tokens({"eos_token": "<|end|>", "pad_token": "<|pad|>"})
    tokenizer.chat_template = TEMPLATE_TEXT
    tokenizer.save_pretrained(folder)
    return folder


def edited(base: Path, folder: Path, **changes: Any) -> Path:
    """The base's tokenizer.json with other top-level fields; `None` removes one."""
    given = json.loads((base / TOKENIZER).read_text()) | changes
    write(folder, {name: value for name, value in given.items() if value is not None})
    return folder


def write(folder: Path, tokenizer: Mapping[str, Any] | bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = tokenizer if isinstance(tokenizer, bytes) else json.dumps(tokenizer).encode()
    (folder / TOKENIZER).write_bytes(data)


def with_template(folder: Path, template: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TEMPLATE).write_text(template)
    return folder


def read(base: Path, folder: Path, vocab: int = VOCAB) -> Reading:
    """What the exchange reads in an adapter's folder."""
    with ExitStack() as stack:
        files = [
            stack.enter_context(OpenFile(folder / name))
            for name in TEXT_FILES
            if (folder / name).exists()
        ]
        return reader(base).read(files, vocab)


@cache
def reader(base: Path) -> TextReader:
    return TextReader(ModelConfig(model_id=str(base)))
