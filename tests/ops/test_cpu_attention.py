"""The CPU's paged attention against the float32 reference, and against itself in another batch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from engine.ops import extension, reference

status = extension.load()
pytestmark = [
    pytest.mark.skipif(status.path is None, reason=status.reason or ""),
    pytest.mark.usefixtures("fresh"),
]

ops = torch.ops.lorax
LAYERS, LAYER = 3, 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Cache:
    """Sequences of (queries, length) with fresh keys and values; every place that no sequence owns holds NaN."""

    def __init__(
        self,
        sequences: list[tuple[int, int]],
        heads: int,
        kv_heads: int,
        size: int,
        block_size: int,
        dtype: torch.dtype,
        *,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        needed = [(length + block_size - 1) // block_size for _, length in sequences]
        order = list(range(1, sum(needed) + 3))
        random.shuffle(order)
        self.kv = torch.full(
            (len(order) + 1, LAYERS, 2, block_size, kv_heads, size),
            float("nan"),
            dtype=kv_dtype or dtype,
        )
        self.block_tables = torch.full((len(sequences), max(needed) + 2), -7, dtype=torch.int32)
        for s, (count, (_, length)) in enumerate(zip(needed, sequences, strict=True)):
            table, order = order[:count], order[count:]
            self.block_tables[s, :count] = torch.tensor(table, dtype=torch.int32)
            for i, index in enumerate(table):
                used = min(block_size, length - i * block_size)
                self.kv[index, LAYER, :, :used] = torch.randn(2, used, kv_heads, size).to(
                    self.kv.dtype
                )
        self.whole_block_tables = self.block_tables.clone()
        self.context_lens = torch.tensor([length for _, length in sequences], dtype=torch.int32)
        counts = [queries for queries, _ in sequences]
        self.cu_seqlens_q = torch.tensor(
            [sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32
        )
        # a view of a fused projection, as the model passes it
        fused = torch.randn(sum(counts), (heads + 2 * kv_heads) * size).to(dtype)
        self.q = fused[:, : heads * size].unflatten(1, (heads, size))

    def forget(self, window: int) -> None:
        """Gives back the blocks that no query of the step sees."""
        block_size = self.kv.shape[3]
        for s, length in enumerate(self.context_lens.tolist()):
            queries = int(self.cu_seqlens_q[s + 1] - self.cu_seqlens_q[s])
            self.block_tables[s, : max(length - queries - window + 1, 0) // block_size] = -7

    def __call__(self, *, scale: float = 0.125, softcap: float = 0.0, window: int = 0) -> Tensor:
        where = (self.kv, LAYER, self.block_tables, self.cu_seqlens_q, self.context_lens)
        return ops.paged_attention(self.q, *where, scale, softcap, window)

    def expected(self, *, scale: float = 0.125, softcap: float = 0.0, window: int = 0) -> Tensor:
        where = (self.kv, LAYER, self.whole_block_tables, self.cu_seqlens_q, self.context_lens)
        return reference.paged_attention(self.q, *where, scale, softcap, window)

    def part(self, s: int, first: int, last: int) -> Tensor:
        """Queries first .. last of sequence s computed alone, as if the later ones were still to come."""
        begin, end = self.cu_seqlens_q[s].item(), self.cu_seqlens_q[s + 1].item()
        length = self.context_lens[s].item() - (end - begin) + last
        return ops.paged_attention(
            self.q[begin + first : begin + last],
            self.kv,
            LAYER,
            self.block_tables[s : s + 1],
            torch.tensor([0, last - first], dtype=torch.int32),
            torch.tensor([length], dtype=torch.int32),
            0.125,
            0.0,
            0,
        )


def check(cache: Cache, *, tolerance: float = 0.0, **options: float) -> None:
    before = cache.kv.clone()
    actual, expected = cache(**options), cache.expected(**options)
    assert actual.is_contiguous()
    assert actual.dtype == cache.q.dtype
    tolerance = (
        tolerance or {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[cache.q.dtype]
    )
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(cache.kv.nan_to_num(1234.0), before.nan_to_num(1234.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 80), (8, 1, 128)])
def test_mixed_batch(
    dtype: torch.dtype, block_size: int, heads: int, kv_heads: int, size: int
) -> None:
    """Decodes, whole prompts, chunks behind a prefix and rows without queries, in one call."""
    sequences = [(1, 1), (1, 17), (1, 300), (5, 5), (70, 70), (33, 260), (1, 16), (0, 40), (2, 33)]
    check(Cache(sequences, heads, kv_heads, size, block_size, dtype))


@pytest.mark.parametrize(
    "size", [8, 16, 24, 32, 40, 48, 56, 64, 72, 96, 104, 112, 120, 160, 192, 256, 5, 33]
)
def test_head_sizes(size: int, isa: str) -> None:
    check(
        Cache([(1, 37), (3, 20), (19, 50)], 4, 2, size, 16, random.choice(DTYPES)), scale=size**-0.5
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 1, 7, 64, 100])
def test_softcap_and_window(dtype: torch.dtype, softcap: float, window: int) -> None:
    sequences = [(1, 1), (1, 600), (3, 65), (90, 90), (40, 300)]
    cache = Cache(sequences, 6, 2, 32, random.choice([16, 32]), dtype)
    if window:
        cache.forget(window)
    check(cache, softcap=softcap, window=window, scale=0.6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 700])
def test_long_sequences(dtype: torch.dtype, window: int) -> None:
    """Past the fixed split of the keys, where a decode is cut into parts and put together again."""
    sequences = [(1, 2100), (4, 1025), (1, 1024), (1, 513), (1, 512), (45, 1100)]
    check(Cache(sequences, 4, 2, 64, 32, dtype), window=window)


def test_cache_of_another_dtype() -> None:
    for kv_dtype in DTYPES:
        check(Cache([(1, 50), (6, 40)], 4, 2, 32, 16, torch.float32, kv_dtype=kv_dtype))
    check(Cache([(1, 50), (6, 40)], 4, 2, 32, 16, torch.bfloat16, kv_dtype=torch.float32))


def test_large_scores() -> None:
    """Scores in the thousands: the softmax is about one key, and nothing overflows. float32 scores err by 2e-4."""
    cache = Cache([(1, 200), (9, 70)], 4, 2, 32, 16, torch.float32)
    check(cache, scale=400.0, tolerance=5e-3)
    check(cache, scale=400.0, softcap=50.0, tolerance=5e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_is_the_same_in_every_batch(dtype: torch.dtype) -> None:
    """Bit for bit: whatever the other sequences and the number of threads."""
    sequences = [(1, 700), (1, 40), (20, 90), (1, 1030), (130, 530), (1, 5)]
    cache = Cache(sequences, 6, 2, 64, 16, dtype)
    whole = cache()
    for s, (queries, _) in enumerate(sequences):
        begin = cache.cu_seqlens_q[s].item()
        assert torch.equal(cache.part(s, 0, queries), whole[begin : begin + queries])
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert torch.equal(cache(), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunked_is_whole(dtype: torch.dtype, isa: str) -> None:
    """Bit for bit: a prompt in chunks of any size, down to one token at a time."""
    cache = Cache([(600, 1100)], 4, 2, 64, 32, dtype)
    whole = cache()
    for chunk in (1, 2, 17, 64, 256, 599):
        for first in (
            range(0, 600, chunk) if chunk > 16 else random.sample(range(0, 600 - chunk), 25)
        ):
            last = min(600, first + chunk)
            assert torch.equal(cache.part(0, first, last), whole[first:last])


def test_block_size_and_place_do_not_matter() -> None:
    """Bit for bit: the same keys and values in blocks of 16, 32 and 256."""
    caches = [
        Cache([(3, 400), (1, 77)], 4, 2, 64, block_size, torch.float32)
        for block_size in (16, 32, 256)
    ]
    first = caches[0]
    for other in caches[1:]:
        other.q.copy_(first.q)
        for s, length in enumerate(first.context_lens.tolist()):
            for at in range(length):
                source = first.kv[first.block_tables[s, at // 16], LAYER, :, at % 16]
                block_size = other.kv.shape[3]
                other.kv[other.block_tables[s, at // block_size], LAYER, :, at % block_size] = (
                    source
                )
        assert torch.equal(other(), first())


def test_no_queries() -> None:
    cache = Cache([(0, 40), (0, 3)], 4, 2, 32, 16, torch.float32)
    assert cache().shape == (0, 4, 32)


BAD = [
    ({"q": torch.zeros(4, 4, 32, dtype=torch.float64)}, "q must"),
    ({"q": torch.zeros(4, 128)}, "q must"),
    ({"q": torch.zeros(4, 5, 32)}, "heads"),
    ({"q": torch.zeros(4, 4, 24)}, "head size"),
    ({"q": torch.zeros(4, 32, 4).mT}, "of q must"),
    ({"q": torch.zeros(3, 4, 32)}, "cu_seqlens_q must"),
    ({"kv": torch.zeros(9, 3, 2, 16, 2, 32, dtype=torch.uint8)}, "kv must"),
    ({"kv": torch.zeros(9, 3, 16, 2, 32)}, "kv must"),
    ({"kv": torch.zeros(9, 3, 3, 16, 2, 32)}, "kv must"),
    ({"layer": 3}, "layer 3"),
    ({"layer": -1}, "layer -1"),
    ({"block_tables": torch.zeros(2, 3, dtype=torch.int64)}, "block_tables must"),
    ({"block_tables": torch.zeros(1, 3, dtype=torch.int32)}, "block_tables must"),
    ({"block_tables": torch.zeros(2, 2, dtype=torch.int32)}, "blocks of a sequence of 40"),
    ({"block_tables": torch.full((2, 3), 9, dtype=torch.int32)}, "block 9"),
    ({"block_tables": torch.full((2, 3), -1, dtype=torch.int32)}, "block -1"),
    ({"cu_seqlens_q": torch.tensor([0, 4], dtype=torch.int32)}, "cu_seqlens_q must"),
    ({"cu_seqlens_q": torch.tensor([0, 1, 2], dtype=torch.int32)}, "cu_seqlens_q must"),
    ({"cu_seqlens_q": torch.tensor([0, 5, 4], dtype=torch.int32)}, "cu_seqlens_q must"),
    ({"cu_seqlens_q": torch.tensor([0, 1, 4])}, "cu_seqlens_q must"),
    ({"context_lens": torch.tensor([40, 2], dtype=torch.int32)}, "3 queries"),
    ({"context_lens": torch.tensor([40], dtype=torch.int32)}, "cu_seqlens_q must"),
    ({"context_lens": torch.tensor([[40, 9]], dtype=torch.int32)}, "context_lens must"),
    ({"context_lens": torch.tensor([40, 9])}, "context_lens must"),
    ({"window": -1}, "window"),
    ({"softcap": -1.0}, "softcap"),
    ({"num_decodes": -1}, "num_decodes"),
    ({"num_decodes": 3}, "num_decodes 3 of 2 sequences"),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=[f"{next(iter(c))}-{m}" for c, m in BAD])
def test_bad_input_is_refused(changed: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "q": torch.zeros(4, 4, 32),
        "kv": torch.zeros(9, 3, 2, 16, 2, 32),
        "layer": 1,
        "block_tables": torch.tensor([[1, 2, 3], [4, 0, 0]], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 1, 4], dtype=torch.int32),
        "context_lens": torch.tensor([40, 9], dtype=torch.int32),
        "scale": 0.1,
        "softcap": 0.0,
        "window": 0,
    }
    ops.paged_attention(*good.values())
    with pytest.raises(RuntimeError, match=message):
        ops.paged_attention(*{**good, **changed}.values())
