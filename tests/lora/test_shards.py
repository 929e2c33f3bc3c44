"""Images of one shard, and the second level of experts: both hold what the whole adapter's file says."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.lora.image import image_size, read_image, write_image
from engine.lora.report import count_targets
from engine.lora.weights import LoraWeights, Pair, TargetIndex, TensorMatrix, sliced
from engine.models import spec_from
from engine.models.architectures import spec_of
from engine.models.decoder import Decoder
from engine.models.spec import layout_of, targets_of
from engine.models.weights import load
from engine.ops import reference
from engine.ops.layout import (
    ALIGN,
    FLAG_EXPERTS,
    RECORD_BYTES,
    WORD_A,
    WORD_B,
    WORD_RANK2,
    WORD_RANKS,
    ShardLayout,
)
from engine.ops.targets import Group, ModelTargets, Shard, Span, Target, share
from tests.lora import tiny
from tests.lora.test_equality import delta, place
from tests.tiny import CONFIGS, make_model

ALL = dict(r=5, lora_alpha=7, target_modules=[*tiny.LINEARS, "embed_tokens", "lm_head"])


def test_shares_are_whole_units_and_all_of_them() -> None:
    for size, unit in ((64, 8), (64, 1), (50, 1), (96, 32), (7, 7)):
        for count in range(1, size // unit + 1):
            spans = [share(size, unit, Shard(index, count)) for index in range(count)]
            assert spans[0].start == 0 and spans[-1].stop == size
            assert all(one.stop == other.start for one, other in pairwise(spans))
            assert all(not span.start % unit and not span.size % unit for span in spans)
    held = [share(16, 8, Shard(index, 4)) for index in range(4)]
    assert held == [(0, 8), (0, 8), (8, 16), (8, 16)], "few heads are copied"


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_shards_add_up(model: str, count: int, tmp_path: Path) -> None:
    """Column-parallel outputs side by side, and row-parallel outputs added up, are those of one shard."""
    made, layout = getattr(tiny, model)(), getattr(tiny, f"{model}_layout")
    fields: dict[str, Any] = dict(r=3, target_modules=["c_attn", "attn.c_proj", "c_fc", "wte"])
    folder = tiny.save(tiny.adapt(made, **(ALL if model == "llama" else fields)), tmp_path / "a")
    whole_arena, whole_records, _ = place(folder, layout())
    shards = [layout(shard=Shard(index, count)) for index in range(count)]
    placed = [place(folder, shard)[:2] for shard in shards]
    parts = [list(shard.each_group()) for shard in shards]
    compared = 0
    for address in layout().each_group():
        group = address[2]
        if group.whole.embedding:
            x = torch.randint(group.in_features, (7,))
        else:
            x = torch.randn(7, group.in_features)
        wanted = delta(whole_arena, whole_records, layout(), address, x)
        found = torch.zeros_like(wanted)
        for shard, (arena, records), of_shard in zip(shards, placed, parts, strict=True):
            layer, number, part = next(one for one in of_shard if one[:2] == address[:2])
            inputs = part.inputs
            own = x[:, inputs.start : inputs.stop] if not group.whole.embedding else x
            if group.whole.embedding:  # a shard adds the rows of its own tokens
                mine = (x >= inputs.start) & (x < inputs.stop)
                own = torch.where(mine, x - inputs.start, 0)
            y = delta(arena, records, shard, (layer, number, part), own)
            if group.whole.embedding:
                y = y * mine[:, None]
            place_outputs(found, y, part)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        compared += bool(wanted.any())
    assert compared > tiny.LAYERS


def place_outputs(found: Tensor, y: Tensor, part: Any) -> None:
    """Adds a row-parallel part; puts a column-parallel one where its spans are."""
    at = first = 0
    for target in part.targets:
        for span in target.outputs:
            columns = slice(first + span.start, first + span.stop)
            if part.whole.cut == "inputs":
                found[:, columns] += y[:, at : at + span.size]
            else:
                found[:, columns] = y[:, at : at + span.size]
            at += span.size
        first += target.whole.out_features


def test_slices_read_any_rows() -> None:
    matrix = TensorMatrix(torch.arange(60.0, dtype=torch.bfloat16).view(10, 6))
    assert sliced(matrix) is matrix and sliced(matrix, (Span(0, 10),), Span(0, 6)) is matrix
    for columns in (Span(0, 6), Span(2, 5)):
        part = sliced(matrix, (Span(1, 4), Span(6, 7), Span(8, 10)), columns)
        wanted = matrix.tensor[[1, 2, 3, 6, 8, 9], columns.start : columns.stop]
        assert part.shape == wanted.shape
        for start in range(6):
            for stop in range(start + 1, 7):
                out = torch.zeros(stop - start, columns.size, dtype=torch.bfloat16)
                part.read(start, stop, out.view(torch.uint8).numpy().reshape(-1).data)
                assert torch.equal(out, wanted[start:stop])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("count", [2, 4])
def test_weights_of_shards(family: str, count: int, tmp_path: Path) -> None:
    """What the shards load is, put together, what one shard loads."""
    make_model(family, tmp_path)
    spec, cpu = spec_from(tmp_path), torch.device("cpu")
    whole = Decoder(spec, torch.float32, cpu)
    load(whole, tmp_path)
    for index in range(count):
        decoder = Decoder(spec, torch.float32, cpu, shard=Shard(index, count))
        load(decoder, tmp_path)
        layer, other = decoder.layers[1], whole.layers[1]
        for one, all_of_it in (
            (layer.attention.qkv, other.attention.qkv),
            (layer.attention.out, other.attention.out),
            (layer.mlp.up, other.mlp.up),
            (layer.mlp.down, other.mlp.down),
        ):
            rows, first = [], 0
            for target in one.group.targets:
                for span in target.outputs:
                    rows += range(first + span.start, first + span.stop)
                first += target.whole.out_features
            inputs = one.group.inputs
            method, full = one.method, all_of_it.method
            wanted = full.weight[rows, inputs.start : inputs.stop]  # type: ignore[attr-defined]
            assert torch.equal(method.weight, wanted)  # type: ignore[attr-defined]
            assert method.weight.numel() < full.weight.numel()  # type: ignore[attr-defined]
            if full.bias is not None:  # type: ignore[attr-defined]
                assert torch.equal(method.bias, full.bias[rows])  # type: ignore[attr-defined]
        tokens = decoder.embedding.group.inputs
        assert torch.equal(
            decoder.embedding.table, whole.embedding.table[tokens.start : tokens.stop]
        )


@pytest.mark.parametrize("family", CONFIGS)
def test_one_shard_holds_the_whole(family: str) -> None:
    spec = spec_of(CONFIGS[family]())
    targets = targets_of(spec)
    for (*_, group), (*_, part) in zip(
        targets.each_group(), layout_of(spec, "float32").each_group(), strict=True
    ):
        assert part.whole == group and part.inputs == (0, group.in_features)
        for target in part.targets:
            assert target.outputs == ((0, target.whole.out_features),), "read in one piece"


# -- experts

EXPERTS, WIDTH, INNER = 5, 24, 40


def moe_layout(dtype: str = "float32", shard: Shard | None = None) -> ShardLayout:
    """Attention's q_proj, and experts of two groups, in two layers."""
    layer = "model.layers.{layer}"
    expert = f"{layer}.mlp.experts.{{expert}}"
    gate, up, down = (f"{name}_proj" for name in ("gate", "up", "down"))
    gate_up = tuple(Target(name, f"{expert}.{name}", INNER) for name in (gate, up))
    targets = ModelTargets(
        num_layers=2,
        groups=(
            Group("q", WIDTH, (Target("q_proj", f"{layer}.self_attn.q_proj", WIDTH),)),
            Group("gate_up", WIDTH, gate_up, experts=EXPERTS),
            Group(
                "down",
                INNER,
                (Target(down, f"{expert}.{down}", WIDTH),),
                cut="inputs",
                experts=EXPERTS,
            ),
        ),
        ends=(),
    )
    return ShardLayout(targets, dtype, shard or Shard())


def moe_adapter(folder: Path) -> Path:
    """Adapts q_proj of layer 0, gate_proj of experts 0 and 3, up_proj of 3, and down_proj of 1 in layer 1."""
    folder.mkdir()
    tensors = {}
    generator = torch.Generator().manual_seed(3)
    for module, rank, inputs, outputs in (
        ("0.self_attn.q_proj", 4, WIDTH, WIDTH),
        ("1.mlp.experts.0.gate_proj", 4, WIDTH, INNER),
        ("1.mlp.experts.3.gate_proj", 6, WIDTH, INNER),
        ("1.mlp.experts.3.up_proj", 4, WIDTH, INNER),
        ("1.mlp.experts.1.down_proj", 4, INNER, WIDTH),
    ):
        name = f"base_model.model.model.layers.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = '{"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"],'
    config += ' "rank_pattern": {"layers.1.mlp.experts.3.gate_proj": 6}}'
    (folder / "adapter_config.json").write_text(config)
    return folder


ADAPTED = {
    TargetIndex(0, 0, 0),
    TargetIndex(1, 1, 0, 0),
    TargetIndex(1, 1, 0, 3),
    TargetIndex(1, 1, 1, 3),
    TargetIndex(1, 2, 0, 1),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_image_with_experts(dtype: str, tmp_path: Path) -> None:
    """Every expert's matrices and scale are those of the file; experts that are not adapted cost a record."""
    layout = moe_layout(dtype)
    folder = moe_adapter(tmp_path / "a")
    _, _, image = place(folder, layout)
    with tiny.load(folder, layout) as weights:
        assert weights.pairs.keys() == ADAPTED
        found = read_image(image, layout)
        assert found.keys() == ADAPTED
        size = image_size(weights, layout)
        assert size.stacked_rank == 10, "the largest stacked rank of one expert"
        matrices = 0
        for index, (a, b, scale) in found.items():
            pair = weights.pairs[index]
            for matrix, half in ((a, pair.a), (b, pair.b)):
                out = torch.empty(half.shape, dtype=half.dtype)
                half.read(0, len(out), out.view(torch.uint8).numpy().reshape(-1).data)
                assert torch.equal(matrix, out.to(matrix.dtype))
            assert scale == pytest.approx(pair.scale)
            matrices += a.nbytes + b.nbytes
        assert size.data_bytes == matrices + 2 * EXPERTS * RECORD_BYTES
        assert count_targets(weights, layout.targets) == {
            "q_proj": 1,
            "gate_proj": 1,
            "up_proj": 1,
            "down_proj": 1,
        }


def test_an_adapter_without_experts_has_no_second_level() -> None:
    pair = Pair(TensorMatrix(torch.ones(2, WIDTH)), TensorMatrix(torch.ones(WIDTH, 2)), 1.0, "q")
    weights = LoraWeights({TargetIndex(0, 0, 0): pair})
    assert image_size(weights, moe_layout()).data_bytes == 2 * 2 * WIDTH * 4


@pytest.mark.parametrize("count", [1, 2])
def test_records_of_experts_in_the_arena(count: int, tmp_path: Path) -> None:
    """The second level, read as a kernel would read it, gives the ops each expert's own update."""
    folder = moe_adapter(tmp_path / "a")
    whole = moe_layout()
    with tiny.load(folder, whole) as weights:
        image = memoryview(bytearray(image_size(weights, whole).total))
        write_image(weights, whole, image)
        wanted = read_image(image, whole)
    for shard in (Shard(index, count) for index in range(count)):
        layout = moe_layout(shard=shard)
        arena, records, _ = place(folder, layout)
        assert not records[2, 0, 1:].any() and records[2, 0, 0].any()
        for layer, number, group in layout.each_group():
            if layer == 0 or not group.whole.experts:
                continue
            own = second_level(arena, records[2, layer, number])
            for expert in range(EXPERTS):
                adapted = [
                    wanted.get(TargetIndex(layer, number, index, expert))
                    for index in range(len(group.targets))
                ]
                assert any(adapted) == bool(own[expert].any())
                x = torch.randn(3, group.in_features)
                slots = torch.tensor([expert], dtype=torch.int32)
                at = (arena, own[:, None, None], slots, torch.tensor([0, 3]), 0, 0)
                splits = [target.out_features for target in group.targets]
                y = torch.zeros(3, sum(splits))
                reference.lora_expand_(y, reference.lora_shrink(x, *at, 64), *at, splits)
                columns = slice(group.inputs.start, group.inputs.stop)
                for part, found, target in zip(
                    y.split(splits, 1), adapted, group.targets, strict=True
                ):
                    (rows,) = target.outputs
                    update = torch.zeros_like(part)
                    if found is not None:
                        a, b, scale = found
                        update = scale * (x @ a[:, columns].T) @ b[rows.start : rows.stop].T
                    torch.testing.assert_close(part, update, atol=1e-4, rtol=1e-4)


def second_level(arena: Tensor, record: Tensor) -> Tensor:
    """[experts, 8]: the records that a slot's record points to, with offsets from the start of the arena."""
    words = record.long() & 0xFFFFFFFF
    assert words[WORD_RANK2] >> 16 == FLAG_EXPERTS and words[WORD_RANKS]
    first = int(words[WORD_A]) * ALIGN
    table = (
        arena[first : first + EXPERTS * RECORD_BYTES].view(torch.int32).view(EXPERTS, -1).clone()
    )
    adapted = (table[:, WORD_RANKS] != 0) | (table[:, WORD_RANK2] != 0)
    table[:, WORD_A : WORD_B + 1] += int(words[WORD_B]) * adapted[:, None].int()
    return table


def test_groups_are_bounded() -> None:
    targets = tuple(Target(str(n), str(n), 8) for n in range(4))
    with pytest.raises(AssertionError, match="wide has 4 targets"):
        Group("wide", 8, targets)
    assert Group("fine", 8, targets[:3]).targets == targets[:3]
