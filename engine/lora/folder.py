"""What else lies in an adapter's folder: files that PEFT or a client may use, and that the server does not.

`engine.adapters.text_files` names the files of tokenizer and chat template that it uses.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from engine.files import OpenFile
from engine.names import shown

_USED = "tokenizer.json"  # it has all that the other files say
_TOKENIZERS = ("tokenizer.model", "vocab.json", "added_tokens.json")
_TEMPLATE = "chat_template.json"  # of a processor, not of a tokenizer
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
    others = [name for name in _TOKENIZERS if name in names and not _same(name, folder, base)]
    if others and _USED not in names:
        notes.append(
            f"the folder's tokenizer is not used ({', '.join(others)}): it has no {_USED}; the base model's is"
        )
    if _TEMPLATE in names and not _same(_TEMPLATE, folder, base):
        notes.append(f"{_TEMPLATE} is not used; a chat template is in chat_template.jinja")
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
