"""`lorax adapters merge`: the folder that it writes is the adapter that PEFT makes."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorax_cli.app import app
from tests.tiny import make_adapter


@pytest.fixture(autouse=True)
def here(demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(demo_folder / "base", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for seed, (name, targets) in enumerate({"one": "all", "two": "ends"}.items()):
        make_adapter(model, tmp_path / "adapters" / name, seed, rank=4, targets=targets).unload()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def merge(*arguments: str) -> Any:
    given = ("--model-id", "base", "--default-adapter-source", "local", *arguments)
    return CliRunner().invoke(app, ["adapters", "merge", *given])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 1, 4, 30, 2]])).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("linear", {}),
        ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
        ("cat", {}),
        ("svd", {}),
        ("magnitude_prune", {"density": 0.4}),
    ],
)
def test_the_folder_is_what_peft_merges(strategy: str, options: dict[str, Any]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    weights = ("--weight", "0.7", "--weight", "-0.4", "--merge-strategy", strategy)
    result = merge("adapters/one", "adapters/two", *weights, *flags, "-o", "both", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["merge_strategy"] == strategy
    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(model, "adapters/one", adapter_name="one")
        peft.load_adapter("adapters/two", adapter_name="two")
        peft.add_weighted_adapter(
            ["one", "two"], [0.7, -0.4], "expected", combination_type=strategy, **options
        )
        peft.load_adapter("both", adapter_name="both")
    peft.eval().set_adapter("expected")
    expected = logits(peft)
    peft.set_adapter("both")
    torch.testing.assert_close(logits(peft), expected, atol=1e-4, rtol=1e-4)
    peft.set_adapter("one")
    assert (logits(peft) - expected).abs().max() > 1e-2


def test_what_is_refused(tmp_path: Path) -> None:
    both = ("adapters/one", "adapters/two", "-o")
    for arguments, code, words in (
        ((*both, "adapters/one"), 2, "adapters/one exists already"),
        ((*both, "new", "--weight", "1"), 2, "1 values for 2 adapters"),
        ((*both, "new", "--merge-strategy", "ties"), 2, "is required for ties"),
        ((*both, "new", "--merge-strategy", "mean"), 2, "mean"),
        (("adapters/one", "adapters/none", "-o", "new"), 11, "adapters/none"),
    ):
        result = merge(*arguments)
        assert result.exit_code == code and words in result.output, result.output
        assert not Path("new").exists()
    assert not list(tmp_path.glob(".new.*"))
