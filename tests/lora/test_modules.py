"""`target_modules` against the file and the served model: by PEFT's rules, in notes only."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

from engine.lora import modules
from engine.sandbox import CannotRun
from engine.sandbox.tasks import match
from tests.lora import tiny
from tests.lora.test_refusals import Q, changed

SERVED = [
    *(
        f"model.layers.{layer}.{name}"
        for layer in range(12)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.experts.1.down_proj")
    ),
    "lm_head",
    "q_proj",
]  # fmt: skip

RULES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["layers.1.self_attn.q_proj", "lm_head", "proj"]},
    {"target_modules": r".*\.(?!self_attn)[^.]+\.down_proj"},
    {"target_modules": r"q_proj"},
    {"target_modules": r"(?<=x)|.*[02]\.self_attn.*", "exclude_modules": ["o_proj"]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": r"model\.layers\.1.*"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["down_proj"], "layers_to_transform": 1},
    {"target_modules": ["down_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["down_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "experts"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(RULES)))
def test_the_rules_are_pefts(number: int) -> None:
    given = dict.fromkeys(match.FIELDS) | RULES[number]
    config = SimpleNamespace(**given, modules_to_save=None, target_parameters=None)
    theirs = []
    for name in SERVED:
        found = check_target_module_exists(config, name)  # type: ignore[arg-type]
        if found and not isinstance(found, _ExcludedModule):
            theirs.append(name)
    answer = match.run({}, given | {"served": SERVED, "adapted": [], "ends": ["lm_head"]})
    assert answer["named"] == answer["missing"] == len(theirs)
    assert answer["first_missing"] == (theirs[0] if theirs else None)


def test_all_linear() -> None:
    given = dict.fromkeys(match.FIELDS) | {"target_modules": "All-Linear"}
    answer = match.run({}, given | {"served": SERVED, "adapted": SERVED, "ends": ["lm_head"]})
    assert answer["named"] == len(SERVED) - 1 and answer["first_extra"] == "lm_head"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter of q_proj and up_proj."""
    adapted = tiny.adapt(tiny.llama(), r=4, target_modules=["q_proj", "up_proj"])
    return tiny.save(adapted, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("both", [True, False])
def test_notes(both: bool, plain: Path, tmp_path: Path) -> None:
    """The file has q_proj and up_proj of three layers."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for half in "AB":
            tensors.pop(Q.format(1, half))

    fields = {"target_modules": ["q_proj"] if both else ["q_proj", "up_proj"]}
    report = tiny.inspect(changed(plain, tmp_path, fields, change), tiny.llama_layout())
    first, *rest = report.notes
    assert report.ok
    named, have = (3, 2) if both else (6, 5)
    assert first == (
        f"target_modules names {named} modules, but the file has tensors for {have};"
        " first without: model.layers.1.self_attn.q_proj"
    )
    if both:
        assert rest == [
            "the file has tensors for 3 modules that target_modules does not name;"
            " first: model.layers.0.mlp.up_proj"
        ]
    else:
        assert not rest


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (r"((a+|l+|[a-z.0-9_]+)+)+!", "target_modules could not be matched in 2 s"),
        ("(", "missing )"),
        ([1, {}], "does not name"),
        ({"a": 1}, None),
        (17, "could not be matched ("),
        (None, None),
    ],
)
def test_what_cannot_be_matched_is_a_note(
    target: Any, words: str | None, plain: Path, tmp_path: Path
) -> None:
    report = tiny.inspect(changed(plain, tmp_path, {"target_modules": target}), tiny.llama_layout())
    assert report.ok
    if words is not None:
        (note,) = report.notes
        assert words in note


def test_without_a_child(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*given: Any) -> Any:
        raise CannotRun("no processes")

    monkeypatch.setattr(modules, "run", run)
    report = tiny.inspect(plain, tiny.llama_layout())
    assert report.ok and report.notes == ["target_modules could not be matched (no processes)"]
