"""Matches the tensors of a PEFT file with the targets of the model. What does not fit becomes a problem."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.errors import OTHER_BASE, RESAVE, AdapterIncompatible
from engine.lora.leftovers import FULL_MODEL, describe
from engine.lora.peft_config import PeftConfig
from engine.lora.peft_extras import Site, check_complete, take_extras
from engine.lora.peft_own import take_own, with_added_updates
from engine.lora.tensors import DTYPES, SafetensorsFile, TensorInfo
from engine.lora.weights import Extras, OwnRows, Pair, TargetIndex
from engine.names import shown, shown_shape
from engine.ops.layout import MAX_RANK
from engine.ops.targets import ModelTargets

MAX_PROBLEMS = 64  # kinds of problems that are listed

_HALF = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<half>[AB])\.weight|lora_embedding_(?P<table>[AB]))"
)
_TRAINING_ONLY = re.compile(r"\.lora_(velora|monteclora)_")  # PEFT does not read them at inference
_GATHER = "gather sharded weights (ZeRO-3, FSDP) before saving"
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def _kind(name: str) -> str:
    """A name without layer numbers, so that a problem is the same kind in every layer."""
    return _NUMBER.sub("", shown(name))


@dataclass(slots=True)
class Problems:
    """Problems by kind: one message per kind, up to MAX_PROBLEMS kinds."""

    first: dict[str, AdapterIncompatible] = field(default_factory=dict)
    more: Counter[str] = field(default_factory=Counter)  # further cases per kind
    unlisted: int = 0

    def add(self, kind: str, text: str, where: str | None, hint: str | None) -> None:
        if kind in self.first:
            self.more[kind] += 1
        elif len(self.first) < MAX_PROBLEMS:
            where = shown(where) if where else None
            self.first[kind] = AdapterIncompatible(text, field=where, hint=hint)
        else:
            self.unlisted += 1

    def errors(self) -> list[AdapterIncompatible]:
        """One error per kind, with the number of further cases, and one for the kinds that are not listed."""
        found = []
        for kind, first in self.first.items():
            count = self.more[kind]
            text = f"{first.message}, and {count} more like it" if count else first.message
            found.append(AdapterIncompatible(text, field=first.field, hint=first.hint))
        if self.unlisted:
            found.append(
                AdapterIncompatible(
                    f"{self.unlisted} more problems are not listed",
                    hint="mend the listed ones first",
                )
            )
        return found


class Limits(NamedTuple):
    """What the server allows an adapter."""

    max_rank: int
    max_added_tokens: int


@dataclass(slots=True)
class Matcher:
    """Matches the tensors of one file with the targets of the model."""

    file: SafetensorsFile
    fields: Mapping[str, Any]  # of the configuration
    config: PeftConfig
    targets: ModelTargets
    limits: Limits
    problems: Problems
    notes: list[str] = field(default_factory=list)

    def match(
        self,
    ) -> tuple[dict[TargetIndex, Pair], dict[TargetIndex, Extras], dict[TargetIndex, OwnRows]]:
        """The valid pairs, extras and own rows; every other tensor becomes a problem."""
        halves: dict[str, dict[str, str]] = {}  # module -> half -> tensor's name
        others = []
        for key in self.file.infos:
            if match := _HALF.fullmatch(key):
                half = match["half"] or "embedding " + match["table"]
                halves.setdefault(match["module"], {})[half] = key
            elif not _TRAINING_ONLY.search(key):
                others.append(key)
        sites, report = self._sites(), self.problems.add
        extras, others = take_extras(others, self.file, self.config, sites, report)
        most = self.limits.max_added_tokens
        own, others = take_own(others, self.file, self.fields, self.targets, sites, most, report)
        self._leftover(others, sites)
        linears = sorted({path.rsplit(".", 1)[-1] for path in sites})
        pairs = {}
        for module, names in halves.items():
            site = sites.get(module)
            if site is None:
                self._no_such_module(module, linears)
            elif (pair := self._pair(module, names, site, own.get(site.place))) is not None:
                pairs[site.place] = pair
        if not halves and (others or not own):
            whole = any(key.removesuffix(".weight") in sites for key in others)
            remedy = FULL_MODEL if whole else RESAVE
            self.problems.add("empty", "the weight file has no LoRA tensors", None, remedy)
        self._check_extras(pairs, extras, own)
        for place in own.keys() & pairs.keys():
            end = self.targets.ends[place.group]
            if not end.embedding and own[place].vocab > end.vocab:
                own[place] = with_added_updates(own[place], pairs[place], end.vocab)
        return pairs, extras, own

    def _check_extras(
        self,
        pairs: Mapping[TargetIndex, Pair],
        extras: Mapping[TargetIndex, Extras],
        own: Mapping[TargetIndex, OwnRows],
    ) -> None:
        modules = {place: pair.module for place, pair in pairs.items()}
        last = self.targets.num_layers
        tables = {number for number, end in enumerate(self.targets.ends) if end.embedding}
        linears = {place for place in pairs if place.layer < last or place.group not in tables}
        check_complete(extras, modules, linears, self.config, self.problems.add)
        for place in own.keys() & extras.keys():
            self.problems.add(
                "both",
                f"{own[place].module} has rows of its own and DoRA magnitudes or a bias",
                "modules_to_save",
                "train it with one of them",
            )

    def _sites(self) -> dict[str, Site]:
        """Every target module of every layer, by its path."""
        return {
            target.module.format(layer=layer, expert=expert): Site(
                TargetIndex(layer, number, position, expert), group, target
            )
            for layer, number, group in self.targets.each_group()
            for position, target in enumerate(group.targets)
            for expert in range(group.experts or 1)
        }

    def _pair(
        self, module: str, names: dict[str, str], site: Site, own: OwnRows | None
    ) -> Pair | None:
        """The pair of one module, if dtype, shapes and rank are valid."""
        kind, halves = site.target.name, ("A", "B")
        if site.group.embedding:
            halves = ("embedding A", "embedding B")
        missing = [half for half in halves if half not in names]
        if missing or len(names) > 2:
            text = f"{module} has {' and '.join(sorted(names))} but not {' and '.join(missing)}"
            if not missing:
                text = f"{module} has LoRA tensors both of a linear and of an embedding"
            elif len(names) == len(missing) == 2:
                served, other = ("an embedding", "a linear")[:: 1 if site.group.embedding else -1]
                text = (
                    f"{module} is {served} in the served model, but has the LoRA tensors of {other}"
                )
            self.problems.add(f"half {kind}", text, module, "save the complete adapter again")
            return None
        a, b = (self.file.infos[names[half]] for half in halves)
        if not self._shapes_fit(module, a, b, site, own):
            return None
        rank, configured = a.shape[0], self.config.rank(module)
        if rank != configured:
            self.problems.add(
                f"rank {kind}",
                f"{module} has rank {rank}, but adapter_config.json says {configured}",
                "rank_pattern",
                "set r or rank_pattern to this rank; the scale depends on it",
            )
            return None
        if rank > min(self.limits.max_rank, MAX_RANK):
            self.problems.add(
                "max rank",
                f"{module} has rank {rank}; the limit is {self.limits.max_rank}",
                "r",
                f"start the server with --max-adapter-rank {rank}",
            )
            return None
        matrices = [self.file.matrix(names[half]) for half in halves]
        return Pair(matrices[0], matrices[1], self.config.scale(module), module)

    def _shapes_fit(
        self, module: str, a: TensorInfo, b: TensorInfo, site: Site, own: OwnRows | None
    ) -> bool:
        kind = site.target.name
        for info in (a, b):
            if info.dtype not in DTYPES:
                hint = f"save the adapter in one of {', '.join(DTYPES)}"
                self.problems.add(
                    f"dtype {info.dtype}",
                    f"{module} has the dtype {shown(info.dtype)}, which is not supported",
                    module,
                    hint,
                )
                return False
        for half, info in (("A", a), ("B", b)):
            if 0 in info.shape:
                text = f"lora_{half} of {module} was saved empty, with the shape {shown_shape(info.shape)}"
                self.problems.add(f"empty {kind}", text, module, _GATHER)
                return False
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            shapes = f"{shown_shape(a.shape)} and {shown_shape(b.shape)}"
            text = f"{module} has shapes {shapes}, which are not those of a LoRA pair"
            self.problems.add(f"shape {kind}", text, module, _GATHER)
            return False
        have = (a.shape[1], b.shape[0])
        want = (site.group.in_features, site.target.out_features)
        if own is not None and site.group.embedding:
            want = (own.vocab, want[1])
        elif own is not None:
            want = (want[0], own.vocab)
        if have == want:
            return True
        hint = OTHER_BASE
        base = f" ({shown(self.config.base_model)})" if self.config.base_model else ""
        self.problems.add(
            f"base {kind}",
            f"trained on another base model{base}: {module} maps {have[0]} to {have[1]} in the adapter,"
            f" but {want[0]} to {want[1]} in the served model",
            module,
            hint,
        )
        return False

    def _no_such_module(self, module: str, linears: Sequence[str]) -> None:
        """`linears`: the names of all LoRA targets, without their path."""
        kind = _kind(module)
        if "expert" in module:
            why = "is an expert of a mixture-of-experts model, which cannot be adapted"
            hint = "train on the attention's linear layers only"
        elif module.rsplit(".", 1)[-1] in linears:
            why = "is not in the served model"
            hint = OTHER_BASE
        else:
            why = "is not a LoRA target of this model"
            hint = f"train on {', '.join(linears)} only"
        self.problems.add(f"module {kind}", f"{shown(module)} {why}", module, hint)

    def _leftover(self, keys: list[str], sites: dict[str, Site]) -> None:
        """Tensors that do not belong to a pair."""
        targets = {path.rpartition(".")[2] for path in sites}
        for key in keys:
            found = describe(key, _kind(key), sites, targets)
            self.problems.add(found.kind, found.text, found.field, found.remedy)
