"""Whatever stands in an adapter's files, reading it ends soon, and what is said of it is short and on one line."""

from __future__ import annotations

import json
import re
import struct
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import re2
from hypothesis import given, settings
from peft.utils.other import get_pattern_key

from engine.errors import AdapterIncompatible, AdapterLoadFailed
from engine.files import OpenFile
from engine.lora import patterns, peft_config
from engine.lora.formats import check_peft, summary
from engine.lora.matcher import MAX_PROBLEMS
from engine.lora.patterns import MAX_INSTRUCTIONS, MAX_LENGTH, MAX_PATTERNS, compile_pattern
from engine.lora.peft_config import MAX_FIELDS, check_config
from engine.names import MAX_SHOWN, shown, shown_shape, shown_value
from tests.lora import tiny

LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
MODULES = [f"model.layers.{layer}.{name}" for layer in range(160) for name in LINEARS]
FEW = [*MODULES[:7], *MODULES[77:84], "lm_head", "model.embed_tokens", "q_proj", "transformer.h.1.attn.c_attn",
       "aq_proj", "model.layersX0Xself_attnXq_proj", "a", "model.a", "b.c", "a.b.c", "x.1", "y.x.2"]  # fmt: skip


@contextmanager
def ends_soon(seconds: float = 20) -> Iterator[None]:
    """A generous bound, in seconds of this process: it is for what would take hours."""
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


def read_config(path: Path) -> dict[str, Any]:
    with OpenFile(path) as file:
        return peft_config.read_config(file)


def write_config(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1} | fields))
    return path


def write_weights(folder: Path, names: list[str], dtype: str = "F32", shape: Any = (1, 4)) -> Path:
    """A file of tensors that all share 16 bytes."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, 16]}
    header = json.dumps({name: entry for name in names}).encode()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    return path


def lines_of(error: AdapterIncompatible) -> list[str]:
    return [error.message, error.field or "", error.hint or ""]


# -- expressions

KEYS = [
    *("q_proj", "layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "proj", "_proj", "layers.1"),
    *("^model.layers.0.self_attn.q_proj", "^q_proj", "^layers.0.mlp.up_proj$", "lm_head$", "^", "$", "."),
    *(r"model\.layers\.0\.self_attn\.q_proj", r".*layers\.(0|1)\..*", r"layers\.[0-2]\..*v_proj"),
    *(r".*layers\.(?:0|11)\.self_attn.*", r"layers\.\d+\.mlp\.(gate|up)_proj", "self_attn.(q|k)_proj"),
    *(r".*\.(q|v)_proj", r"(?P<layer>\d+)\..*", "a|b.c", "x.(1|2)", "(^a|c)", r"\bq_proj", r".*\b0\b.*"),
    *(r"\Bq_proj", r"[^.]*", "[^.]+_proj", "[qk]_proj|lm_head", ".{5}j", r".*\.1{2}\..*", "(?i:Q_PROJ)"),
    *(r"\w+", r"[\w.]+down_proj", r"[a-c-q]_proj", "[]q]_proj", r"(q_proj|)", "(|a)*", r"model\..{1,20}?q_proj"),
    *("é|a", "[é-ü]*", "[^é]", "mödel", r"\S+\D", "", "q_proj\n", "(a$|b.c)", r"q\_pro(j)"),
]  # fmt: skip


def python_value(rules: dict[str, float], module: str) -> float:
    return rules.get(get_pattern_key(rules, module), 99)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_matches_what_peft_matches(key: str) -> None:
    pattern = compile_pattern({key: 1}, 99)
    for module in FEW:
        assert pattern.value(module) == python_value({key: 1}, module), module


def test_the_first_key_that_matches_decides() -> None:
    for shift in range(len(KEYS)):
        rules = {key: float(number) for number, key in enumerate(KEYS[shift:] + KEYS[:shift])}
        pattern = compile_pattern(rules, 99)
        for module in FEW:
            assert pattern.value(module) == python_value(rules, module), (shift, module)


PIECES = [*"aq01.|?*+()[]^$-\\{},:", "model", "layers", "q_proj", ".*", r"\.", r"\d", r"\w", r"\b", "(?:", "[^.]",
          "{2}", "{0,3}", "(a|b)", "[0-9]", r"\B", r"\1", r"\A", "(?i:", "é"]  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), max_size=4))
def test_no_key_is_read_otherwise_than_python_reads_it(keys: list[str]) -> None:
    """What is not refused decides as in PEFT."""
    rules = {key: float(number) for number, key in enumerate(keys)}
    try:
        pattern = compile_pattern(rules, 99)
    except ValueError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, of keys that it may read otherwise one day
        try:
            expected = [python_value(rules, module) for module in FEW]
        except re.error:
            return
    assert [pattern.value(module) for module in FEW] == expected


@pytest.mark.parametrize("key", [
    "(", "[", "*a", "a**", "a*+", "a{2}+", "(?>a)", "(?=a)b", "(?!a).*", "(?<=a)b", r"(a)\1", r"(?P<x>a)(?P=x)",
    "(?i)a", "(?x: a )", "(?#note)a", "(a)(?(1)b|c)", "(?U)a", "(?<x>a)", r"a\Z|b", r"\pL+", r"\Qa\E", r"\x{61}|b",
    "[[:alpha:]]", "a{,5}", "a{02}", "a{1,02}", "a)|(b", "(?i:\u017f)", r"\N{BULLET}|a", r"a\c", "(a{1000}){1000}",
    "((a{100}){100}){100}", "a{1001}", "(?:a{999}){2}", "a{999}" * 85, r"\C+",
])  # fmt: skip
def test_a_key_that_cannot_be_matched_as_in_python(
    key: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is named, with the remedy, and nothing is printed."""
    for name in ("rank_pattern", "alpha_pattern"):
        fields = read_config(write_config(tmp_path, **{name: {"q_proj": 1, key: 1}}))
        with ends_soon():
            config, (problem,) = check_config(fields)
        assert config is None and problem.field == name and name in problem.message
        assert shown(key) in problem.message and problem.hint == patterns.REMEDY
    assert capfd.readouterr() == ("", "")


HOSTILE = [
    *(
        "(a+)+!",
        "([a-z._0-9]+)*!",
        "(.|.)" * 28 + "!",
        ".?" * 200 + "!",
        ".*.*.*.*.*.*!",
        "((.*)*)*!",
    ),
    *(
        r"(\w+\.?)+!",
        "(a|a|.)*(b|.)*(.|c)*!",
        "(?:.*.*)?(?:.*.*)?(?:.*.*)?(?:.*.*)?!",
        "(.*){1,12}!",
    ),
    *("(.?){200}!", "(|.|..)" * 40 + "!", "(?:[a-z]*[._]?)*!", "(?:x|.)*[aeq].{30}"),
]


@pytest.mark.parametrize("key", HOSTILE)
def test_an_expression_that_python_would_match_for_hours(key: str) -> None:
    pattern = compile_pattern({key: 5}, 7)
    with ends_soon():
        assert {pattern.value(module) for module in MODULES} == {7}


@pytest.mark.parametrize(
    "key", ["(a+)(?#)+!", "(?x: ([a-z._0-9]+) + )!", "([a-z._0-9]+)(?#again)*!"]
)
def test_an_expression_whose_repeat_is_hidden(key: str) -> None:
    """Refused or matched, it ends."""
    with ends_soon():
        try:
            pattern = compile_pattern({key: 5}, 7)
        except ValueError:
            return
        assert {pattern.value(module) for module in MODULES} == {7}


def numbered(text: str, count: int = MAX_PATTERNS) -> list[str]:
    return [text.replace("#", f"{number:04}") for number in range(count)]


MANY = {
    "names": MODULES,
    "whole names": [f"^{module}" for module in MODULES],
    "long names": numbered("m." * (MAX_LENGTH // 2 - 2) + "#"),
    "dots": numbered("." * 27 + "#") + numbered("." * 23 + "#"),
    "expressions": [rf".*layers\.{layer}\..*(q|k)_proj" for layer in range(120)],
    "hostile": [f".*[{number % 10}aelmrsp](?:.?.{number}?){{20}}" for number in range(18)],
}


@pytest.mark.parametrize("case", MANY)
def test_as_many_keys_as_are_read(case: str) -> None:
    rules = {key: number for number, key in enumerate(MANY[case][:MAX_PATTERNS])}
    with ends_soon():
        pattern = compile_pattern(rules, 9999)
        found = [pattern.value(module) for module in MODULES]
    if case in ("names", "whole names", "expressions"):
        for number in range(0, len(MODULES), 300):
            assert found[number] == rules.get(get_pattern_key(rules, MODULES[number]), 9999)


def test_expressions_that_are_too_large_together() -> None:
    with pytest.raises(ValueError, match=r"too large together, up to the key '\.\*\d+"):
        compile_pattern(dict.fromkeys(numbered(".*#[a-z]"), 1), 1)
    with ends_soon(), pytest.raises(ValueError, match="too large together"):
        compile_pattern({f"[ab]{{{1000 - number}}}": 1 for number in range(900)}, 1)
    size = patterns._size("(a|b)c{500}")
    rules = {f"(a|b)c{{500}}{chr(97 + number)}": 1 for number in range(MAX_INSTRUCTIONS // size)}
    assert compile_pattern(rules, 5).value("x.b" + "c" * 500 + "a") == 1


def test_out_of_memory_is_not_taken_for_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """RE2's answer is empty in both cases; a key that matches always tells them apart."""
    for key in ("q_proj", "(q|k)_proj"):
        pattern = compile_pattern({key: 1}, 2)
        assert pattern.value("a.q_proj") == 1 and pattern.value("a.v_proj") == 2
        with monkeypatch.context() as context:
            context.setattr(re2.Set, "Match", lambda self, text: None)
            with pytest.raises(AdapterIncompatible, match="memory"):
                compile_pattern({key: 1}, 2).value("a.q_proj")


def test_patterns_at_their_bounds() -> None:
    names = numbered("m#")
    assert len(names) == MAX_PATTERNS
    assert compile_pattern(dict.fromkeys(names, 1), 2).value("a.m4095") == 1
    with pytest.raises(
        ValueError, match=f"{MAX_PATTERNS + 1} entries, the limit is {MAX_PATTERNS}"
    ):
        compile_pattern(dict.fromkeys([*names, "one"], 1), 2)
    for key in ("a" * MAX_LENGTH, "(b|c)" + "a" * (MAX_LENGTH - 5)):
        path = "a.c" + key[5:] if "|" in key else f"a.{key}"
        assert compile_pattern({key: 1}, 2).value(path) == 1
        with pytest.raises(
            ValueError, match=f"{MAX_LENGTH + 1} characters, the limit is {MAX_LENGTH}"
        ):
            compile_pattern({key + "a": 1}, 2)


# -- the configuration


def test_fields_at_their_bound(tmp_path: Path) -> None:
    free = MAX_FIELDS - 3
    fields = read_config(write_config(tmp_path, **{f"f{n}": None for n in range(free)}))
    assert len(fields) == MAX_FIELDS and check_config(fields)[1] == []
    with pytest.raises(AdapterIncompatible, match=f"{MAX_FIELDS + 1} fields, the limit is {MAX_FIELDS}"):  # fmt: skip
        read_config(write_config(tmp_path, **{f"f{n}": None for n in range(free + 1)}))


def test_bytes_at_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config(tmp_path)
    monkeypatch.setattr(peft_config, "MAX_CONFIG_BYTES", path.stat().st_size)
    assert read_config(path)["r"] == 1
    path.write_text(path.read_text() + " ")
    with pytest.raises(AdapterIncompatible, match="larger than"):
        read_config(path)


def test_long_lists_of_modules_are_taken(tmp_path: Path) -> None:
    """Trainers write them."""
    modules = [f"model.layers.{number}.self_attn.q_proj" for number in range(50_000)]
    path = write_config(tmp_path, target_modules=modules, exclude_modules="|".join(modules[:20_000]))  # fmt: skip
    config, problems = check_config(read_config(path))
    assert config is not None and not problems


@pytest.mark.parametrize("text", [
    '{"r": ' + "[" * 200_000, "[" * 200_000, '{"a": "\\ud800"}', '{"\\uDFFF": 1}', '{"r": ' + "9" * 5000 + "}",
    "[1]", "3", "null", "{}}", '{"r": 1,}',
])  # fmt: skip
def test_what_is_no_configuration(text: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(text)
    with ends_soon(), pytest.raises(AdapterIncompatible, match=r"adapter_config\.json"):
        read_config(path)


@pytest.mark.parametrize("text", ["", "{", '{"r": 8,', '{"peft_type": "LO'])
def test_a_configuration_that_ends_early(text: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(text)
    with pytest.raises(AdapterLoadFailed, match=r"adapter_config\.json is incomplete"):
        read_config(path)


@pytest.mark.parametrize("data", [b'{"a": "\xed\xa0\x80"}', b"\xff\xfe{", b'{"a": "\xff"}'])
def test_bytes_that_are_no_text(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(data)
    with pytest.raises(AdapterIncompatible, match="not valid JSON"):
        read_config(path)


def test_pairs_of_surrogates_and_a_mark_at_the_start_are_text(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(b'\xef\xbb\xbf{"note": "\\ud83d\\ude00", "r": 1, "r": 2}')
    assert read_config(path) == {"note": "\U0001f600", "r": 2}


NASTY = "\x1b[31m\nWARNING forged\r\x00\u202e" + "z" * 5000
NAME = NASTY[:480]  # within the bounds of a tensor's name


@pytest.mark.parametrize("fields", [
    {NASTY: 1}, {"bias": NASTY}, {"peft_type": NASTY}, {"init_lora_weights": NASTY}, {"r": NASTY},
    {"lora_alpha": NASTY}, {"rank_pattern": NASTY}, {"rank_pattern": {"q": NASTY}}, {"rank_pattern": {NASTY[:500]: 0}},
    {"rank_pattern": {"(" + NASTY[:500]: 1}}, {"alpha_pattern": {"(?=" + NASTY[:500]: 1}}, {"bias": [NASTY]},
    {"lora_alpha": 10**4000}, {"r": {NASTY: [NASTY]}}, {"rank_pattern": {NASTY: 1}}, {"alpha_pattern": [NASTY]},
])  # fmt: skip
def test_what_the_configuration_says_is_shown_short_and_on_one_line(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    _, (problem,) = check_config(read_config(write_config(tmp_path, **fields)))
    for line in lines_of(problem):
        assert line.isprintable() and len(line) < 3 * MAX_SHOWN


def test_the_name_of_the_base_model_is_shown_on_one_line(tmp_path: Path) -> None:
    adapted = tiny.adapt(tiny.llama(), r=1, lora_alpha=1, target_modules=["q_proj"])
    folder = tiny.save(adapted, tmp_path)
    write_config(folder, base_model_name_or_path=NASTY)
    report = tiny.inspect(folder, tiny.llama_layout(), base_model="org/served")
    assert report.ok and report.base_model and "forged" in report.base_model
    assert report.base_model.isprintable() and len(report.base_model) <= peft_config.MAX_BASE_NAME
    (note,) = report.notes
    assert note.isprintable() and len(note) < 2 * MAX_SHOWN
    found, _ = check_peft(*tiny.files(folder), tiny.llama_layout().targets)
    assert found is not None and found.base_model == report.base_model
    found.close()
    write_weights(folder, [Q.format("A"), Q.format("B")], shape=(2, 2))
    for problem in tiny.inspect(folder, tiny.llama_layout(), base_model="org/served").errors:
        assert all(line.isprintable() and len(line) < 4 * MAX_SHOWN for line in lines_of(problem))


# -- the tensors

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
FOREIGN = {
    "linears": "base_model.model.m#.router.lora_A.weight",
    "layers": "base_model.model.model.layers.#.self_attn.q_proj.lora_A.weight",
    "experts": "base_model.model.model.layers.0.experts.e#.w1.lora_B.weight",
    "anything": "x#.y",
    "biases": "m#.bias",
    "heads": "m#.lm_head.weight",
    "dots": ".1" * 50 + ".#",
    "long": "l" * 120 + "#" + ".lora_A.weight",
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_of_foreign_tensors(case: str, tmp_path: Path) -> None:
    """The first kinds are listed, the others counted."""
    number = 65_000
    names = [FOREIGN[case].replace("#", str(index)) for index in range(number)]
    config, weights = write_config(tmp_path), write_weights(tmp_path, names)
    with ends_soon(60):
        found, problems = check_peft(*tiny.opened(config, weights), tiny.llama_layout().targets)
        text = summary(problems).message
    assert found is None and len(problems) <= MAX_PROBLEMS + 1 and len(text) < 600
    counted = 0
    for problem in problems:
        if unlisted := re.fullmatch(r"(\d+) more problems are not listed", problem.message):
            counted += int(unlisted[1])
        elif problem.message != "the weight file has no LoRA tensors":
            more = re.search(r", and (\d+) more like it$", problem.message)
            counted += 1 + int(more[1] if more else 0)
    halves = ".lora_" in names[0]
    assert counted == number or (not halves and counted == number + 1)


def test_kinds_of_problems_at_their_bound(tmp_path: Path) -> None:
    def messages(count: int, more: int = 0) -> list[str]:
        names = [f"x{n}.y" for n in range(count)] + [f"x0.{n}.y" for n in range(more)]
        config, weights = write_config(tmp_path), write_weights(tmp_path, names)
        return [
            one.message
            for one in check_peft(*tiny.opened(config, weights), tiny.llama_layout().targets)[1]
        ]

    full = messages(MAX_PROBLEMS - 1)  # and that there are no LoRA tensors
    assert len(full) == MAX_PROBLEMS and not any("listed" in one for one in full)
    over = messages(MAX_PROBLEMS, more=2)
    assert over[0] == "x0.y is not a LoRA tensor, and 2 more like it"
    assert over[MAX_PROBLEMS:] == ["1 more problems are not listed"]


@pytest.mark.parametrize("names", [
    [NASTY], [NAME], [NAME + ".lora_A.weight"], [NAME + ".bias"], [NAME + "lm_head.weight"],
    [NAME + ".modules_to_save.x"], [f"m.{NAME}q_proj.lora_B.weight"], [Q.format("A"), Q.format("B"), NAME],
])  # fmt: skip
@pytest.mark.parametrize(("dtype", "shape"), [
    ("F32", (1, 4)), (NASTY, (1, 4)), (NASTY, (4,)), (NASTY, tuple(range(4000))), (NASTY, (10**300, 0)),
])  # fmt: skip
def test_what_the_tensors_are_called_is_shown_short_and_on_one_line(
    names: list[str], dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    config, weights = write_config(tmp_path), write_weights(tmp_path, names, dtype, shape)
    try:
        found, problems = check_peft(*tiny.opened(config, weights), tiny.llama_layout().targets)
        assert found is None and problems
    except AdapterIncompatible as error:
        problems = [error]
        assert "is damaged" in error.message
    for problem in problems:
        for line in lines_of(problem):
            assert line.isprintable() and len(line) < 4 * MAX_SHOWN


def test_names_are_cut_and_escaped() -> None:
    assert shown("model.layers.0.q_proj") == "model.layers.0.q_proj" and shown("é") == "é"
    assert shown("a\n\x1b[0m\ud800") == r"a\n\x1b[0m\ud800"
    whole = "a" * MAX_SHOWN
    assert shown(whole) == whole
    for text in (whole + "b", "\n" * MAX_SHOWN, "\n" * 10_000, "x" * 119 + "\n", NASTY):
        cut = shown(text)
        assert len(cut) <= MAX_SHOWN and cut.isprintable() and "..." in cut
        assert cut[:3] in shown(text[:3]) + text[:3] and cut[-1] == shown(text[-1:])[-1]
    assert shown_value("a'\n") == r"'a'\n'" and shown_value(None) == "None"
    assert shown_value([1]) == "a list" and shown_value({}) == "a mapping"
    assert len(shown_shape(tuple(range(100_000)))) <= MAX_SHOWN and shown_shape((4, 2)) == "[4, 2]"
