"""The delta of the engine's ops over a placed image equals PEFT's own, for every module of every kind of adapter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from torch import Tensor, nn

from engine.lora.image import image_size, read_image, write_image
from engine.lora.weights import Matrix
from engine.messages import AdapterImageRef, Placement
from engine.ops import reference
from engine.ops.layout import ALIGN, GroupPart, ShardLayout
from engine.runner.placement import Budget, Placer
from tests.lora import tiny


class Buffer:
    """A host region of plain memory."""

    def __init__(self, size: int) -> None:
        self.view = memoryview(bytearray(size))


def place(
    folder: Path, layout: ShardLayout, slot: int = 2, piece: int = 1000
) -> tuple[Tensor, Tensor, memoryview]:
    """Loads an adapter and places it at a random offset. Returns arena, records and the image."""
    chance = random.Random(folder.name)
    with tiny.load(folder, layout) as weights:
        size = image_size(weights, layout)
        start = 256 * chance.randrange(5)
        region = Buffer(start + size.total + 512)
        region.view[:] = bytes([255]) * len(region.view)  # not-a-number where nothing is written
        image = region.view[start : start + size.total]
        digest = write_image(weights, layout, image)
    offset = ALIGN * chance.randrange(100)
    arena = torch.full((offset + size.data_bytes + 64,), 255, dtype=torch.uint8)
    records = torch.zeros((4, layout.num_layers + 1, layout.num_groups, 8), dtype=torch.int32)
    placer = Placer(arena, records, region)
    placer.start(
        Placement(slot, offset, AdapterImageRef(digest, start, size.data_bytes, size.stacked_rank))
    )
    resident: list[int] = []
    while not resident:
        assert not records.any()
        resident = placer.advance(Budget(piece, 1))
    assert resident == [slot] and records[slot].any()
    return arena, records, image


def rows(matrix: Matrix) -> Tensor:
    """All of a matrix of a file."""
    out = torch.empty(matrix.shape, dtype=matrix.dtype)
    matrix.read(0, len(out), memoryview(out.view(torch.uint8).numpy()).cast("B"))
    return out


def delta(
    arena: Tensor,
    records: Tensor,
    layout: ShardLayout,
    address: tuple[int, int, GroupPart],
    x: Tensor,
) -> Tensor:
    """What the ops add to a zero output: [T, sum of out_features] in the layout's dtype."""
    layer, number, group = address
    dtype = getattr(torch, layout.dtype)
    slots, segment_starts = torch.tensor([2], dtype=torch.int32), torch.tensor([0, len(x)])
    at = (arena, records, slots, segment_starts, layer, number)
    if group.whole.embedding:
        t = reference.lora_gather(x, *at, 64, dtype)
    else:
        t = reference.lora_shrink(x.to(dtype), *at, 64)
    splits = [target.out_features for target in group.targets]
    y = torch.zeros(len(x), sum(splits), dtype=dtype)
    reference.lora_expand_(y, t, *at, splits)
    return y


def peft_delta(module: nn.Module, x: Tensor) -> Tensor:
    """PEFT's own: adapted output minus the output of the base layer."""
    if not hasattr(module, "base_layer"):
        return torch.zeros(())
    with torch.no_grad():
        return module(x) - module.base_layer(x)


def same_everywhere(adapted: Any, layout: ShardLayout, folder: Path) -> None:
    """Every group of every layer: the ops' delta is PEFT's."""
    arena, records, _ = place(tiny.save(adapted, folder), layout)
    modules = dict(adapted.base_model.model.named_modules())
    adapted_modules = 0
    for layer, number, group in layout.each_group():
        if group.whole.embedding:
            x = torch.randint(group.in_features, (7,))
        else:
            x = torch.randn(7, group.in_features)
        got = delta(arena, records, layout, (layer, number, group), x)
        splits = [target.out_features for target in group.targets]
        for part, target in zip(got.split(splits, 1), group.targets, strict=True):
            module = modules[target.whole.module.format(layer=layer)]
            want = peft_delta(module, x)
            adapted_modules += hasattr(module, "base_layer")
            tolerance = 1e-4 * max(1.0, want.abs().max().item())
            assert torch.allclose(part, want.expand_as(part), atol=tolerance), target.whole.module
    assert adapted_modules == sum(hasattr(module, "base_layer") for module in modules.values())


LLAMA_CASES: dict[str, dict[str, Any]] = {
    "one": dict(r=1, target_modules=["q_proj"]),
    "qv": dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "all": dict(r=5, lora_alpha=7, target_modules=tiny.LINEARS),
    "all-linear": dict(r=3, target_modules="all-linear"),
    "head": dict(r=4, lora_alpha=3, target_modules=["lm_head", "o_proj"]),
    "embeddings": dict(r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head", "k_proj"]),
    "embeddings-rslora": dict(r=7, use_rslora=True, target_modules=["embed_tokens", "q_proj"]),
    "rslora": dict(r=9, lora_alpha=2, use_rslora=True, target_modules=["down_proj", "up_proj"]),
    "layers": dict(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2]),
    "regex": dict(r=2, target_modules=r".*\.1\..*(gate|k)_proj"),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=tiny.LINEARS,
        rank_pattern={
            "model.layers.1.self_attn.q_proj": 2,
            r"layers\.(0|2)\.mlp\..*": 6,
            "up_proj": 3,
            "^model.layers.1.*down_proj": 1,
        },
        alpha_pattern={"q_proj": 5, r".*\.2\.self_attn\.v_proj": 11, "proj": 100},
    ),
    "velora": dict(r=4, target_modules=["q_proj"], velora_config=VeloraConfig(num_groups=4)),
    "monteclora": dict(r=4, target_modules=["q_proj"], monteclora_config=MontecloraConfig()),
    "mica": dict(r=4, target_modules=["q_proj"], init_lora_weights="mica"),
    "eva": dict(r=4, target_modules=["q_proj"], init_lora_weights="eva", eva_config=EvaConfig()),
    "gaussian": dict(r=4, target_modules=["q_proj"], init_lora_weights="gaussian"),
    "orthogonal": dict(r=4, target_modules=["q_proj"], init_lora_weights="orthogonal"),
    "no init": dict(r=4, target_modules=["q_proj"], init_lora_weights=False),
    "rslora-patterns": dict(
        r=4, use_rslora=True, target_modules=["q_proj"], rank_pattern={r".*\.2\..*": 9}
    ),
}


@pytest.mark.parametrize("case", LLAMA_CASES)
def test_llama(case: str, tmp_path: Path) -> None:
    adapted = tiny.adapt(tiny.llama(), **LLAMA_CASES[case])
    same_everywhere(adapted, tiny.llama_layout(), tmp_path / case)


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "c_fc", "wte"]])
def test_gpt2(targets: list[str], tmp_path: Path) -> None:
    """Conv1D: PEFT stores the factors as of ordinary linears."""
    adapted = tiny.adapt(
        tiny.gpt2(), r=3, lora_alpha=4, fan_in_fan_out=True, target_modules=targets
    )
    same_everywhere(adapted, tiny.gpt2_layout(), tmp_path / "gpt2")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("safetensors", [True, False])
def test_image_keeps_every_value(dtype: str, safetensors: bool, tmp_path: Path) -> None:
    """read_image(write_image(x)) is the file, rounded to the layout's dtype; .bin and .safetensors agree."""
    adapted = tiny.adapt(tiny.llama(), **LLAMA_CASES["patterns"])
    layout = tiny.llama_layout(dtype)
    folder = tiny.save(adapted, tmp_path / "adapter", safetensors)
    _, _, image = place(folder, layout)
    with tiny.load(folder, layout) as weights:
        found = read_image(image, layout)
        assert found.keys() == weights.pairs.keys()
        for key, (a, b, scale) in found.items():
            pair = weights.pairs[key]
            assert torch.equal(a, rows(pair.a).to(a.dtype))
            assert torch.equal(b, rows(pair.b).to(b.dtype))
            assert scale == pytest.approx(pair.scale, rel=1e-7)


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    """Equal values and scales give one digest, whatever the file; another scale or value gives another."""
    layout, digests = tiny.llama_layout("bfloat16"), []
    base = dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    variants = [({}, 1, True), ({}, 1, False), ({"lora_alpha": 9}, 1, True), ({}, 2, True)]
    for number, (fields, seed, safetensors) in enumerate(variants):
        adapted = tiny.adapt(tiny.llama(), seed, **(base | fields))
        folder = tiny.save(adapted, tmp_path / str(number), safetensors)
        with tiny.load(folder, layout) as weights:
            out = memoryview(bytearray(image_size(weights, layout).total))
            digests.append(write_image(weights, layout, out))
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_image_of_odd_rows_is_padded_with_zeros(tmp_path: Path) -> None:
    adapted = tiny.adapt(tiny.llama(), r=3, target_modules=["embed_tokens"])
    layout = tiny.llama_layout("bfloat16")
    _, _, image = place(tiny.save(adapted, tmp_path / "odd"), layout)
    start = (layout.record_bytes + 255) // 256 * 256
    rows = torch.frombuffer(image, dtype=torch.uint8)[start : start + 50 * 16].view(torch.bfloat16)
    assert rows.view(50, 8)[:, :3].all() and not rows.view(50, 8)[:, 3:].any()
