"""Adapters whose initialisation changed the base weights: exact once PEFT has converted them, else refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.lora import tiny
from tests.lora.test_equality import delta, place

LAYOUT = tiny.llama_layout()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize(
    "fields", [{"lora_alpha": 6}, {"use_rslora": True}, {"lora_dropout": 0.1}], ids=str
)
def test_saved_converted(init: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """The trained model, whose base is not the original one, against the original base and our delta."""
    base = tiny.llama()
    config = LoraConfig(
        r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=init, **fields
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = get_peft_model(copy.deepcopy(base), config).eval()
        settings = trained.peft_config["default"]
        settings.init_lora_weights = True
        trained.save_pretrained(str(tmp_path / "initial"))
        settings.init_lora_weights = init
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        trained.save_pretrained(str(tmp_path / "as-is"))
        trained.save_pretrained(
            str(tmp_path / "converted"),
            path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
        )
    (error,) = tiny.inspect(tmp_path / "as-is", LAYOUT).errors
    assert error.field == "init_lora_weights" and "weight_conversion=" in (error.hint or "")

    arena, records, _ = place(tmp_path / "converted", LAYOUT)
    before, after = dict(base.named_modules()), dict(trained.base_model.model.named_modules())
    compared = 0
    for layer, number, group in LAYOUT.each_group():
        if group.whole.embedding:
            continue
        x = torch.randn(5, group.in_features)
        got = delta(arena, records, LAYOUT, (layer, number, group), x)
        splits = [target.out_features for target in group.targets]
        for part, target in zip(got.split(splits, 1), group.targets, strict=True):
            module = target.whole.module.format(layer=layer)
            with torch.no_grad():
                want = after[module](x) - before[module](x)
            assert torch.allclose(part, want, atol=1e-4 * max(1.0, want.abs().max().item())), module
            compared += bool(want.abs().max() > 1e-3)
    assert compared == 2 * tiny.LAYERS
