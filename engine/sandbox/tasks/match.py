"""Which modules a PEFT configuration names, by the rules of peft 0.21's check_target_module_exists.

Its expressions are Python's and untrusted: one may never end. Arguments: `served`, modules of the base model
("all-linear" means all of them except `ends`, which are outside the layers); `adapted`, modules in the adapter's file;
and fields of the configuration. The answer is {"named", "first_missing", "missing", "extra", "first_extra"}, or
{"refused": the reason}.
"""

from __future__ import annotations

import re
from typing import Any

FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def prepare() -> None:
    pass


def run(descriptors: dict[str, int], arguments: dict[str, Any]) -> dict[str, Any]:
    served, adapted = arguments["served"], set(arguments["adapted"])
    try:
        named = [name for name in served if _is_named(name, arguments)]
    except (re.error, TypeError, ValueError, OverflowError, RecursionError) as error:
        return {"refused": str(error)[:500]}
    missing = [name for name in named if name not in adapted]
    known = set(named)
    extra = [name for name in arguments["adapted"] if name not in known]
    return {
        "named": len(named),
        "missing": len(missing),
        "first_missing": missing[0] if missing else None,
        "extra": len(extra),
        "first_extra": extra[0] if extra else None,
    }


def _is_named(module: str, config: dict[str, Any]) -> bool:
    if (exclude := config["exclude_modules"]) and _is_listed(module, exclude):
        return False
    target = config["target_modules"]
    if isinstance(target, str):
        if target.lower() == "all-linear":
            return module not in config["ends"]
        return re.fullmatch(target, module) is not None
    return _is_listed(module, target) and (module in target or _is_in_layers(module, config))


def _is_listed(module: str, names: Any) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _is_in_layers(module: str, config: dict[str, Any]) -> bool:
    layers, patterns = config["layers_to_transform"], config["layers_pattern"]
    if layers is None or layers == []:
        return True
    if not patterns:
        expressions = [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    else:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
    found = next((m for one in expressions if (m := re.match(one, module))), None)
    if found is None:
        return False
    layer = int(found["idx"])
    return layer == layers if isinstance(layers, int) else layer in layers
