"""Hostile `adapter_config.json`. Each function replaces a folder's good one; variations come from `chosen`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tools.attack.pickles import Kind

CONFIG = "adapter_config.json"

# Expressions that backtrack exponentially or nearly so on a module's path.
BACKTRACKING = {
    "nested repeats": ["(x+x+)+y", "(([a-z_.0-9])*)*Z", "(\\w+\\w+)+Z", "((\\w)+)+Z"],
    "verbose mode": ["(?x)(\\w +)+Z", "(?x)( (\\w) * ) *Z", "(?x)(\\w+ # a\n)+Z"],
    "nested alternatives": ["(\\w|\\w\\w)+Z", "((a|e|l|\\w)|(\\w|\\.))*Z", "(?:\\w|\\w\\w|\\.)+?Z"],
    "back references": ["(\\w*)(\\w*)\\1\\2(\\w*)\\3Z", "(.*)(.*)(.*)\\3\\2\\1Z"],
    "look-around": ["(?=(\\w+\\w+)+Z)", "(?!(\\w+\\w+)+Z)x", "(?<=\\w)(\\w+\\w+)+Z"],
    "counted repeats": ["(\\w{1,30}){1,30}Z", "(\\w{0,99}\\w{0,99}){50}Z", "\\w{1,65535}Z"],
    "optional parts": ["(\\w?){60}\\w{60}Z", "(\\w??){80}Z", "\\w?" * 80 + "Z"],
    "conditionals": ["(\\w)?(?(1)(\\w+)+|\\w+)*Z", "(?>\\w+)+(\\w+\\w+)+Z"],
}


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def backtracking(style: str) -> Kind:
    """A kind that gives `rank_pattern` or `alpha_pattern` expressions of one style."""

    def write(folder: Path, chosen: random.Random) -> None:
        expression = chosen.choice(BACKTRACKING[style])
        field = chosen.choice(["rank_pattern", "alpha_pattern"])
        # What matches nothing has no effect: an unusable rank makes sure that the adapter cannot be served.
        change(folder, **{field: {expression: 4}, "r": 3})

    return write


def many_patterns(folder: Path, chosen: random.Random) -> None:
    """4,090 patterns of 500 characters."""
    count = chosen.choice([4090, 4096, 50_000])
    change(folder, rank_pattern={f"{'x' * 490}.{i}": 4 for i in range(count)}, r=3)


def many_fields(folder: Path, chosen: random.Random) -> None:
    """100,000 fields that no version of PEFT has."""
    count = chosen.choice([20_000, 100_000])
    change(folder, **{f"f{i}{chosen.getrandbits(16)}": 1 for i in range(count)})


def deep_json(folder: Path, chosen: random.Random) -> None:
    depth = chosen.choice([2_000, 100_000, 2_000_000])
    pair = chosen.choice([("[", "]"), ('{"a":', "1}")])
    inner = pair[0] * depth + ("" if pair[0] == "[" else "1") + pair[1].replace("1", "") * depth
    (folder / CONFIG).write_text('{"peft_type": "LORA", "x": ' + inner + "}")


def long_text(folder: Path, chosen: random.Random) -> None:
    """4 MiB of text where a word is meant."""
    size = (4 << 20) + chosen.choice([-1000, -100_000, 1])
    field = chosen.choice(["peft_type", "bias", "init_lora_weights", "x" * 1000])
    change(folder, **{field: chosen.choice("xé") * (size // 2)})


def target_modules(folder: Path, chosen: random.Random) -> None:
    """A catastrophic expression where PEFT would match modules by it. It has no effect here; the rank is wrong."""
    style = chosen.choice(list(BACKTRACKING))
    change(folder, target_modules=chosen.choice(BACKTRACKING[style]), r=3)


def absurd_numbers(folder: Path, chosen: random.Random) -> None:
    field = chosen.choice(["r", "lora_alpha"])
    change(folder, **{field: chosen.choice([1e300, -1e300, 10**400, float("nan"), "8", [8], 1e31])})


def escapes(folder: Path, chosen: random.Random) -> None:
    """ANSI codes and line ends in what an error or a log line may repeat."""
    bad = "\x1b[2J\x1b[31mfatal\x1b[0m\n2026-01-01 00:00:00 CRITICAL forged: Traceback \x07"
    change(folder, base_model_name_or_path=bad, peft_type=bad if chosen.random() < 0.5 else "LORA")
    change(folder, r=3, bias=bad)


def not_an_object(folder: Path, chosen: random.Random) -> None:
    bodies = [b"", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"{", b"NaN", b"\0" * 1000]
    (folder / CONFIG).write_bytes(chosen.choice(bodies))


def half_characters(folder: Path, chosen: random.Random) -> None:
    """Half a surrogate pair, which no error message can carry as UTF-8."""
    change(folder, **{chosen.choice(["peft_type", "bias", "\ud83d"]): "\udc00"})


def wrong_types(folder: Path, chosen: random.Random) -> None:
    fields = ["rank_pattern", "alpha_pattern", "r", "lora_alpha", "init_lora_weights", "peft_type"]
    values: list[Any] = [[1], {"a": {"b": 1}}, {"a": "1"}, "x", {"(": 4}, {"": None}]
    change(folder, r=3)
    change(folder, **{chosen.choice(fields): chosen.choice(values)})


KINDS: dict[str, Kind] = {
    **{f"config pattern, {style}": backtracking(style) for style in BACKTRACKING},
    "config of 4,090 long patterns": many_patterns,
    "config of 100,000 fields": many_fields,
    "config deep JSON": deep_json,
    "config text of 4 MiB": long_text,
    "config target_modules": target_modules,
    "config numbers of 1e300": absurd_numbers,
    "config with control codes": escapes,
    "config not an object": not_an_object,
    "config half characters": half_characters,
    "config of wrong types": wrong_types,
}
