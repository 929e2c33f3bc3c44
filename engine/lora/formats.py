"""Parses the files of an adapter into `LoraWeights` that fit the base model, or into a list of problems.

One function per format: `load_peft` today. The tensors decide which modules are adapted; `ModelTargets` lists those
that can be. Every other tensor is refused by name, never dropped. Matrices have PEFT's shapes: A `[r, in]` and B
`[out, r]`, also for GPT-2's Conv1D (PEFT stores ordinary linears there, whatever `fan_in_fan_out` says). An embedding
has `lora_embedding_A [r, vocab]` and `lora_embedding_B [hidden, r]`. Scales are alpha / r. They exclude the base
model's own embedding scale (Gemma), which the model applies to the sum, as PEFT does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import RESAVE, AdapterIncompatible
from engine.files import OpenFile
from engine.lora.keys import plain_keys
from engine.lora.leftovers import FULL_MODEL, describe
from engine.lora.peft_config import PeftConfig, check_config, read_config
from engine.lora.tensors import DTYPES, SafetensorsFile, TensorInfo
from engine.lora.weights import LoraWeights, Pair, TargetIndex
from engine.names import shown, shown_shape
from engine.ops.layout import MAX_RANK
from engine.ops.targets import Group, ModelTargets, Target

MAX_SUMMARY = 500  # characters of all problems as one error, if the first is not longer
MAX_PROBLEMS = 64  # kinds of problems that are listed

_HALF = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<half>[AB])\.weight|lora_embedding_(?P<table>[AB]))"
)
_TRAINING_ONLY = re.compile(r"\.lora_(velora|monteclora)_")  # PEFT does not read them at inference
_GATHER = "gather sharded weights (ZeRO-3, FSDP) before saving"
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class _Site:
    """Where a target module is in the model."""

    index: TargetIndex
    group: Group
    target: Target


def _kind(name: str) -> str:
    """A name without layer numbers, so that a problem is the same kind in every layer."""
    return _NUMBER.sub("", shown(name))


@dataclass(slots=True)
class _Problems:
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


def load_peft(
    config: OpenFile,
    weights: OpenFile,
    targets: ModelTargets,
    *,
    shards: Sequence[OpenFile] = (),
    max_rank: int = MAX_RANK,
    base_model: str | None = None,
) -> LoraWeights:
    """The LoRA in a PEFT folder's `config` and `weights`, a safetensors file (see `engine.sandbox.Converter`).

    `shards`: if `weights` is the index of a sharded file, the files that it names. Matrices are read from the weight
    files later, so they must stay open; closing the result closes them.

    `base_model`: id of the served model. Another name in the adapter gives a note only, because the shapes decide.
    Values are not checked here; `write_image` refuses values that are not finite. Raises AdapterIncompatible with the
    reasons, or AdapterLoadFailed.
    """
    found, problems = check_peft(
        config, weights, targets, shards=shards, max_rank=max_rank, base_model=base_model
    )
    if found is None:
        raise summary(problems)
    return found


def summary(problems: Sequence[AdapterIncompatible]) -> AdapterIncompatible:
    """All problems as one error: the first in full, up to two more that are short."""
    first, text, listed = problems[0], problems[0].message, 1
    for problem in problems[1:3]:
        if len(text) + len(problem.message) > MAX_SUMMARY:
            break
        text += f"; {problem.message}"
        listed += 1
    if len(problems) > listed:
        text += f"; and {len(problems) - listed} more problems"
    return AdapterIncompatible(text, field=first.field, hint=first.hint)


def check_peft(
    config: OpenFile,
    weights: OpenFile,
    targets: ModelTargets,
    *,
    shards: Sequence[OpenFile] = (),
    max_rank: int = MAX_RANK,
    base_model: str | None = None,
) -> tuple[LoraWeights | None, list[AdapterIncompatible]]:
    """Like `load_peft`, but returns the problems instead of raising. The weights are None if there is a problem."""
    parsed, refused = check_config(read_config(config))
    problems = _Problems()
    for number, error in enumerate(refused):
        problems.add(f"config {number}", error.message, error.field, error.hint)
    if parsed is None:
        return None, problems.errors()
    file = SafetensorsFile(weights, shards)
    file.rename(plain_keys(file.infos, problems.add))
    matcher = _Matcher(file, parsed, targets, max_rank, problems)
    pairs = matcher.pairs()
    errors = problems.errors()
    if errors:
        return None, errors
    notes = [*parsed.notes, *matcher.notes]
    if base_model and parsed.base_model and not same_base(parsed.base_model, base_model):
        notes.append(
            f"trained on {shown(parsed.base_model)}, served with {base_model}; the shapes match"
        )
    return LoraWeights(pairs, parsed.base_model, notes, file.verify, file.close), []


def same_base(named: str, served: str) -> bool:
    """Whether two names mean one base model: they are equal, or one is a folder with the other's last part."""
    if named == served:
        return True
    paths = [name for name in (named, served) if name.count("/") != 1 or name[0] in "./~"]
    return bool(paths) and Path(named).name.lower() == Path(served).name.lower() != ""


@dataclass(slots=True)
class _Matcher:
    """Matches the tensors of one file with the targets of the model."""

    file: SafetensorsFile
    config: PeftConfig
    targets: ModelTargets
    max_rank: int
    problems: _Problems
    notes: list[str] = field(default_factory=list)

    def pairs(self) -> dict[TargetIndex, Pair]:
        """The valid pairs; every other tensor becomes a problem."""
        halves: dict[str, dict[str, str]] = {}  # module -> half -> tensor's name
        others = []
        for key in self.file.infos:
            if match := _HALF.fullmatch(key):
                half = match["half"] or "embedding " + match["table"]
                halves.setdefault(match["module"], {})[half] = key
            elif not _TRAINING_ONLY.search(key):
                others.append(key)
        sites = self._sites()
        self._leftover(others, sites)
        linears = sorted({path.rsplit(".", 1)[-1] for path in sites})
        pairs = {}
        for module, names in halves.items():
            site = sites.get(module)
            if site is None:
                self._no_such_module(module, linears)
            elif (pair := self._pair(module, names, site)) is not None:
                pairs[site.index] = pair
        if not halves:
            whole = any(key.removesuffix(".weight") in sites for key in others)
            remedy = FULL_MODEL if whole else RESAVE
            self.problems.add("empty", "the weight file has no LoRA tensors", None, remedy)
        return pairs

    def _sites(self) -> dict[str, _Site]:
        """Every target module of every layer, by its path."""
        return {
            target.module.format(layer=layer, expert=expert): _Site(
                TargetIndex(layer, number, position, expert), group, target
            )
            for layer, number, group in self.targets.each_group()
            for position, target in enumerate(group.targets)
            for expert in range(group.experts or 1)
        }

    def _pair(self, module: str, names: dict[str, str], site: _Site) -> Pair | None:
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
        if not self._shapes_fit(module, a, b, site):
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
        if rank > min(self.max_rank, MAX_RANK):
            self.problems.add(
                "max rank",
                f"{module} has rank {rank}; the limit is {self.max_rank}",
                "r",
                f"start the server with --max-adapter-rank {rank}",
            )
            return None
        matrices = [self.file.matrix(names[half]) for half in halves]
        return Pair(matrices[0], matrices[1], self.config.scale(module), module)

    def _shapes_fit(self, module: str, a: TensorInfo, b: TensorInfo, site: _Site) -> bool:
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
        if have == want:
            return True
        hint = "use an adapter of this base model, or serve the adapter's base model"
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
            hint = "use an adapter of this base model, or serve the adapter's base model"
        else:
            why = "is not a LoRA target of this model"
            hint = f"train on {', '.join(linears)} only"
        self.problems.add(f"module {kind}", f"{shown(module)} {why}", module, hint)

    def _leftover(self, keys: list[str], sites: dict[str, _Site]) -> None:
        """Tensors that do not belong to a pair."""
        targets = {path.rpartition(".")[2] for path in sites}
        for key in keys:
            found = describe(key, _kind(key), sites, targets)
            self.problems.add(found.kind, found.text, found.field, found.remedy)
