"""What else lies in an adapter's folder: files that PEFT or a client may use, and that the server does not."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from engine.files import OpenFile
from engine.names import shown

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "added_tokens.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_TEMPLATE_OF = "tokenizer_config.json"
_HEADS = ("score", "classifier", "value_head", "v_head", "reward_head", "medusa_lm_heads")
_ENDINGS = (".safetensors", ".bin", ".pt")
_MAX_BYTES = 64 << 20  # larger files are not compared
_MAX_NAMES = 4096


def folder_notes(folder: Path, base: Path) -> list[str]:
    """One note per kind of file that is not used.

    `base`: the base model's folder, if it is one. Files that are equal there give no note.
    """
    try:
        names = sorted(os.listdir(folder))[:_MAX_NAMES]
    except OSError:
        return []
    notes = []
    if found := [name for name in _TOKENIZERS if name in names and not _same(name, folder, base)]:
        notes.append(
            f"the folder's tokenizer is not used ({', '.join(found)}); the base model's is"
        )
    templates = [name for name in _TEMPLATES if name in names and not _same(name, folder, base)]
    if (
        _TEMPLATE_OF in names
        and not _same(_TEMPLATE_OF, folder, base)
        and b'"chat_template"' in _read(folder / _TEMPLATE_OF)
    ):
        templates.append(_TEMPLATE_OF)
    if templates:
        notes.append(
            f"the folder's chat template is not used ({', '.join(templates)}); the base model's is"
        )
    if heads := [name for name in names if name.startswith(_HEADS) and name.endswith(_ENDINGS)]:
        notes.append(f"the folder has a head that is not used ({shown(', '.join(heads))})")
    return notes


def _same(name: str, folder: Path, base: Path) -> bool:
    content = _read(base / name)
    return bool(content) and content == _read(folder / name)


def _read(path: Path) -> bytes:
    """The contents; nothing if the file cannot be read or is large."""
    with suppress(OSError), OpenFile(path) as file:
        if file.size <= _MAX_BYTES:
            return file.read()
    return b""
