"""`lorax adapters`: downloads, problems, and exit codes for scripts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorax_cli.app import app

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def here(demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the model, its adapters and one that does not fit."""
    shutil.copytree(demo_folder, tmp_path, dirs_exist_ok=True)
    bad = tmp_path / "adapters" / "bad"
    shutil.copytree(tmp_path / "adapters" / "one", bad)
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["adapters", *arguments, "--default-adapter-source", "local"])


def validate(*arguments: str) -> Any:
    return run("validate", "--model-id", "base", *arguments)


def test_validate() -> None:
    result = validate("adapters/one", "adapters/two")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("can be served") == 2
    assert "q_proj" in result.stdout


def test_validate_a_bin(tmp_path: Path) -> None:
    """It is converted into the cache of downloads; what does not matter for serving is a hint."""
    folder = tmp_path / "adapters" / "old"
    shutil.copytree(tmp_path / "adapters" / "one", folder)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = r".*\.(?!1)\d\.[^.]*\.(?!down)[^.]*_proj"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    cache = ("--huggingface-hub-cache", str(tmp_path / "cache"))
    result = validate("adapters/old", "adapters/one", "--json", *cache)
    old, one = json.loads(result.stdout)
    assert result.exit_code == 0 and old["ok"] and old["digest"] == one["digest"]
    assert old["notes"] == [
        "the file has tensors for 9 modules that target_modules does not name;"
        " first: model.layers.0.mlp.down_proj"
    ]
    assert not one["notes"]
    (made,) = (tmp_path / "cache" / "lorax-converted").iterdir()
    assert made.suffix == ".safetensors"


def test_validate_json() -> None:
    result = validate("adapters/one", "adapters/bad", "nobody", "--json")
    one, bad, nobody = json.loads(result.stdout)
    assert one["ok"] and one["ranks"] == [4] and one["targets"]["q_proj"] == 3
    assert one["bytes"] > 0 and len(one["digest"]) == 32
    assert not bad["ok"] and bad["errors"][0]["error_type"] == "adapter_incompatible"
    assert bad["errors"][0]["field"] == "use_dora"
    assert not nobody["ok"] and nobody["errors"][0]["error_type"] == "adapter_not_found"
    assert result.exit_code == 13
    assert "error: adapters/bad: " in result.stderr


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["nobody", "adapters/bad"], 11),
        (["adapters/bad", "nobody"], 13),
        (["adapters/one", "/etc/nobody"], 12),
    ],
)
def test_exit_code_is_that_of_the_first_failure(names: list[str], code: int) -> None:
    assert validate(*names).exit_code == code


def test_rank_limit() -> None:
    result = validate("adapters/two", "--max-adapter-rank", "4", "--quiet")
    assert result.exit_code == 13
    assert result.stdout == "" and "rank" in result.stderr


def test_quiet_prints_what_can_be_served() -> None:
    result = validate("adapters/one", "adapters/bad", "adapters/two", "--quiet")
    assert result.stdout.split() == ["adapters/one", "adapters/two"]


def test_pull() -> None:
    result = run("pull", "adapters/one", "adapters/two", "--json")
    assert result.exit_code == 0, result.output
    one, two = json.loads(result.stdout)
    assert one["source"] == "local" and Path(one["folder"]).samefile("adapters/one")
    weights = Path("adapters/two/adapter_model.safetensors").stat().st_size
    assert two["bytes"] == weights + Path("adapters/two/adapter_config.json").stat().st_size
    assert "adapters/two" in run("pull", "adapters/two").stdout


def test_pull_goes_on_after_a_failure() -> None:
    result = run("pull", "nobody", "adapters/two", "--quiet")
    assert result.exit_code == 11
    assert Path(result.stdout.strip()).samefile("adapters/two")
    assert "error: nobody: " in result.stderr


@pytest.mark.parametrize("flag", ["--adapter-source", "--default-adapter-source"])
def test_unknown_source(flag: str) -> None:
    result = CliRunner().invoke(app, ["adapters", "pull", "adapters/one", flag, "ftp"])
    assert result.exit_code == 2
    assert (
        f"error: {flag} 'ftp' is not a source of this server; it has local, hub, s3, pbase"
        in result.stderr
    )
    assert "hint: use one of these" in result.stderr


def edited(folder: str, **fields: Any) -> Path:
    """A copy of the adapter `one` with other fields."""
    path = Path("adapters") / folder
    shutil.copytree("adapters/one", path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | fields))
    return path


def test_validate_lists_layers() -> None:
    (one,) = json.loads(validate("adapters/one", "--json").stdout)
    assert one["coverage"]["q_proj"] == "all 3 layers" and set(one["targets"]) <= set(
        one["coverage"]
    )
    assert set(one["coverage"].values()) <= {"all 3 layers", "none of 3 layers", "yes", "no"}
    path = edited("gap")
    tensors = load_file(path / WEIGHTS)
    save_file({key: one for key, one in tensors.items() if "layers.1" not in key}, path / WEIGHTS)
    (gap,) = json.loads(validate("adapters/gap", "--json").stdout)
    assert gap["ok"] and gap["coverage"]["q_proj"] == "0, 2 of 3 layers"
    assert any("target_modules names 21 modules" in note for note in gap["notes"])
    table = validate("adapters/gap", "adapters/one").stdout
    assert "(0, 2 of 3 layers)" in table and "(all 3 layers)" in table


def test_validate_warns_of_another_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name and its target modules, though the shapes match."""
    edited("other", base_model_name_or_path="org/other-model", target_modules=["c_attn", "c_proj"])
    result = validate("adapters/other")
    assert result.exit_code == 0 and "other name" in result.stdout
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert any("trained on org/other-model" in line for line in warnings)
    assert any("target_modules does not name" in line for line in warnings)
    edited("same", base_model_name_or_path="/somewhere/else/base")
    assert "warning" not in validate("adapters/same").stderr


def test_validate_strict() -> None:
    edited("other", base_model_name_or_path="org/other-model")
    result = validate("adapters/other", "adapters/one", "--strict", "--json")
    other, one = json.loads(result.stdout)
    assert (
        result.exit_code == 13
        and not other["ok"]
        and "error: adapters/other: trained on" in result.stderr
    )
    assert other["errors"][0]["error_type"] == "adapter_incompatible"
    assert one["ok"] and validate("adapters/one", "--strict").exit_code == 0


def test_validate_lists_what_else_lies_in_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are equal to the base model's give no note."""
    monkeypatch.setattr("engine.adapters.own_text.loaded_effects", lambda folder: None)
    path = edited("full")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path("base") / name, path / name)
    (path / "README.md").write_text("x")
    assert not json.loads(validate("adapters/full", "--json").stdout)[0]["notes"]
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    write = (path / "tokenizer.json").write_text
    write(json.dumps(tokenizer | {"normalizer": {"type": "Lowercase"}}))
    (path / "chat_template.json").write_text("{}")
    (path / "value_head.safetensors").write_bytes(b"")
    notes = json.loads(validate("adapters/full", "--json").stdout)[0]["notes"]
    assert len(notes) == 3 and "differs from the base model's in: normalizer" in notes[0]
    assert "chat_template.json" in notes[1] and "value_head" in notes[2]
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").write_text("x")
    notes = json.loads(validate("adapters/full", "--json").stdout)[0]["notes"]
    assert "(tokenizer.model): it has no tokenizer.json" in notes[0]


def test_validate_lists_own_tokens_and_template() -> None:
    path = edited("own")
    tokenizer = json.loads((Path("base") / "tokenizer.json").read_text())
    tokenizer["added_tokens"][2]["lstrip"] = True
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "chat_template.jinja").write_text("x")
    (row,) = json.loads(validate("adapters/own", "--json", "--strict").stdout)
    assert row["ok"] and row["own_tokens"] == ["<|im_start|>"] and row["own_chat_template"]
    table = " ".join(validate("adapters/own").stdout.replace("│", " ").split())
    assert "1 own tokens" in table and "own chat template" in table
    tokenizer["added_tokens"].append({"id": 400, "content": "<tool>"})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused = validate("adapters/own", "--json")
    (error,) = json.loads(refused.stdout)[0]["errors"]
    assert refused.exit_code == 13 and "the embedding has 400 rows" in error["message"]


@pytest.mark.parametrize("name", ["adapters/oen", "adapters/tow"])
def test_did_you_mean(name: str) -> None:
    result = validate(name)
    meant = {"adapters/oen": "adapters/one", "adapters/tow": "adapters/two"}[name]
    assert result.exit_code == 11 and f"hint: did you mean {meant}?" in result.stderr
    result = CliRunner().invoke(
        app,
        [
            "adapters",
            "pull",
            name.removeprefix("adapters/"),
            "--adapter-root",
            "adapters",
            "--adapter-source",
            "local",
        ],
    )
    assert f"did you mean {meant.removeprefix('adapters/')}?" in result.stderr


@pytest.mark.parametrize("name", ["oen", "./adapters/oen", "adapters/a/b"])
def test_a_missing_name_without_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub cannot have it, so nothing is asked and nothing has failed."""
    monkeypatch.setattr("socket.socket.connect", None)
    result = CliRunner().invoke(app, ["adapters", "validate", "--model-id", "base", name])
    assert result.exit_code == 11, result.output
