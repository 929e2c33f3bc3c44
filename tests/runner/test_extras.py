"""Extras are finished in pieces, once per digest, and a quantised base counts with its dequantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.layers.linear import Linear, Plain
from engine.layers.methods import METHODS, method_of
from engine.lora.image import image_size, write_image
from engine.messages import AdapterImageRef, Placement
from engine.models.architectures import llama
from engine.models.decoder import Decoder
from engine.models.spec import EMBEDDING, HEAD, layout_of
from engine.ops.layout import ShardLayout
from engine.runner import extras
from engine.runner.extras import Base, Finisher
from engine.runner.placement import Budget, Placer
from tests.lora import tiny
from tests.lora.test_equality import Buffer

GIVEN = dict(r=3, use_dora=True, target_modules=[*tiny.LINEARS, "embed_tokens", "lm_head"])


def bases(layout: ShardLayout, scheme: str | None = None) -> dict[tuple[int, int], Base]:
    """Random linears of every group; with the scheme, those of the layers are quantised."""
    torch.manual_seed(0)
    found: dict[tuple[int, int], Base] = {}
    for layer, number, group in layout.each_group():
        rows, columns = group.out_features, group.in_features
        inside = layer < layout.num_layers
        method = method_of(scheme if inside else None)(torch.float32, torch.device("cpu"))
        linear = Linear(method, group, (layer, number))
        method.load("weight", 0, torch.randn(rows, columns))
        found[layer, number] = linear
    return found


def placed(
    folder: Path, layout: ShardLayout, finisher: Finisher, arena: torch.Tensor, budget: Budget
) -> list[int]:
    """Places the adapter twice, side by side. Returns the number of steps that each took."""
    with tiny.load(folder, layout) as weights:
        size = image_size(weights, layout)
        region = Buffer(size.total)
        digest = write_image(weights, layout, region.view)
    image = AdapterImageRef(digest, 0, size.data_bytes, size.stacked_rank)
    records = torch.zeros((3, layout.num_layers + 1, layout.num_groups, 8), dtype=torch.int32)
    placer = Placer(arena, records, region, finisher)
    steps = []
    for slot in (1, 2):
        placer.start(Placement(slot, (slot - 1) * size.data_bytes, image))
        steps.append(1)
        while not (resident := placer.advance(budget)):
            assert not records[slot].any(), "nothing shows before it is final"
            steps[-1] += 1
        assert resident == [slot]
    first, second = arena[: 2 * size.data_bytes].view(2, -1)
    assert torch.equal(first, second)
    return steps


def finisher_of(
    layout: ShardLayout, found: dict[tuple[int, int], Base], num_bytes: int = 1 << 20
) -> tuple[Finisher, torch.Tensor]:
    arena = torch.zeros(num_bytes, dtype=torch.uint8)
    table = [(layout.num_layers, EMBEDDING)]
    return Finisher(arena, found, torch.float32, table), arena


def test_in_pieces_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a piece, the result is the same; the second placement reads no weights."""
    layout = tiny.llama_layout()
    folder = tiny.save(tiny.adapt(tiny.llama(), **GIVEN), tmp_path)
    whole, arena = finisher_of(layout, bases(layout))
    assert placed(folder, layout, whole, arena, Budget(1 << 20, 1 << 20)) == [1, 1]
    monkeypatch.setattr(extras, "PIECE_WEIGHTS", {"cpu": 100})
    pieces, other = finisher_of(layout, bases(layout))
    first, second = placed(folder, layout, pieces, other, Budget(1 << 20, 1))
    assert first > 100 and second == 1
    torch.testing.assert_close(other.view(torch.float32), arena.view(torch.float32))


def test_the_oldest_results_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = tiny.llama_layout()
    monkeypatch.setattr(extras, "KEPT_BYTES", 1)
    folder = tiny.save(tiny.adapt(tiny.llama(), **GIVEN), tmp_path)
    finisher, arena = finisher_of(layout, bases(layout))
    first, second = placed(folder, layout, finisher, arena, Budget(1 << 20, 1))
    assert first == second > 1


@pytest.mark.parametrize("scheme", METHODS)
def test_a_quantised_base(scheme: str, tmp_path: Path) -> None:
    """The same as a plain base of the dequantised weights."""
    layout = tiny.llama_layout()
    folder = tiny.save(tiny.adapt(tiny.llama(), **GIVEN), tmp_path)
    quantised = bases(layout, scheme)
    plain = bases(layout)
    for place, base in quantised.items():
        same = plain[place]
        assert isinstance(same, Linear) and isinstance(same.method, Plain)
        same.method.load("weight", 0, base.weight_rows(slice(None)))
    results = []
    for found in (quantised, plain):
        finisher, arena = finisher_of(layout, found)
        placed(folder, layout, finisher, arena, Budget(1 << 20, 1 << 20))
        results.append(arena)
    assert torch.equal(*results)


def test_every_linear_of_a_decoder_can_be_asked() -> None:
    """`Decoder.linears` has the address and the sizes of each group of the layout."""
    spec = llama(tiny.llama().config)
    decoder = Decoder(spec, torch.float32, torch.device("cpu"))
    layout = layout_of(spec, "float32")
    for layer, number, group in layout.each_group():
        base = decoder.linears[layer, number]
        shape = base.weight_rows(slice(0, 2)).shape
        assert shape == (2, group.in_features) and sum(base.splits) == group.out_features
    assert len(decoder.linears) == len(list(layout.each_group())) and HEAD == 1
