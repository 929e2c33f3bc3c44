"""The CPU's placer: bounded pieces, records last, slots emptied."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.lora.image import image_size, write_image
from engine.messages import AdapterImageRef, Placement
from engine.ops.layout import (
    FLAG_SHIFT,
    PAIRS,
    RESCALES,
    WORD_A,
    WORD_EXTRA,
    WORD_RANK2,
    WORD_RANKS,
)
from engine.runner.placement import Budget, Placer, effects, relocated
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
    assert placer.advance(Budget(size.data_bytes - 1, 1)) == []
    assert not records.any(), "nothing shows before all of it is there"
    assert placer.advance(Budget(1, 1)) == [1]
    placer.unplace(2)  # under way: dropped
    assert placer.advance(Budget(10 * size.data_bytes, 1)) == [3]
    assert placer.advance(Budget(1, 1)) == [] and not records[2].any() and not records[0].any()
    data = arena.view(4, -1)
    assert torch.equal(data[0], data[2]) and not data[1].any() and not data[3].any()
    adapted_groups = records[1][..., WORD_RANKS] != 0
    moved = records[3][..., WORD_A] - records[1][..., WORD_A]
    assert torch.equal(moved, adapted_groups * (2 * size.data_bytes // 16))
    placer.unplace(1)
    assert not records[1].any() and records[3].any()


def test_offsets_are_unsigned() -> None:
    """Beyond 32 GiB an offset has the sign bit of its word; a group without ranks and extras stays all zero."""
    words = torch.zeros((1, 3, 8), dtype=torch.int32)
    words[0, 0, WORD_A], words[0, 0, WORD_RANKS] = 5, 1
    words[0, 1, WORD_EXTRA], words[0, 1, WORD_RANK2] = 7, FLAG_SHIFT << 16
    moved = relocated(words, (1 << 31) * 16).view(torch.uint32)[0].tolist()
    assert moved[0][:2] == [(1 << 31) + 5, 1 << 31] and moved[1][2] == (1 << 31) + 7
    assert moved[2] == [0] * 8
    assert effects(words).tolist() == [[PAIRS, RESCALES, 0]]
