"""PEFT's `rank_pattern` and `alpha_pattern`: module names or regular expressions, each with a value.

The expressions come with the adapter and are untrusted. RE2 matches all keys of a pattern at once, in time linear in
the length of the path. Its memory and the size of its programs are limited.

RE2 supports most of Python's expressions but reads some of them differently; those are refused. Module paths are ASCII
without line breaks, so differences in Unicode and at line ends do not matter.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import re2

from engine.errors import AdapterIncompatible
from engine.names import shown

MAX_PATTERNS = 4096
MAX_LENGTH = 512  # characters of one key
MAX_INSTRUCTIONS = 4096  # of RE2's programs for a pattern; plain names do not count
REMEDY = "use module names as keys, or expressions of groups, classes, alternatives and repeats"

_KEY_BYTES = 1 << 20  # RE2's memory limit to compile one key
_SET_BYTES = 4 << 20  # RE2's memory limit for a set of keys and its cache of states
_BYTES_PER_CHARACTER = 128  # memory to compile plain names into a set

# A name. A dot matches any character, as in Python, so every match has the length of the name.
_PLAIN = re.compile(r"(?P<start>\^?)(?P<name>(?:[\w.-]|\\[.-])++)\$?", re.ASCII)
# Syntax that RE2 lacks or reads differently from Python: back references and rare escapes, look-around, inline flags,
# POSIX classes, counts without a lower bound or with a leading zero.
_FOREIGN = re.compile(
    r"\\(?:[^\W_dDwWsSbBAtnrfv]|[^\x00-\x7f])|\(\?(?!:|P<|[ims]+:).?|\[:|\{,|\{(?:\d+,)?0\d",
    re.ASCII | re.DOTALL,
)
_ESCAPED = re.compile(r"\\[\W_]", re.ASCII)
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
_ANY_CASE = re.compile(r"\(\?[ms]*i")  # a few non-ASCII letters are ASCII in the other case


class _Set:
    """Keys that are matched at the same time."""

    def __init__(self, max_bytes: int) -> None:
        self._numbers: list[int] = []
        self._set = re2.Set.FullMatchSet(_options(max_bytes))

    def add(self, number: int, expression: str) -> None:
        """Adds a key; call it before `compile`. Raises re2.error."""
        self._set.Add(_encoded(expression))
        self._numbers.append(number)

    def compile(self) -> _Set:
        """Raises re2.error if the keys together are too large."""
        self._set.Add(b"(?s:.*)")  # always matches: no match at all means out of memory
        self._set.Compile()
        return self

    def matches(self, text: str) -> Iterator[int]:
        """The numbers of the keys that match the whole text."""
        found = self._set.Match(_encoded(text)) or ()
        if len(self._numbers) not in found:
            raise AdapterIncompatible(
                "matching the expressions of rank_pattern or alpha_pattern needs too much memory",
                hint=REMEDY,
            )
        return (self._numbers[index] for index in found if index < len(self._numbers))


@dataclass(slots=True)
class Pattern:
    """Values by module. The first matching key decides, as in `peft.utils.other.get_pattern_key`."""

    values: tuple[float, ...]  # by the number of the key
    default: float
    # Plain names by (must it match the whole path?, length). Names of a length that no path has are never compiled.
    plain: dict[tuple[bool, int], list[tuple[int, str]]]
    whole: _Set  # expressions that match the whole path
    part: _Set  # the same expressions, for the part after any dot
    _sets: dict[tuple[bool, int], _Set] = field(default_factory=dict)
    _found: dict[str, float] = field(default_factory=dict)

    def value(self, module: str) -> float:
        """The value for a module's full path. Raises AdapterIncompatible if RE2 runs out of memory."""
        if not self.values:
            return self.default
        if module not in self._found:
            number = min(self._matches(module), default=None)
            self._found[module] = self.default if number is None else self.values[number]
        return self._found[module]

    def _matches(self, module: str) -> Iterator[int]:
        yield from self._names(True, module)
        yield from self._names(False, module)
        yield from self.whole.matches(module)
        for dot in (at for at, character in enumerate(module) if character == "."):
            yield from self._names(False, module[dot + 1 :])
            yield from self.part.matches(module[dot:])

    def _names(self, whole: bool, text: str) -> Iterator[int]:
        kind = whole, len(text)
        if kind not in self.plain:
            return iter(())
        if kind not in self._sets:
            names = self.plain[kind]
            found = _Set(_SET_BYTES + _BYTES_PER_CHARACTER * len(names) * len(text))
            for number, name in names:
                found.add(number, name)
            self._sets[kind] = found.compile()
        return self._sets[kind].matches(text)


def check_bounds(given: Mapping[str, object]) -> None:
    """Raises ValueError if the keys are too many or too long."""
    if len(given) > MAX_PATTERNS:
        raise ValueError(f"has {len(given)} entries, the limit is {MAX_PATTERNS}")
    longest = max(map(len, given), default=0)
    if longest > MAX_LENGTH:
        raise ValueError(f"has a key of {longest} characters, the limit is {MAX_LENGTH}")


def compile_pattern(given: Mapping[str, float], default: float) -> Pattern:
    """Semantics: the value of the first key for which `re.match(rf"(.*\\.)?({key})$", module)`, else the default.

    Raises ValueError that names the key and the reason.
    """
    check_bounds(given)
    plain: dict[tuple[bool, int], list[tuple[int, str]]] = defaultdict(list)
    whole, part, instructions = _Set(_SET_BYTES), _Set(_SET_BYTES), 0
    for number, key in enumerate(given):
        if match := _PLAIN.fullmatch(key):
            name = match["name"]
            plain[bool(match["start"]), len(name) - name.count("\\")].append((number, name))
            continue
        instructions += _size(key)
        if instructions > MAX_INSTRUCTIONS:
            raise ValueError(
                f"has expressions that are too large together, up to the key '{shown(key)}'"
            )
        whole.add(number, key)
        part.add(number, rf"\.(?:{key})")
    try:
        return Pattern(tuple(given.values()), default, plain, whole.compile(), part.compile())
    except re2.error:
        raise ValueError("has expressions that are too large together") from None


def _size(key: str) -> int:
    """Number of instructions of one expression. Compiles it alone, since only RE2 knows the size."""
    plain = _ESCAPED.sub("..", key)
    foreign = _FOREIGN.search(plain) or (not key.isascii() and _ANY_CASE.search(plain))
    if foreign:
        raise ValueError(f"has the key '{shown(key)}'; '{shown(foreign[0])}' is not supported")
    try:
        return int(re2.compile(_encoded(key), _options(_KEY_BYTES)).programsize)
    except re2.error as error:
        why = error.args[0] if error.args else ""
        why = why.decode("latin-1") if isinstance(why, bytes) else str(why)
        raise ValueError(f"has the invalid key '{shown(key)}': {shown(why)}") from None


def _options(max_bytes: int) -> re2.Options:
    """Latin-1 makes the programs small; RE2 logs nothing."""
    options = re2.Options()
    options.max_mem = max_bytes
    options.encoding = re2.Options.Encoding.LATIN1
    options.log_errors = False
    options.never_capture = True
    return options


def _encoded(expression: str) -> bytes:
    """One byte per character. All non-ASCII characters become the same byte, since no path has any."""
    return _BEYOND_ASCII.sub("\xff", expression).encode("latin-1")
