"""Embedding and head in a PEFT file: whole matrices, and rows of single tokens.

    <module>.weight                                   modules_to_save, or a copy because the vocabulary was resized
    <module>.base_layer.weight                        a copy because LoRA targets the module
    <module>.token_adapter.trainable_tokens_delta     the rows of trainable_token_indices

PEFT loads a copy into the base's own matrix. So with a tied head, one copy replaces both, but a module in
modules_to_save replaces only itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.errors import OTHER_BASE, RESAVE
from engine.lora.keys import Report
from engine.lora.peft_extras import Site
from engine.lora.tensors import DTYPES, SafetensorsFile
from engine.lora.weights import Joined, OwnRows, Pair, Picked, TargetIndex, TensorMatrix, read_all
from engine.names import shown, shown_shape, shown_value
from engine.ops.targets import ModelTargets

_SAVED = "modules_to_save"
_TOKENS = "trainable_token_indices"
_PART = re.compile(
    r"(?P<tokens>token_adapter\.trainable_tokens_delta)"
    r"|(?P<whole>(?:token_adapter\.)?(?:base_layer\.)?(?:modules_to_save\.(?:[^.]+\.)?)?weight)"
)


@dataclass(slots=True)
class _Ends:
    """Reads embedding and head of one file."""

    file: SafetensorsFile
    fields: Mapping[str, Any]
    targets: ModelTargets
    max_added_tokens: int
    report: Report

    def whole(self, key: str, site: Site) -> OwnRows | None:
        """A whole matrix, or None after a report."""
        info, hidden = self.file.infos[key], self._hidden(site)
        base = site.group.vocab
        if len(info.shape) != 2 or info.shape[1] != hidden or not info.shape[0]:
            text = f"{shown(key)} has the shape {shown_shape(info.shape)}, not [{base}, {hidden}]"
            self.report("own shape", text, _SAVED, OTHER_BASE)
            return None
        if not self._readable(key):
            return None
        vocab = info.shape[0]
        if vocab > base + self.max_added_tokens:
            self.report(
                "added tokens",
                f"{shown(key)} has {vocab - base} tokens more than the base model; the limit is"
                f" {self.max_added_tokens}",
                "max_added_tokens",
                f"start the server with --max-added-tokens {vocab - base}",
            )
            return None
        return OwnRows(
            site.target.module,
            torch.arange(vocab, dtype=torch.int32),
            self.file.matrix(key),
            vocab,
        )

    def tokens(self, key: str, site: Site, known: OwnRows | None) -> OwnRows | None:
        """The rows of single tokens, on top of a whole matrix if there is one; None after a report."""
        info, hidden = self.file.infos[key], self._hidden(site)
        given = self._indices(site)
        vocab = known.vocab if known else site.group.vocab
        problem = None
        if given is None or len(set(given)) != len(given):
            problem = f"{_TOKENS} is not a list of different tokens for {site.target.name}"
        elif given and not 0 <= min(given) <= max(given) < vocab:
            problem = f"{_TOKENS} has a token outside of 0 to {vocab - 1}"
        elif info.shape != (len(given), hidden):
            problem = (
                f"{shown(key)} has the shape {shown_shape(info.shape)}, but {_TOKENS} has"
                f" {len(given)} tokens of {hidden} values"
            )
        if problem is not None or given is None:
            self.report("own tokens", problem or "", _TOKENS, RESAVE)
            return None
        if not self._readable(key):
            return None
        order = torch.tensor(given, dtype=torch.int64).argsort()
        ids = torch.tensor(given, dtype=torch.int64)[order]
        rows = Picked(self.file.matrix(key), order)
        own = OwnRows(site.target.module, ids.to(torch.int32), rows, vocab)
        return own if known is None else _over(own, known)

    def _indices(self, site: Site) -> list[int] | None:
        """The tokens that the configuration names for a module."""
        given = self.fields.get(_TOKENS)
        if isinstance(given, dict):
            names = [name for name in given if _names(name, site.target.module)]
            given = given[names[0]] if len(names) == 1 else None
        if isinstance(given, list) and all(type(token) is int for token in given):
            return given
        return None

    def _readable(self, key: str) -> bool:
        dtype = self.file.infos[key].dtype
        if dtype not in DTYPES:
            text = f"{shown(key)} has the dtype {shown(dtype)}, which is not supported"
            self.report(f"dtype {dtype}", text, key, f"save it in one of {', '.join(DTYPES)}")
        return dtype in DTYPES

    def _hidden(self, site: Site) -> int:
        return site.target.out_features if site.group.embedding else site.group.in_features


def _names(name: str, module: str) -> bool:
    """Whether a name of a configuration means a module, as PEFT matches it."""
    return module == name or module.endswith(f".{name}")


def _over(own: OwnRows, whole: OwnRows) -> OwnRows:
    """The whole matrix with some rows replaced."""
    at = torch.arange(whole.vocab)
    at[own.ids.long()] = whole.vocab + torch.arange(len(own.ids))
    return replace(whole, rows=Picked(Joined(whole.rows, own.rows), at))


def take_own(
    keys: Sequence[str],
    file: SafetensorsFile,
    fields: Mapping[str, Any],
    targets: ModelTargets,
    sites: Mapping[str, Site],
    max_added_tokens: int,
    report: Report,
) -> tuple[dict[TargetIndex, OwnRows], list[str]]:
    """The own rows of embedding and head, and the keys that belong to neither. `keys`: tensors of no pair."""
    ends = {end.targets[0].module: sites[end.targets[0].module] for end in targets.ends}
    found: dict[str, dict[str, str]] = {module: {} for module in ends}
    rest = []
    for key in keys:
        module = next((module for module in ends if key.startswith(f"{module}.")), None)
        match = _PART.fullmatch(key[len(module) + 1 :]) if module else None
        if module is None or match is None or match.lastgroup is None:
            rest.append(key)
        elif match.lastgroup in found[module]:
            report("twice", f"the file has {shown(module)} twice", module, RESAVE)
        else:
            found[module][match.lastgroup] = key
    reader = _Ends(file, fields, targets, max_added_tokens, report)
    own = _read(reader, ends, found)
    saved = fields.get(_SAVED) or []
    for name in saved if isinstance(saved, list) else [saved]:
        if not any(_names(str(name), module) and "whole" in found[module] for module in ends):
            text = f"{_SAVED} names {shown_value(name)}, which is not in the file"
            if not any(_names(str(name), module) for module in ends):
                served = " and ".join(ends)
                text = f"{_SAVED} names {shown_value(name)}; only {served} are served"
            report(f"saved {name}", text, _SAVED, "train it with LoRA (target_modules) instead")
    if fields.get(_TOKENS) and not any("tokens" in parts for parts in found.values()):
        report("no tokens", f"{_TOKENS} is set, but the file has no such rows", _TOKENS, RESAVE)
    _check_added(own, ends, report)
    return {ends[module].place: rows for module, rows in own.items()}, rest


def _read(
    reader: _Ends, ends: Mapping[str, Site], found: Mapping[str, Mapping[str, str]]
) -> dict[str, OwnRows]:
    own: dict[str, OwnRows] = {}
    for module, parts in found.items():
        if "whole" in parts and (rows := reader.whole(parts["whole"], ends[module])) is not None:
            own[module] = rows
    saved = reader.fields.get(_SAVED) or []
    copies = [module for module in own if not any(_names(str(name), module) for name in saved)]
    if reader.targets.tied and len(copies) == 1:
        _share(own, own[copies[0]], ends)
    tied = reader.targets.tied and sum("tokens" in parts for parts in found.values()) == 1
    for module, parts in found.items():
        if "tokens" not in parts:
            continue
        for other in ends if tied else [module]:
            rows = reader.tokens(parts["tokens"], ends[module], own.get(other))
            if rows is None:
                break
            own[other] = replace(rows, module=other)
    return own


def _share(own: dict[str, OwnRows], rows: OwnRows, ends: Mapping[str, Site]) -> None:
    """Gives the rows to embedding and head, where they have none."""
    for module in ends:
        own.setdefault(module, replace(rows, module=module))


def _check_added(own: Mapping[str, OwnRows], ends: Mapping[str, Site], report: Report) -> None:
    """Added tokens need rows in embedding and head."""
    sizes = {
        module: own[module].vocab if module in own else site.group.vocab
        for module, site in ends.items()
    }
    base = max((site.group.vocab for site in ends.values()), default=0)
    if len(set(sizes.values())) > 1 and max(sizes.values()) > base:
        text = " but ".join(f"{module} has {size} tokens" for module, size in sizes.items())
        remedy = "save the adapter with save_embedding_layers=True"
        report("added alone", f"the vocabulary was resized: {text}", _SAVED, remedy)


def with_added_updates(own: OwnRows, pair: Pair, base: int) -> OwnRows:
    """A head whose rows behind the base's `base` tokens include the update of its pair, B having a row for each."""
    at = own.ids >= base
    if not at.any():
        return own
    first = int(at.nonzero()[0])
    rows = read_all(Picked(own.rows, torch.arange(first, len(own.ids))))
    b = read_all(Picked(pair.b, own.ids[first:].long())).float()
    rows = rows.float() + pair.scale * (b @ read_all(pair.a).float())
    return replace(own, rows=Joined(Picked(own.rows, torch.arange(first)), TensorMatrix(rows)))
