"""Parses the files of an adapter into `LoraWeights` that fit the base model, or into a list of problems.

One function per format: `load_peft` today. The tensors decide which modules are adapted; `ModelTargets` lists those
that can be. Every other tensor is refused by name, never dropped. Matrices have PEFT's shapes: A `[r, in]` and B
`[out, r]`, also for GPT-2's Conv1D (PEFT stores ordinary linears there, whatever `fan_in_fan_out` says). An embedding
has `lora_embedding_A [r, vocab]` and `lora_embedding_B [hidden, r]`. Scales are alpha / r. They exclude the base
model's own embedding scale (Gemma), which the model applies to the sum, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.errors import AdapterIncompatible
from engine.files import OpenFile
from engine.lora.keys import plain_keys
from engine.lora.matcher import Limits, Matcher, Problems
from engine.lora.peft_config import check_config, read_config
from engine.lora.tensors import SafetensorsFile
from engine.lora.weights import LoraWeights
from engine.names import shown
from engine.ops.layout import MAX_RANK
from engine.ops.targets import ModelTargets

MAX_ADDED_TOKENS = 256
MAX_SUMMARY = 500  # characters of all problems as one error, if the first is not longer


def load_peft(
    config: OpenFile,
    weights: OpenFile,
    targets: ModelTargets,
    *,
    shards: Sequence[OpenFile] = (),
    max_rank: int = MAX_RANK,
    max_added_tokens: int = MAX_ADDED_TOKENS,
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
        config,
        weights,
        targets,
        shards=shards,
        max_rank=max_rank,
        max_added_tokens=max_added_tokens,
        base_model=base_model,
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
    max_added_tokens: int = MAX_ADDED_TOKENS,
    base_model: str | None = None,
) -> tuple[LoraWeights | None, list[AdapterIncompatible]]:
    """Like `load_peft`, but returns the problems instead of raising. The weights are None if there is a problem."""
    fields = read_config(config)
    parsed, refused = check_config(fields)
    problems = Problems()
    for number, error in enumerate(refused):
        problems.add(f"config {number}", error.message, error.field, error.hint)
    if parsed is None:
        return None, problems.errors()
    file = SafetensorsFile(weights, shards)
    file.rename(plain_keys(file.infos, problems.add))
    limits = Limits(max_rank, max_added_tokens)
    matcher = Matcher(file, fields, parsed, targets, limits, problems)
    pairs, extras, own = matcher.match()
    errors = problems.errors()
    if errors:
        return None, errors
    notes = [*parsed.notes, *matcher.notes]
    if base_model and parsed.base_model and not same_base(parsed.base_model, base_model):
        notes.append(
            f"trained on {shown(parsed.base_model)}, served with {base_model}; the shapes match"
        )
    return LoraWeights(pairs, extras, own, parsed.base_model, notes, file.verify, file.close), []


def same_base(named: str, served: str) -> bool:
    """Whether two names mean one base model: they are equal, or one is a folder with the other's last part."""
    if named == served:
        return True
    paths = [name for name in (named, served) if name.count("/") != 1 or name[0] in "./~"]
    return bool(paths) and Path(named).name.lower() == Path(served).name.lower() != ""
