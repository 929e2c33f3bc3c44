"""Compares the modules that a configuration names with those that have tensors. Differences give notes, not errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.lora.weights import LoraWeights
from engine.ops.targets import ModelTargets
from engine.sandbox import LimitReached, Limits, SandboxError, run
from engine.sandbox.tasks.match import FIELDS

TASK = "engine.sandbox.tasks.match"
MATCH_S = 2
_LIMITS = Limits(cpu_s=MATCH_S, wall_s=60.0, memory_bytes=256 << 20)


def module_notes(
    fields: Mapping[str, Any], weights: LoraWeights, targets: ModelTargets
) -> list[str]:
    """Compares `target_modules` of an adapter_config.json with the file and the served model, by PEFT's rules.

    It runs in a child process with a time limit, because an untrusted expression may run forever. RE2 cannot be used,
    because trainers write look-arounds.
    """
    if not fields.get("target_modules"):
        return []
    served = [
        target.module.format(layer=layer, expert=expert)
        for layer, _, group in targets.each_group()
        for target in group.targets
        for expert in range(group.experts or 1)
    ]
    ends = [target.module for group in targets.ends for target in group.targets]
    adapted = [pair.module for pair in weights.pairs.values()]
    arguments: dict[str, Any] = {"served": served, "ends": ends, "adapted": adapted}
    arguments |= {name: fields.get(name) for name in FIELDS}
    try:
        answer = run(TASK, {}, arguments, _LIMITS)
    except LimitReached as error:
        took = f"in {MATCH_S} s" if error.limit in ("cpu", "wall") else f"({error})"
        return [f"target_modules could not be matched {took}"]
    except SandboxError as error:
        return [f"target_modules could not be matched ({error})"]
    if "refused" in answer:
        return [f"target_modules could not be matched ({answer['refused']})"]
    notes = []
    if answer["missing"]:
        have = answer["named"] - answer["missing"]
        notes.append(
            f"target_modules names {answer['named']} modules, but the file has tensors for {have};"
            f" first without: {answer['first_missing']}"
        )
    if answer["extra"]:
        notes.append(
            f"the file has tensors for {answer['extra']} modules that target_modules does not name;"
            f" first: {answer['first_extra']}"
        )
    return notes
