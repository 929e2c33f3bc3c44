"""PEFT's `rank_pattern` and `alpha_pattern`: module names or regular expressions, each with a value.

The expressions come with the adapter, so they are a stranger's: those that could take more than polynomial time to
match are refused (Python's `re` holds the interpreter while it matches).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_PATTERNS = 4096
MAX_LENGTH = 512  # characters of one expression
PATH_LENGTH = 64  # characters of a module's path: so many ways has an unbounded repeat to end
MAX_WAYS = 1 << 18  # in which all expressions together may be tried on one path

_PLAIN = re.compile(r"[\w.^-]+")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


@dataclass(frozen=True, slots=True)
class Pattern:
    """Values by module: the first key that matches decides, as in `peft.utils.other.get_pattern_key`."""

    rules: tuple[tuple[re.Pattern[str], float], ...]
    default: float

    def value(self, module: str) -> float:
        """The value for a module's full path."""
        for rule, value in self.rules:
            if rule.match(module):
                return value
        return self.default


def compile_pattern(given: Mapping[str, float], default: float) -> Pattern:
    """Semantics: the value of the first key for which `re.match(rf"(.*\\.)?({key})$", module)`, else the default.

    Raises ValueError that says which key cannot be used and why.
    """
    if len(given) > MAX_PATTERNS:
        raise ValueError(f"has {len(given)} entries, at most {MAX_PATTERNS} are read")
    rules, ways = [], 0
    for key, value in given.items():
        if len(key) > MAX_LENGTH:
            raise ValueError(f"has a key of {len(key)} characters, at most {MAX_LENGTH} are read")
        if not _PLAIN.fullmatch(key):
            ways += _ways(key)
            if _REPEATED_GROUP.search(key) or ways > MAX_WAYS:
                raise ValueError(
                    f"has a key with nested or too many repeats or alternatives: {key!r}"
                )
        try:
            rules.append((re.compile(rf"(.*\.)?({key})$"), value))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"has a key that is no regular expression: {key!r}: {error}") from None
    return Pattern(tuple(rules), default)


def _ways(key: str) -> int:
    """How many ways there are at most to go through an expression: each choice multiplies them."""
    ways, bars = 1, [0]  # of the groups that are open
    before = ""
    for char in key:
        if before == "\\":
            char = ""  # it stands for itself
        elif char == "(":
            bars.append(0)
        elif char == "|":
            bars[-1] += 1
        elif char == ")" and len(bars) > 1:
            ways *= bars.pop() + 1
        elif char in "*+{":
            ways *= PATH_LENGTH
        elif char == "?" and before != "(":
            ways *= 2
        before = char
    for left in bars:
        ways *= left + 1
    return ways
