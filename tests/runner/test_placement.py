"""The CPU's placer: bounded pieces, records last, slots emptied."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.lora.image import image_size, write_image
from engine.messages import AdapterImageRef, Placement
from engine.ops.layout import WORD_A, WORD_EXTRA, WORD_RANKS
from engine.runner.placement import Placer, relocated
from tests.lora import tiny
from tests.lora.test_equality import Buffer


def test_placements_share_the_budget_in_order(tmp_path: Path) -> None:
    layout = tiny.llama_layout()
    region = Buffer(1 << 20)
    adapted = tiny.adapt(tiny.llama(), r=4, target_modules=tiny.LINEARS)
    folder = tiny.save(adapted, tmp_path)
    with tiny.load(folder, layout) as weights:
        size = image_size(weights, layout)
        digest = write_image(weights, layout, region.view[512 : 512 + size.total])
    image = AdapterImageRef(digest, 512, size.data_bytes, size.stacked_rank)
    arena = torch.zeros(4 * size.data_bytes, dtype=torch.uint8)
    records = torch.zeros((4, layout.num_layers + 1, layout.num_groups, 8), dtype=torch.int32)
    placer = Placer(arena, records, region)
    for slot in (1, 2, 3):
        placer.start(Placement(slot, (slot - 1) * size.data_bytes, image))
    assert placer.advance(size.data_bytes - 1) == []
    assert not records.any(), "nothing shows before all of it is there"
    assert placer.advance(1) == [1]
    placer.unplace(2)  # under way: dropped
    assert placer.advance(10 * size.data_bytes) == [3]
    assert placer.advance(1) == [] and not records[2].any() and not records[0].any()
    data = arena.view(4, -1)
    assert torch.equal(data[0], data[2]) and not data[1].any() and not data[3].any()
    adapted_groups = records[1][..., WORD_RANKS] != 0
    moved = records[3][..., WORD_A] - records[1][..., WORD_A]
    assert torch.equal(moved, adapted_groups * (2 * size.data_bytes // 16))
    placer.unplace(1)
    assert not records[1].any() and records[3].any()


def test_offsets_are_unsigned() -> None:
    """Beyond 32 GiB an offset has the sign bit of its word; an absent extra stays absent."""
    words = torch.zeros((1, 1, 8), dtype=torch.int32)
    words[..., WORD_A], words[..., WORD_RANKS] = 5, 1
    moved = relocated(words, (1 << 31) * 16)
    assert moved.view(torch.uint32).tolist()[0][0][:3] == [(1 << 31) + 5, 1 << 31, 0]
    words[..., WORD_EXTRA] = 7
    assert relocated(words, 160)[..., WORD_EXTRA].item() == 17
