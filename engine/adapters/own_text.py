"""An adapter's own text: the tokens that its tokenizer adds and its chat template, where they differ from the base.

The files are a stranger's. They are read as JSON, bounded, and never with `tokenizers` or Jinja.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from engine.adapters.loaded_tokenizer import loaded_effects
from engine.adapters.text_files import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from engine.adapters.tokenizer_file import (
    MAX_CONTENT,
    PARTS,
    RESAVE_TOKENIZER,
    TokenizerFile,
    check_ids,
    read_tokenizer,
)
from engine.adapters.versions import Lru
from engine.checkpoint import folder_of
from engine.config import ModelConfig
from engine.errors import AdapterIncompatible, AdapterLoadFailed, ModelError
from engine.files import OpenFile, remedy
from engine.messages import AdapterText, AddedToken
from engine.names import shown

MAX_TOKENS = 1024  # own ones of an adapter
MAX_TEMPLATE_BYTES = 64 << 10
MAX_TEMPLATES = 16  # with names
MAX_SPECIALS = 64
MAX_KNOWN = 256  # texts that are remembered by the contents of their files
_COMMAS = 1 << 18  # of a tokenizer_config.json; that of Gemma 3 has 50,000
_DEFAULT = "default"  # name of the template that is used
_ENDS = ("bos_token", "eos_token")


@dataclass(frozen=True, slots=True)
class Reading:
    """What an adapter's files say about its text."""

    text: AdapterText | None = None  # None: the base model's
    notes: tuple[str, ...] = ()  # what is not used, and why


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a tokenizer_config.json and a chat_template.jinja say."""

    template: str | None = None
    specials: Mapping[str, str] | None = None  # None: there is no tokenizer_config.json
    named: Mapping[str, str] = field(default_factory=dict)  # templates besides `template`


@dataclass(frozen=True)
class _Base:
    folder: Path
    tokenizer: TokenizerFile | None  # None: the base model has no tokenizer.json
    template: str | None
    specials: Mapping[str, str]
    named: Mapping[str, str]

    @cached_property
    def loaded(self) -> Mapping[str, bytes] | None:
        """What the parts of its tokenizer do as transformers loads it, and saves it again; None: unknown."""
        return loaded_effects(str(self.folder))

    def compare(self, file: TokenizerFile) -> list[str]:
        """The parts of an adapter's tokenizer that do something else."""
        assert self.tokenizer is not None, "there is something to compare with"
        other = _differing(file, self.tokenizer.effects)
        if not set(other) & set(PARTS) or not file.vocabulary or self.loaded is None:
            return other
        return min(other, _differing(file, self.loaded), key=len)


class TextReader:
    """Reads the texts of the adapters of one base model. Thread-safe; the base's files are read at the first use."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._made: _Base | None = None
        self._known: Lru[bytes, Reading] = Lru(MAX_KNOWN)
        self._lock = threading.Lock()

    def read(self, files: Sequence[OpenFile], vocab: int) -> Reading:
        """`files`: those of TEXT_FILES that the adapter has. `vocab`: rows of its embedding; 0: not known.

        Raises AdapterIncompatible for what cannot be served, and AdapterLoadFailed.
        """
        try:
            data = {file.name: file.read() for file in files}
        except OSError as error:
            raise AdapterLoadFailed(
                f"cannot read the tokenizer: {error.strerror}", hint=remedy(error)
            ) from None
        state = hashlib.sha256(f"{vocab}".encode())
        for name, content in data.items():
            state.update(f" {name} {len(content)} ".encode() + hashlib.sha256(content).digest())
        with self._lock:
            known = self._known.get(state.digest())
        if known is None:
            known = self._reading(data, vocab)
            with self._lock:
                self._known.put(state.digest(), known)
        return known

    def _reading(self, data: Mapping[str, bytes], vocab: int) -> Reading:
        base = self._base()
        settings = _settings(data)
        notes: list[str] = []
        template, named = settings.template, settings.named
        if template == base.template and named in ({}, base.named):
            template, named = None, {}
        specials = settings.specials
        tokens: tuple[AddedToken, ...] = ()
        if TOKENIZER in data:
            pad = (specials or {}).get("pad_token")
            tokens = _tokens(data[TOKENIZER], base, vocab, pad, notes)
        elif b'"added_tokens_decoder"' in data.get(TOKENIZER_CONFIG, b""):
            notes.append("there is no tokenizer.json: the base model's tokenizer is used")
        same_ends = specials is None or all(
            specials.get(name) == base.specials.get(name) for name in _ENDS
        )
        if not tokens and template is None and same_ends:
            return Reading(notes=tuple(notes))
        own = None if specials is None else dict(specials)
        found = AdapterText(b"", tokens, template, own, dict(named))
        encoded = msgspec.msgpack.encode(found, order="sorted")
        digest = hashlib.sha256(encoded).digest()[:16]
        return Reading(msgspec.structs.replace(found, digest=digest), tuple(notes))

    def _base(self) -> _Base:
        with self._lock:
            if self._made is None:
                try:
                    folder = folder_of(self._config, weights=False)
                    data = {
                        name: (folder / name).read_bytes()
                        for name in (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE)
                        if (folder / name).exists()
                    }
                except (OSError, ModelError) as error:
                    raise AdapterLoadFailed(
                        f"cannot read the base model's tokenizer: {error}",
                        hint="check the folder of --model-id",
                    ) from None
                tokenizer = None
                if TOKENIZER in data:
                    tokenizer = replace(read_tokenizer(data[TOKENIZER], None), vocabulary={})
                settings = _settings(data)
                specials = settings.specials or {}
                self._made = _Base(folder, tokenizer, settings.template, specials, settings.named)
            return self._made


def _tokens(
    data: bytes, made: _Base, vocab: int, pad: str | None, notes: list[str]
) -> tuple[AddedToken, ...]:
    """The own tokens of a tokenizer.json. Raises AdapterIncompatible."""
    base = made.tokenizer
    if base is None:
        notes.append("tokenizer.json is not used: the base model has none to compare it with")
        return ()
    if hashlib.sha256(data).digest() == base.digest:
        return ()
    file = read_tokenizer(data, base)
    own = sorted(
        (token for id, token in file.added.items() if base.added.get(id) != token),
        key=lambda token: token.id,
    )
    other = made.compare(file)
    if parts := ", ".join(part for part in PARTS if part in other):
        if added := [token for token in own if token.id >= base.size]:
            raise AdapterIncompatible(
                f"tokenizer.json adds {len(added)} tokens, but differs from the base model's in: {parts}",
                field=TOKENIZER,
                hint=RESAVE_TOKENIZER,
            )
        notes.append(f"tokenizer.json is not used: it differs from the base model's in: {parts}")
        return ()
    if other:
        notes.append("the post_processor of tokenizer.json is not used; the base model's is")
    if len(own) > MAX_TOKENS:
        raise AdapterIncompatible(
            f"tokenizer.json changes {len(own)} tokens; the limit is {MAX_TOKENS}",
            field="added_tokens",
            hint="serve the model with this tokenizer as a base model",
        )
    own = _with_rows(own, vocab, pad, notes)
    kept = {token.id: token for token in own}
    check_ids({**base.added, **kept}, own, len(file.vocabulary), file.vocabulary)
    return tuple(own)


def _differing(file: TokenizerFile, effects: Mapping[str, bytes]) -> list[str]:
    return [part for part, effect in effects.items() if file.effects[part] != effect]


def _with_rows(
    own: list[AddedToken], vocab: int, pad: str | None, notes: list[str]
) -> list[AddedToken]:
    """The tokens with a row in the embedding. A padding token needs none: it is never in a prompt."""
    if not vocab:
        return own
    missing = [token for token in own if token.id >= vocab]
    for token in missing:
        if token.content != pad:
            raise AdapterIncompatible(
                f"tokenizer.json: the added token {shown(token.content)!r} has the id {token.id}; the embedding has "
                f"{vocab} rows",
                field="added_tokens",
                hint="save the adapter with save_embedding_layers=True, so that it has the new rows",
            )
        notes.append(f"the padding token {shown(token.content)!r} is not used: it has no row")
    return [token for token in own if token.id < vocab]


def _settings(data: Mapping[str, bytes]) -> _Settings:
    """Raises AdapterIncompatible."""
    templates: dict[str, str] = {}
    specials = None
    if TOKENIZER_CONFIG in data:
        try:
            if data[TOKENIZER_CONFIG].count(b",") > _COMMAS:
                raise ValueError(f"more than {_COMMAS} values")
            config = msgspec.json.decode(data[TOKENIZER_CONFIG], type=dict[str, Any])
        except (ValueError, RecursionError) as error:
            raise _unreadable(TOKENIZER_CONFIG, str(error)) from None
        templates, specials = _templates_of(config.get("chat_template")), _specials(config)
    if TEMPLATE in data:
        try:
            templates = {_DEFAULT: data[TEMPLATE].decode()}
        except ValueError as error:
            raise _unreadable(TEMPLATE, str(error)) from None
    if (size := sum(len(one.encode()) for one in templates.values())) > MAX_TEMPLATE_BYTES:
        raise AdapterIncompatible(
            f"the chat template has {size} bytes; the limit is {MAX_TEMPLATE_BYTES}",
            field="chat_template",
            hint="shorten it, or remove it to use the base model's",
        )
    return _Settings(templates.pop(_DEFAULT, None), specials, templates)


def _templates_of(value: Any) -> dict[str, str]:
    """Name -> template. One template is the default; without a default none is used."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {_DEFAULT: value}
    if not isinstance(value, list) or len(value) > MAX_TEMPLATES:
        raise _unreadable(TOKENIZER_CONFIG, "chat_template is not a text")
    try:
        named = msgspec.convert({one["name"]: one["template"] for one in value}, dict[str, str])
    except (KeyError, TypeError, msgspec.ValidationError):
        raise _unreadable(TOKENIZER_CONFIG, "chat_template is not a text") from None
    return named if _DEFAULT in named else {}


def _specials(config: Mapping[str, Any]) -> dict[str, str]:
    """Name of each special token -> content, as transformers gives them to a chat template."""
    found = {}
    for name, value in config.items():
        if name.endswith("_token") and (content := _content(value)) is not None:
            found[name] = content
    if len(found) > MAX_SPECIALS or any(
        len(text) > MAX_CONTENT for one in found.items() for text in one
    ):
        raise _unreadable(TOKENIZER_CONFIG, "too many special tokens, or a long one")
    return found


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _unreadable(name: str, why: str) -> AdapterIncompatible:
    return AdapterIncompatible(
        f"{name} cannot be read ({shown(why)})",
        field=name,
        hint=f"save it again with save_pretrained, or remove {name} to use the base model's",
    )
