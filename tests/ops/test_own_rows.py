"""Own rows of embedding and head: the ops against a base whose matrix has the rows replaced, on CPU and GPU."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import extension
from engine.ops.layout import ALIGN, FLAG_OWN_ROWS, RECORD_WORDS, own_rows_start, padded
from engine.ops.reference import own_rows
from tests.ops.test_cpu_lora import DTYPES, GROUP, LAYER, make_batch, per_token, strided, tolerance

pytestmark = pytest.mark.usefixtures("fresh")
ops = torch.ops.lorax
VOCAB, ROOM = 90, 16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (own ids, vocabulary) of each slot; None: no own rows
SLOTS: list[tuple[list[int], int] | None] = [
    (list(range(VOCAB)), VOCAB),
    None,
    ([0, 3, 89], VOCAB),
    ([5, *range(VOCAB, VOCAB + 7)], VOCAB + 7),
    ([], VOCAB - 20),
    (list(range(VOCAB + ROOM)), VOCAB + ROOM),
]


def make_slots(hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An arena and records in which slot s + 1 has own rows by SLOTS[s]; the gaps are NaN."""
    row = padded(hidden * dtype.itemsize)
    sizes = [own_rows_start(0, len(s[0])) + len(s[0]) * row if s else 0 for s in SLOTS]
    arena = torch.full((ALIGN * 3 + sum(sizes),), 255, dtype=torch.uint8)
    records = torch.zeros(len(SLOTS) + 1, LAYER + 2, GROUP + 2, RECORD_WORDS, dtype=torch.int32)
    at = ALIGN * 3
    for slot, (own, size) in enumerate(zip(SLOTS, sizes, strict=True), 1):
        if own is not None:
            record = records[slot, LAYER, GROUP]
            record[7], record[4] = at // ALIGN, FLAG_OWN_ROWS << 16
            arena[at : at + 8].view(torch.int32).copy_(torch.tensor([len(own[0]), own[1]]))
            vocab, ids, rows = own_rows(arena, at // ALIGN, hidden, dtype)
            ids.copy_(torch.tensor(own[0]))
            rows.copy_(torch.randn(rows.shape))
            assert vocab == own[1]
        at += size
    return arena, records


def matrix_of(slot: int, base: Tensor, arena: Tensor, records: Tensor) -> Tensor:
    """The base's matrix with the slot's rows in place; tokens that nobody has are zero."""
    whole = F.pad(base, (0, 0, 0, ROOM))
    if slot and SLOTS[slot - 1] is not None:
        at = int(records[slot, LAYER, GROUP, 7])
        _, ids, rows = own_rows(arena, at, base.shape[1], base.dtype)
        whole[ids.long()] = rows
    return whole


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hidden", [1, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_replaced_rows(dtype: torch.dtype, hidden: int, device: str) -> None:
    if device == "cuda":
        assert {"lora_own_rows_", "lora_own_logits_"} <= extension.load_cuda().ops
    arena, records = make_slots(hidden, dtype)
    base = torch.randn(VOCAB, hidden).to(dtype)
    for tokens, popularity in ((1, "identical"), (9, "distinct"), (80, "zipf")):
        slots, starts = make_batch(tokens, len(SLOTS), popularity)
        owners = per_token(slots, starts)
        where = [one.to(device) for one in (arena, records, slots, starts)]
        vocab = [SLOTS[s - 1][1] if s and SLOTS[s - 1] else VOCAB for s in owners]  # type: ignore[index]
        ids = torch.tensor([random.randrange(size) for size in vocab])
        tables = [matrix_of(slot, base, arena, records) for slot in owners]

        y = base[ids.clamp(max=VOCAB - 1)].to(device)
        ops.lora_own_rows_(y, ids.to(device), *where, LAYER, GROUP)
        expected = torch.stack([table[id] for table, id in zip(tables, ids, strict=True)])
        assert torch.equal(y.cpu(), expected)

        x = strided(tokens, hidden, dtype)
        whole = F.pad(F.linear(x, base), (0, ROOM), value=float("-inf")).to(device)
        y = whole.clone()
        ops.lora_own_logits_(y, x.to(device), *where, LAYER, GROUP)
        logits = torch.stack([F.linear(one, t) for one, t in zip(x, tables, strict=True)])
        for row, size in zip(logits, vocab, strict=True):
            row[size:] = float("-inf")
        limit = tolerance(dtype)
        torch.testing.assert_close(y.cpu(), logits, rtol=limit["rtol"], atol=limit["atol"] * 16)
        i = random.randrange(tokens)
        alone = whole[i : i + 1].clone()
        segment = int((starts <= i).nonzero().max())
        one = [
            *where[:2],
            slots[segment : segment + 1].to(device),
            torch.tensor([0, 1]).int().to(device),
        ]
        ops.lora_own_logits_(alone, x[i : i + 1].to(device), *one, LAYER, GROUP)
        if device == "cuda":
            assert torch.equal(alone[0], y[i]), "a token is the same in every batch"
