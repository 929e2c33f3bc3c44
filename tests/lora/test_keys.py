"""Names of tensors as other tools and older versions of PEFT write them; and what is no LoRA tensor at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from engine.lora.keys import plain_key
from tests.lora import tiny

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LAYOUT = tiny.llama_layout()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear and an embedding."""
    adapted = tiny.adapt(tiny.llama(), r=4, target_modules=["q_proj", "embed_tokens"])
    return tiny.save(adapted, tmp_path_factory.mktemp("plain"))


def renamed(plain: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes((plain / "adapter_config.json").read_bytes())
    save_file(
        {rename(key): one for key, one in load_file(plain / WEIGHTS).items()}, folder / WEIGHTS
    )
    return folder


def named(key: str, name: str = "default") -> str:
    """The adapter's name in the key, as in PEFT's models and in older files."""
    if "lora_embedding" in key:
        return f"{key}.{name}"
    return key.replace("lora_A.", f"lora_A.{name}.").replace("lora_B.", f"lora_B.{name}.")


SPELLINGS: dict[str, Callable[[str], str]] = {
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "default": named,
    "another name": lambda key: named(key, "my-sql_v2"),
    "default, no prefix": lambda key: named(key).removeprefix(PREFIX),
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled blocks": lambda key: key.replace(".self_attn", "._orig_mod.self_attn"),
    "ddp": lambda key: f"module.{key}",
    "ddp, no prefix": lambda key: f"module.{key.removeprefix(PREFIX)}",
    "ddp, compiled, named": lambda key: f"module._orig_mod.{named(key)}",
    "fsdp": lambda key: (
        f"_fsdp_wrapped_module.{key.replace('layers.', 'layers._fsdp_wrapped_module.')}"
    ),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_another_spelling_is_the_same_adapter(case: str, plain: Path, tmp_path: Path) -> None:
    folder = renamed(plain, tmp_path, SPELLINGS[case])
    assert set(load_file(folder / WEIGHTS)) != set(load_file(plain / WEIGHTS))
    report = tiny.inspect(folder, LAYOUT)
    assert not report.errors and report.digest == tiny.inspect(plain, LAYOUT).digest


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_peft_reads_the_names_of_adapters_too(tmp_path: Path) -> None:
    """As we do: a key with the adapter's name means the same."""
    base = tiny.llama()
    adapted = tiny.adapt(base, r=4, target_modules=["q_proj"])
    folder = renamed(tiny.save(adapted, tmp_path / "a"), tmp_path / "b", named)
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    ids = torch.arange(6)[None]
    assert torch.equal(again(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize("rename", [named, SPELLINGS["no prefix"], SPELLINGS["compiled"]])
def test_two_names_of_one_tensor(rename: Callable[[str], str], plain: Path, tmp_path: Path) -> None:
    folder = renamed(plain, tmp_path, lambda key: key)
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if "layers.1" in key and "lora_B" in key)
    save_file(tensors | {rename(key): torch.zeros_like(tensors[key])}, folder / WEIGHTS)
    (error,) = tiny.inspect(folder, LAYOUT).errors
    assert "name the same tensor" in error.message and error.hint
    assert error.field == "model.layers.1.self_attn.q_proj.lora_B.weight"


def test_two_adapters_in_one_file(plain: Path, tmp_path: Path) -> None:
    folder = renamed(plain, tmp_path, lambda key: named(key, "b" if "layers.2" in key else "a"))
    (error,) = tiny.inspect(folder, LAYOUT).errors
    assert "tensors of 2 adapters, 'a' and 'b'" in error.message and "selected_adapters" in str(
        error
    )


def test_names_that_stay() -> None:
    for key in ("lora_A.weight", "module.", "base_model.model.", "x.lora_A.weight", ""):
        assert plain_key(key)[1] == "" and plain_key(key)[0] in key
    assert plain_key("m.lora_A.default.bias") == ("m.lora_A.bias", "default")
    assert plain_key("m.lora_A.a.b.weight") == ("m.lora_A.a.b.weight", "")
    assert plain_key("x_orig_mod.m.lora_B.weight") == ("x_orig_mod.m.lora_B.weight", "")


LAYER = f"{PREFIX}model.layers.0.self_attn.q_proj"
KINDS: dict[str, tuple[str, tuple[int, ...], str, str]] = {
    "head": (f"{PREFIX}score.weight", (2, 24), "classification head", "CAUSAL_LM"),
    "heads of two layers": (f"{PREFIX}classifier.dense.weight", (2, 24), "classification head", "CAUSAL_LM"),
    "mlx": ("model.layers.0.self_attn.q_proj.lora_a", (24, 4), "mlx-lm", "mlx_lm.fuse"),
    "whole weight": (f"{LAYER}.weight", (24, 24), "whole matrix of the model", "--model-id"),
    "base of a linear": (f"{LAYER}.base_layer.weight", (24, 24), "copy of the base", "not trained"),
    "base of the head": (f"{PREFIX}lm_head.base_layer.weight", (50, 25), "has the shape [50, 25]", "base model"),
    "table of a linear": (f"{PREFIX}model.layers.0.mlp.up_proj.lora_embedding_A", (4, 24), "is a linear", "complete"),
    "table of the head": (f"{PREFIX}lm_head.lora_embedding_B", (24, 4), "is a linear", "complete"),
    "dora": (f"{LAYER}.lora_magnitude_vector.default.weight", (24,), "DoRA", "train"),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_what_a_tensor_is(case: str, plain: Path, tmp_path: Path) -> None:
    key, shape, words, remedy = KINDS[case]
    folder = renamed(plain, tmp_path, lambda key: key)
    tensors = load_file(folder / WEIGHTS) | {key: torch.ones(shape)}
    if "lora_embedding" in key:
        tensors[key.replace("ng_A", "ng_X").replace("ng_B", "ng_A").replace("ng_X", "ng_B")] = (
            torch.ones(4, 4)
        )
    save_file(tensors, folder / WEIGHTS)
    (error,) = tiny.inspect(folder, LAYOUT).errors
    assert words in error.message
    assert remedy in (error.hint or "")


@pytest.mark.parametrize("shape", [(0,), (0, 24), (4, 0)])
def test_placeholders_of_zero3(shape: tuple[int, ...], plain: Path, tmp_path: Path) -> None:
    folder = renamed(plain, tmp_path, lambda key: key)
    tensors = load_file(folder / WEIGHTS)
    save_file({key: torch.ones(shape) for key in tensors}, folder / WEIGHTS)
    errors = tiny.inspect(folder, LAYOUT).errors
    assert len(errors) == 2  # linear and embedding
    assert all("saved empty" in one.message and "ZeRO-3" in (one.hint or "") for one in errors)


def test_a_whole_model_in_the_file(plain: Path, tmp_path: Path) -> None:
    """One problem a kind of module, each with the right remedy; and no hint to save it again."""
    folder = renamed(plain, tmp_path, lambda key: key)
    save_file(
        {key: one.contiguous() for key, one in tiny.llama().state_dict().items()}, folder / WEIGHTS
    )
    errors = tiny.inspect(folder, LAYOUT).errors
    assert any("whole matrix of the model" in one.message for one in errors)
    assert "--model-id" in (errors[-1].hint or "") and "no LoRA tensors" in errors[-1].message


def test_messages_stay_short(plain: Path, tmp_path: Path) -> None:
    folder = renamed(plain, tmp_path, lambda key: key)
    long = "x" * 400
    extra = [f"{long}{n}.lora_A.{long[:60]}.weight" for n in range(3)]
    extra += [f"{long}.score.{n}" for n in range(3)] + [
        f"{long}.lora_a",
        f"{long}.base_layer.weight",
    ]
    save_file(
        load_file(folder / WEIGHTS) | {key: torch.ones(2, 2) for key in extra}, folder / WEIGHTS
    )
    report = tiny.inspect(folder, LAYOUT)
    assert report.errors
    for error in report.errors:
        assert len(error.message) < 400 and len(error.field or "") < 200
