"""The CPU's LoRA kernels against the float32 reference, and against themselves in another batch."""

from __future__ import annotations

import ctypes
import mmap
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.ops import extension, reference
from engine.ops.layout import ALIGN, RECORD_WORDS, padded, row_stride
from engine.ops.targets import MAX_TARGETS

status = extension.load()
pytestmark = [
    pytest.mark.skipif(status.path is None, reason=status.reason or ""),
    pytest.mark.usefixtures("fresh"),
]

ops = torch.ops.lorax
LAYERS, GROUPS = 2, 3
LAYER, GROUP = 1, 2
GUARD = 0xFF  # NaN in every floating-point type: whatever reads it shows
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POPULARITIES = ["distinct", "uniform", "zipf", "identical", "skewed"]


@dataclass(frozen=True)
class Adapters:
    """Adapters placed at random in an arena that is guarded on both sides; slot 0 is the base model."""

    arena: Tensor
    records: Tensor
    ranks: list[tuple[int, ...]]  # of each slot's targets
    k: int
    splits: list[int]
    dtype: torch.dtype

    @property
    def stacked_rank(self) -> int:
        return max(map(sum, self.ranks))


def guarded_bytes(size: int) -> Tensor:
    """`size` bytes of GUARD that end where an unreadable page begins."""
    page = mmap.PAGESIZE
    length = (size + page - 1) // page * page
    region = mmap.mmap(-1, length + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + length), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(region, dtype=torch.uint8, count=length)
    return flat[length - size :].fill_(GUARD)


def make_adapters(
    ranks: list[tuple[int, ...]], k: int, splits: list[int], dtype: torch.dtype, *, vocab: int = 0
) -> Adapters:
    """Fresh random adapters; slot s has ranks[s - 1]. With a vocabulary, A is [vocab, rank] of an embedding."""
    size = dtype.itemsize
    shapes = []  # (slot, target or -1 for A, rows, length)
    for slot, slot_ranks in enumerate(ranks, 1):
        if not any(slot_ranks):
            continue
        shapes.append((slot, -1, vocab, slot_ranks[0]) if vocab else (slot, -1, sum(slot_ranks), k))
        shapes.append((slot, 0, 0, 0))  # B, all targets
    order = list(range(len(shapes)))
    random.shuffle(order)
    lengths = {}
    for index, (slot, target, rows, length) in enumerate(shapes):
        if target < 0:
            lengths[index] = rows * padded(length * size)
        else:
            lengths[index] = sum(
                r * padded(n * size) for r, n in zip(ranks[slot - 1], splits, strict=False)
            )
    gaps = [ALIGN * random.randint(1, 5) for _ in order]
    arena = guarded_bytes(sum(lengths.values()) + sum(gaps))
    records = torch.zeros(len(ranks) + 1, LAYERS + 1, GROUPS, RECORD_WORDS, dtype=torch.int32)
    at = 0
    for index, gap in zip(order, gaps, strict=True):
        at += gap  # before: so the last matrix ends with the arena
        slot, target, rows, length = shapes[index]
        record = records[slot, LAYER, GROUP]
        if target < 0:
            record[0] = at // ALIGN
            fill(arena, at, rows, length, dtype, 1.0 if vocab else k**-0.5)
        else:
            record[1] = at // ALIGN
            offset = at
            for r, n in zip(ranks[slot - 1], splits, strict=False):
                fill(arena, offset, r, n, dtype, max(r, 1) ** -0.5)
                offset += r * padded(n * size)
        at += lengths[index]
    for slot, slot_ranks in enumerate(ranks, 1):
        three = [*slot_ranks, 0, 0, 0][:MAX_TARGETS]
        packed = torch.tensor([*three, 0], dtype=torch.int32).to(torch.uint16).view(torch.int32)
        records[slot, LAYER, GROUP, 3:5] = packed
        scales = torch.tensor([random.uniform(0.5, 2.0) for _ in three])
        records[slot, LAYER, GROUP, 5:8] = scales.view(torch.int32)
    return Adapters(arena, records, [(0,), *ranks], k, splits, dtype)


def fill(
    arena: Tensor, at: int, rows: int, length: int, dtype: torch.dtype, deviation: float
) -> None:
    """A random matrix at byte `at`; the padding of its rows stays GUARD."""
    stride = row_stride(length, dtype.itemsize)
    flat = arena[at : at + rows * stride * dtype.itemsize]
    if rows:
        flat.view(dtype).view(rows, stride)[:, :length] = (
            torch.randn(rows, length) * deviation
        ).to(dtype)


def make_batch(tokens: int, num_slots: int, popularity: str) -> tuple[Tensor, Tensor]:
    """(slots[G], segment_starts[G + 1]) of tokens sorted by slot, base first; one empty segment now and then."""
    if popularity == "distinct":
        chosen = [1 + i % num_slots for i in range(tokens)]
    elif popularity == "uniform":
        chosen = [random.randint(0, num_slots) for _ in range(tokens)]
    elif popularity == "zipf":
        weights = [1 / (1 + i) for i in range(num_slots + 1)]
        chosen = random.choices(range(num_slots + 1), weights, k=tokens)
    elif popularity == "identical":
        chosen = [1] * tokens
    else:
        chosen = [1 if i < tokens - 2 else random.randint(0, num_slots) for i in range(tokens)]
    chosen.sort()
    slots = sorted(set(chosen))
    segment_starts = [sum(c < s for c in chosen) for s in slots]
    if random.random() < 0.3:  # a segment without tokens
        slots.append(num_slots)
        segment_starts.append(tokens)
    return torch.tensor(slots, dtype=torch.int32), torch.tensor(
        [*segment_starts, tokens], dtype=torch.int32
    )


def per_token(slots: Tensor, segment_starts: Tensor) -> list[int]:
    return [
        slot
        for slot, first, last in zip(
            slots.tolist(), segment_starts[:-1].tolist(), segment_starts[1:].tolist(), strict=True
        )
        for _ in range(last - first)
    ]


def strided(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A random [rows, columns] view of a wider buffer."""
    return torch.randn(rows, columns + 24).to(dtype)[:, 8 : 8 + columns]


def defined(
    t: Tensor, adapters: Adapters, slots: Tensor, segment_starts: Tensor, poison: float
) -> Tensor:
    """t, with poison wherever the contract leaves it undefined."""
    clean = torch.full_like(t, poison)
    for i, slot in enumerate(per_token(slots, segment_starts)):
        rank = sum(adapters.ranks[slot])
        clean[:, i, :rank] = t[:, i, :rank]
    return clean


def run(
    adapters: Adapters, x: Tensor, y: Tensor, slots: Tensor, segment_starts: Tensor
) -> tuple[Tensor, Tensor]:
    """(t with zeros where undefined, y after expand); expand reads NaN where t is undefined."""
    where = (adapters.arena, adapters.records, slots, segment_starts, LAYER, GROUP)
    t = ops.lora_shrink(x, *where, adapters.stacked_rank)
    assert t.shape == (1, x.shape[0], adapters.stacked_rank)
    assert t.dtype == torch.float32
    ops.lora_expand_(
        y, defined(t, adapters, slots, segment_starts, float("nan")), *where, adapters.splits
    )
    return defined(t, adapters, slots, segment_starts, 0.0), y


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {
        torch.float32: {"rtol": 1e-5, "atol": 2e-5},
        torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
        torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    }[dtype]


def check(adapters: Adapters, tokens: int, popularity: str) -> None:
    slots, segment_starts = make_batch(tokens, len(adapters.ranks) - 1, popularity)
    x = strided(tokens, adapters.k, adapters.dtype)
    y = strided(tokens, sum(adapters.splits), adapters.dtype)
    around = y._base.clone()
    before = adapters.arena.clone()
    where = (adapters.arena, adapters.records, slots, segment_starts, LAYER, GROUP)

    expected_t = reference.lora_shrink(x, *where, adapters.stacked_rank)
    expected_y = y.clone()
    reference.lora_expand_(expected_y, expected_t, *where, adapters.splits)

    t, y = run(adapters, x, y, slots, segment_starts)
    torch.testing.assert_close(
        t, expected_t, **tolerance(torch.float32)
    )  # elements of t and y are about 1
    torch.testing.assert_close(y, expected_y, **tolerance(adapters.dtype))
    assert torch.equal(adapters.arena, before)
    inside = torch.zeros_like(around, dtype=torch.bool)
    inside[:, 8 : 8 + y.shape[1]] = True
    assert torch.equal(y._base[~inside], around[~inside])


SHAPES = [(288, [288, 96, 96]), (67, [33, 1, 50]), (1, [9]), (136, [136, 136])]


@pytest.mark.parametrize("shift", range(2))
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_reference(dtype: torch.dtype, popularity: str, shift: int) -> None:
    for i, tokens in enumerate((1, 3, 16, 75)):
        k, splits = SHAPES[(2 * i + shift) % len(SHAPES)]
        ranks = [(r,) * len(splits) for r in (16, 8, 0, 1)]
        ranks += [tuple(random.choice([0, 1, 3, 7, 16, 64]) for _ in splits) for _ in range(4)]
        check(make_adapters(ranks, k, splits, dtype), tokens, popularity)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 5, 8, 16, 17, 31, 64, 129, 256])
def test_every_rank(dtype: torch.dtype, rank: int) -> None:
    for ranks in [(rank,), (rank, 0, 3), (0, rank, 0), (0, 2, rank)]:
        adapters = make_adapters([ranks, ranks], 96, [80, 24, 40][: len(ranks)], dtype)
        check(adapters, random.choice([1, 2, 5, 9]), "uniform")


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill(dtype: torch.dtype, isa: str) -> None:
    adapters = make_adapters([(16, 16, 16), (4, 0, 9)], 160, [160, 64, 64], dtype)
    for popularity in ("identical", "uniform"):
        check(adapters, 261, popularity)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_lengths(dtype: torch.dtype, isa: str) -> None:
    for _ in range(15):
        k, n = random.randint(1, 200), random.randint(1, 200)
        adapters = make_adapters([(random.randint(1, 40),) for _ in range(3)], k, [n], dtype)
        check(adapters, random.randint(1, 40), random.choice(POPULARITIES))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [256, 130])
def test_a_token_is_the_same_in_every_batch(dtype: torch.dtype, k: int, isa: str) -> None:
    """Bit for bit: whatever the other tokens, the number of segments and the number of threads."""
    splits = [192, 70, 9]
    ranks = [(16, 16, 16), (1, 0, 64), (0, 0, 5), (200, 3, 0)]
    adapters = make_adapters(ranks, k, splits, dtype)
    tokens = 150
    x, y = strided(tokens, k, dtype), strided(tokens, sum(splits), dtype)
    slots, segment_starts = make_batch(tokens, len(ranks), "zipf")
    owners = per_token(slots, segment_starts)
    whole_t, whole_y = run(adapters, x, y.clone(), slots, segment_starts)

    for i in [0, tokens - 1, *random.sample(range(tokens), 20)]:
        one = torch.tensor([owners[i]], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
        t1, y1 = run(adapters, x[i : i + 1], y[i : i + 1].clone(), *one)
        assert torch.equal(t1[:, 0], whole_t[:, i])
        assert torch.equal(y1[0], whole_y[i])
    for first, last in [(0, 2), (5, 12), (31, 150), (64, 129)]:
        part = owners[first:last]
        slots_part = torch.tensor(sorted(set(part)), dtype=torch.int32)
        starts_part = torch.tensor(
            [part.index(s) for s in sorted(set(part))] + [len(part)], dtype=torch.int32
        )
        t2, y2 = run(adapters, x[first:last], y[first:last].clone(), slots_part, starts_part)
        assert torch.equal(t2, whole_t[:, first:last])
        assert torch.equal(y2, whole_y[first:last])

    for count in (2, 3, 5):
        torch.set_num_threads(count)
        t3, y3 = run(adapters, x, y.clone(), slots, segment_starts)
        assert torch.equal(t3, whole_t)
        assert torch.equal(y3, whole_y)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_one_large_adapter_is_shared_by_threads(threads: int) -> None:
    """One token and one adapter, large enough to be cut over ranks and over columns."""
    torch.set_num_threads(threads)
    check(make_adapters([(128, 64)], 1536, [1536, 512], torch.float32), 1, "distinct")
    check(make_adapters([(1,)], 8192, [8192], torch.float32), 1, "distinct")


def test_partial_sums_are_added_in_order() -> None:
    """t may come in P parts (a sharded or split shrink); expand adds them up."""
    adapters = make_adapters([(16, 4), (3, 9)], 64, [48, 40], torch.float32)
    slots, segment_starts = make_batch(6, 2, "distinct")
    t = torch.randn(3, 6, adapters.stacked_rank)
    y = torch.randn(6, 88)
    where = (adapters.arena, adapters.records, slots, segment_starts, LAYER, GROUP)
    expected = y.clone()
    reference.lora_expand_(expected, t, *where, adapters.splits)
    ops.lora_expand_(
        y, defined(t, adapters, slots, segment_starts, float("nan")), *where, adapters.splits
    )
    torch.testing.assert_close(y, expected, **tolerance(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(dtype: torch.dtype) -> None:
    vocab, hidden = 50, 72
    adapters = make_adapters([(8,), (3,), (0,), (17,)], 0, [hidden], dtype, vocab=vocab)
    for popularity in POPULARITIES:
        slots, segment_starts = make_batch(21, 4, popularity)
        ids = torch.randint(vocab, (21,))
        where = (adapters.arena, adapters.records, slots, segment_starts, LAYER, GROUP)
        t = ops.lora_gather(ids, *where, 17, dtype)
        expected = reference.lora_gather(ids, *where, 17, dtype)
        assert t.shape == (1, 21, 17)
        assert torch.equal(defined(t, adapters, slots, segment_starts, 0.0), expected)


def test_base_only_and_empty() -> None:
    adapters = make_adapters([(4,)], 32, [32], torch.float32)
    zero = torch.tensor([0], dtype=torch.int32)
    where = (
        adapters.arena,
        adapters.records,
        zero,
        torch.tensor([0, 5], dtype=torch.int32),
        LAYER,
        GROUP,
    )
    y = torch.randn(5, 32)
    kept = y.clone()
    t = ops.lora_shrink(torch.randn(5, 32), *where, 4)
    ops.lora_expand_(y, t, *where, [32])
    assert torch.equal(y, kept)
    none = (adapters.arena, adapters.records, zero[:0], zero, LAYER, GROUP)
    t = ops.lora_shrink(torch.randn(0, 32), *none, 4)
    assert t.shape == (1, 0, 4)
    ops.lora_expand_(torch.randn(0, 32), t, *none, [32])
    # another layer's records are those of the base model
    other = (
        adapters.arena,
        adapters.records,
        zero + 1,
        torch.tensor([0, 5], dtype=torch.int32),
        0,
        GROUP,
    )
    ops.lora_expand_(y, torch.full((1, 5, 4), float("nan")), *other, [32])
    assert torch.equal(y, kept)


def call(name: str, **changed: object) -> object:
    """One op on a good little batch, but for the arguments that are changed."""
    adapters = make_adapters([(4, 2), (3, 3)], 32, [16, 24], torch.float32)
    arguments: dict[str, object] = {
        "x": torch.randn(5, 32),
        "ids": torch.tensor([0, 1, 0, 2, 1]),
        "y": torch.randn(5, 40),
        "t": torch.randn(1, 5, 6),
        "arena": adapters.arena,
        "records": adapters.records,
        "slots": torch.tensor([0, 1, 2], dtype=torch.int32),
        "segment_starts": torch.tensor([0, 1, 3, 5], dtype=torch.int32),
        "layer": LAYER,
        "group": GROUP,
        "stacked_rank": 6,
        "dtype": torch.float32,
        "splits": [16, 24],
    }
    arguments.update(changed)
    names = {
        "lora_shrink": [
            "x",
            "arena",
            "records",
            "slots",
            "segment_starts",
            "layer",
            "group",
            "stacked_rank",
        ],
        "lora_gather": [
            "ids",
            "arena",
            "records",
            "slots",
            "segment_starts",
            "layer",
            "group",
            "stacked_rank",
            "dtype",
        ],
        "lora_expand_": [
            "y",
            "t",
            "arena",
            "records",
            "slots",
            "segment_starts",
            "layer",
            "group",
            "splits",
        ],
    }[name]
    return getattr(ops, name)(*[arguments[n] for n in names])


BAD = [
    ("lora_shrink", {"x": torch.zeros(5, 32, dtype=torch.float64)}, "x must"),
    ("lora_shrink", {"x": torch.zeros(32)}, "x must"),
    ("lora_shrink", {"x": torch.zeros(32, 5).T}, "x must"),
    ("lora_shrink", {"x": torch.zeros(5, 32000)}, "past the end of the arena"),
    ("lora_shrink", {"stacked_rank": 5}, "stacked_rank 5 is below"),
    ("lora_shrink", {"slots": torch.tensor([0, 1, 3], dtype=torch.int32)}, "slot 3"),
    ("lora_shrink", {"slots": torch.tensor([0, 1, -1], dtype=torch.int32)}, "slot -1"),
    ("lora_shrink", {"slots": torch.tensor([0, 1, 2])}, "slots must"),
    (
        "lora_shrink",
        {"segment_starts": torch.tensor([0, 1, 5], dtype=torch.int32)},
        "segment_starts must",
    ),
    (
        "lora_shrink",
        {"segment_starts": torch.tensor([0, 3, 1, 5], dtype=torch.int32)},
        "segment_starts must",
    ),
    (
        "lora_shrink",
        {"segment_starts": torch.tensor([0, 1, 3, 6], dtype=torch.int32)},
        "segment_starts must",
    ),
    ("lora_shrink", {"layer": 3}, "layer 3"),
    ("lora_shrink", {"group": -1}, "group -1"),
    ("lora_shrink", {"arena": torch.zeros(64, dtype=torch.float32)}, "arena must"),
    ("lora_shrink", {"arena": torch.zeros(64, dtype=torch.uint8)}, "past the end of the arena"),
    ("lora_shrink", {"records": torch.zeros(3, 3, 3, 7, dtype=torch.int32)}, "records must"),
    ("lora_gather", {"ids": torch.zeros(5, dtype=torch.int32)}, "ids must"),
    ("lora_gather", {"ids": torch.tensor([0, 1, -1, 0, 0])}, "id -1"),
    ("lora_gather", {"ids": torch.tensor([0, 10**9, 1, 0, 0])}, "past the end of the arena"),
    ("lora_gather", {"dtype": torch.int8}, "dtype"),
    ("lora_gather", {"stacked_rank": 2}, "stacked_rank 2 is below"),
    ("lora_expand_", {"y": torch.zeros(5, 40, dtype=torch.float64)}, "y must"),
    ("lora_expand_", {"y": torch.zeros(5, 41)}, "splits must"),
    ("lora_expand_", {"t": torch.zeros(1, 5, 5)}, "stacked_rank 5 is below"),
    ("lora_expand_", {"t": torch.zeros(1, 4, 6)}, "t must"),
    ("lora_expand_", {"t": torch.zeros(5, 6)}, "t must"),
    ("lora_expand_", {"t": torch.zeros(1, 5, 6, dtype=torch.bfloat16)}, "t must"),
    (
        "lora_expand_",
        {"splits": [40], "arena": torch.zeros(9999, dtype=torch.uint8)[:9984]},
        "splits names 1",
    ),
    ("lora_expand_", {"splits": [10, 10, 10, 10]}, "splits must"),
    ("lora_expand_", {"splits": [48, -8]}, "splits must"),
    ("lora_expand_", {"arena": torch.zeros(64, dtype=torch.uint8)}, "past the end of the arena"),
]


@pytest.mark.parametrize(("name", "changed", "message"), BAD, ids=[f"{n}-{m}" for n, _, m in BAD])
def test_bad_input_is_refused(name: str, changed: dict[str, object], message: str) -> None:
    call(name)
    with pytest.raises(RuntimeError, match=message):
        call(name, **changed)
