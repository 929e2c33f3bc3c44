"""`lora_rescale_` on CPU and GPU against the float32 reference, and a token against itself in another batch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from engine.ops import extension, reference
from engine.ops.layout import ALIGN, FLAG_SCALED, FLAG_SHIFT, RECORD_WORDS, padded
from tests.ops.test_cpu_lora import DTYPES, GROUP, LAYER, make_batch, strided, tolerance

pytestmark = pytest.mark.usefixtures("fresh")
ops = torch.ops.lorax
COLUMNS = [1, 7, 96, 1030]
FLAGS = [0, FLAG_SHIFT, FLAG_SCALED << 1, FLAG_SHIFT | FLAG_SCALED, 32]
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(extension.load().path is None, reason="the extension is missing"),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def make_slots(columns: int) -> tuple[Tensor, Tensor]:
    """An arena and records in which slot s + 1 has extras by FLAGS[s]; the gaps are NaN."""
    row = padded(4 * columns)
    arena = torch.full((ALIGN * 3 + 2 * row * len(FLAGS),), 255, dtype=torch.uint8)
    records = torch.zeros(len(FLAGS) + 1, LAYER + 2, GROUP + 2, RECORD_WORDS, dtype=torch.int32)
    at = ALIGN * 3
    for slot, flags in enumerate(FLAGS, 1):
        records[slot, LAYER, GROUP, 2], records[slot, LAYER, GROUP, 4] = at // ALIGN, flags << 16
        for found in reference.extras(arena, at // ALIGN, flags, columns):
            if found is not None:
                found.copy_(torch.randn(columns))
                at += row
    return arena, records


def run(y: Tensor, where: tuple[Tensor, ...], device: str) -> Tensor:
    """The op on a copy of y with the same strides."""
    assert "lora_rescale_" in (extension.load_cuda() if device == "cuda" else extension.load()).ops
    base = y._base
    assert base is not None
    copied = base.clone().to(device).as_strided(y.shape, y.stride(), y.storage_offset())
    ops.lora_rescale_(copied, *(one.to(device) for one in where), LAYER, GROUP)
    outside = copied._base.cpu()  # type: ignore[union-attr]
    inside = torch.zeros_like(outside, dtype=torch.bool)
    inside.as_strided(y.shape, y.stride(), y.storage_offset()).fill_(True)
    assert torch.equal(outside[~inside], base[~inside])
    return copied.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_reference(dtype: torch.dtype, columns: int, device: str) -> None:
    arena, records = make_slots(columns)
    for tokens, popularity in ((1, "identical"), (9, "distinct"), (300, "zipf")):
        slots, starts = make_batch(tokens, len(FLAGS), popularity)
        y = strided(tokens, columns, dtype)
        where = (arena, records, slots, starts)
        expected = y.clone()
        reference.lora_rescale_(expected, *where, LAYER, GROUP)
        found = run(y, where, device)
        torch.testing.assert_close(found, expected, **tolerance(dtype))
        i = random.randrange(tokens)
        segment = int((starts <= i).nonzero().max())
        alone = (arena, records, slots[segment : segment + 1], torch.tensor([0, 1]).int())
        assert torch.equal(run(y[i : i + 1], alone, device)[0], found[i])


@pytest.mark.skipif(extension.load().path is None, reason="the extension is missing")
def test_bad_input_is_refused() -> None:
    arena, records = make_slots(8)
    slots, starts = torch.tensor([4]).int(), torch.tensor([0, 2]).int()
    good = dict(y=torch.zeros(2, 8), arena=arena, records=records, slots=slots)
    ops.lora_rescale_(*good.values(), starts, LAYER, GROUP)
    for changed, message in (
        ({"y": torch.zeros(8)}, "y must"),
        ({"y": torch.zeros(2, 8000)}, "past the end of the arena"),
        ({"slots": torch.tensor([9]).int()}, "slot 9"),
        ({"y": torch.zeros(1, 8)}, "segment_starts must"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.lora_rescale_(*(good | changed).values(), starts, LAYER, GROUP)
