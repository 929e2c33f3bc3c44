"""The GPU's paged attention against the float32 reference, and against itself in another batch."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.ops import reference

pytestmark = pytest.mark.gpu

ops = torch.ops.lorax
LAYERS, LAYER = 3, 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Cache:
    """Sequences of (queries, length); every place that no sequence owns holds NaN.

    `skew` moves the queries by as many elements, and each token by as many more.
    """

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
        padding: int = 0,
        skew: int = 0,
    ) -> None:
        needed = [(length + block_size - 1) // block_size for _, length in sequences]
        order = list(range(1, sum(needed) + 3))
        random.shuffle(order)
        kv = torch.full((len(order) + 1, LAYERS, 2, block_size, kv_heads, size), float("nan"))
        block_tables = torch.full((len(sequences), max(needed) + 2), -7, dtype=torch.int32)
        for s, (count, (_, length)) in enumerate(zip(needed, sequences, strict=True)):
            table, order = order[:count], order[count:]
            block_tables[s, :count] = torch.tensor(table, dtype=torch.int32)
            for i, index in enumerate(table):
                used = min(block_size, length - i * block_size)
                kv[index, LAYER, :, :used] = torch.randn(2, used, kv_heads, size)
        self.kv = kv.to(kv_dtype or dtype).cuda()
        self.whole_block_tables = block_tables.cuda()
        self.block_tables = self.whole_block_tables.clone()
        self.context_lens = torch.tensor([n for _, n in sequences], dtype=torch.int32).cuda()
        counts = [queries for queries, _ in sequences]
        self.counts = counts
        self.tokens = sum(counts)
        self.cu_seqlens_q = torch.tensor(
            [sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32
        ).cuda()
        # a view of a fused projection, as the model passes it
        fused = torch.randn(self.tokens + padding, (heads + 2 * kv_heads) * size + skew)
        self.q = fused.to(dtype).cuda()[:, skew : skew + heads * size].unflatten(1, (heads, size))

    def forget(self, window: int) -> None:
        """Gives back the blocks that no query of the step sees."""
        block_size = self.kv.shape[3]
        for s, length in enumerate(self.context_lens.tolist()):
            self.block_tables[s, : max(length - self.counts[s] - window + 1, 0) // block_size] = -7

    def __call__(
        self, *, scale: float = 0.125, softcap: float = 0.0, window: int = 0, num_decodes: int = 0
    ) -> Tensor:
        where = (self.kv, LAYER, self.block_tables, self.cu_seqlens_q, self.context_lens)
        return ops.paged_attention(self.q, *where, scale, softcap, window, num_decodes)

    def part(self, s: int) -> Tensor:
        """Sequence s computed alone."""
        begin = sum(self.counts[:s])
        return ops.paged_attention(
            self.q[begin : begin + self.counts[s]],
            self.kv,
            LAYER,
            self.block_tables[s : s + 1],
            torch.tensor([0, self.counts[s]], dtype=torch.int32).cuda(),
            self.context_lens[s : s + 1],
            0.125,
            0.0,
            0,
        )


def check(
    cache: Cache,
    *,
    scale: float = 0.125,
    softcap: float = 0.0,
    window: int = 0,
    num_decodes: int = 0,
) -> None:
    actual = cache(scale=scale, softcap=softcap, window=window, num_decodes=num_decodes)
    where = (cache.kv, LAYER, cache.whole_block_tables, cache.cu_seqlens_q, cache.context_lens)
    expected = reference.paged_attention(cache.q.float(), *where, scale, softcap, window)
    assert actual.is_contiguous()
    assert actual.dtype == cache.q.dtype
    tolerance, n = TOLERANCES[cache.q.dtype], cache.tokens
    torch.testing.assert_close(actual[:n].float(), expected[:n], rtol=tolerance, atol=tolerance)


SHAPES = [(9, 3, 64), (4, 4, 80), (8, 1, 128), (32, 8, 128), (40, 2, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
def test_mixed_batch(
    dtype: torch.dtype, block_size: int, heads: int, kv_heads: int, size: int
) -> None:
    """Decodes, whole prompts, chunks behind a prefix and rows without queries, in one call."""
    sequences = [(1, 1), (1, 17), (1, 300), (5, 5), (70, 70), (33, 260), (1, 16), (0, 40), (2, 33)]
    check(Cache(sequences, heads, kv_heads, size, block_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
def test_decode(dtype: torch.dtype, block_size: int, heads: int, kv_heads: int, size: int) -> None:
    sequences = [(1, n) for n in (1, 15, 16, 17, 255, 256, 257, 600, 5000)]
    check(Cache(sequences, heads, kv_heads, size, block_size, dtype))


@pytest.mark.parametrize("heads", [4, 24])
def test_rows_of_as_many_parts_as_there_may_be(heads: int) -> None:
    """Beside short ones, wherever they stand in the batch."""
    lengths = [40_000, 1100, 3, 33_000, 2048, 2049]
    for _ in range(2):
        check(Cache([(1, n) for n in lengths], heads, 2, 32, 16, torch.bfloat16))
        lengths.reverse()


@pytest.mark.parametrize(("size", "rows"), [(128, 150), (256, 60)])
def test_more_parts_than_ctas_that_share_them(size: int, rows: int) -> None:
    """Rows of several parts everywhere in a large batch: each is the same alone, bit for bit."""
    lengths = [20_000, *((3, 1100, 3100)[i % 3] for i in range(rows - 1))]
    cache = Cache([(1, n) for n in lengths], 8, 4, size, 16, torch.bfloat16)
    further = sum(min(16, -(-n // 1024)) - 1 for n in lengths) * 4
    assert further > (4 if size <= 128 else 2) * 132, "one for each CTA that an H100 has for them"
    check(cache)
    whole = cache()
    for s in range(0, rows, 7):
        assert torch.equal(cache.part(s), whole[s : s + 1])


def test_blocks_that_chunks_of_keys_do_not_fill() -> None:
    check(Cache([(1, 1), (1, 300), (1, 1500), (40, 77)], 4, 2, 64, 24, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_with_padding(dtype: torch.dtype) -> None:
    """Rows of a captured graph that no sequence has; and as many tokens as sequences by chance."""
    check(Cache([(1, 70), (1, 900), (0, 1), (0, 1)], 8, 2, 128, 16, dtype, padding=2))
    check(Cache([(3, 300), (0, 9), (0, 20)], 8, 2, 128, 16, dtype))


@pytest.mark.parametrize("queries", [1, 19])
@pytest.mark.parametrize("size", [16, 24, 32, 40, 64, 72, 96, 112, 128, 160, 192, 256, 5, 33])
def test_head_sizes(size: int, queries: int) -> None:
    for dtype in DTYPES:
        sequences = [(queries, 37), (queries, 50), (1, 400)]
        check(Cache(sequences, 4, 2, size, 16, dtype), scale=size**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 1, 7, 64, 100, 700])
def test_softcap_and_window(dtype: torch.dtype, softcap: float, window: int) -> None:
    for sequences in ([(1, 1), (3, 65), (90, 90), (40, 300)], [(1, 1), (1, 600), (1, 3000)]):
        cache = Cache(sequences, 6, 2, 32, random.choice([16, 32]), dtype)
        if window:
            cache.forget(window)
        check(cache, softcap=softcap, window=window, scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skew", [1, 4])
def test_queries_that_are_not_aligned(dtype: torch.dtype, skew: int) -> None:
    sequences = [(1, 30), (1, 1), (70, 90), (5, 5), (0, 1)]
    for size in (24, 64, 128, 256):
        check(Cache(sequences, 6, 2, size, 16, dtype, skew=skew, padding=3), num_decodes=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_sequences(dtype: torch.dtype) -> None:
    """More than the prefill kernel has threads, some without tokens."""
    sequences = [(s % 4, 3 + s % 40) for s in range(300)] + [(200, 210), (0, 1), (1, 1)]
    for num_decodes in (0, 70):
        check(
            Cache([(1, 5)] * num_decodes + sequences, 4, 2, 32, 16, dtype), num_decodes=num_decodes
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 128), (4, 4, 64), (7, 1, 256)])
def test_a_prompt_is_the_same_in_chunks(
    dtype: torch.dtype, softcap: float, window: int, heads: int, kv_heads: int, size: int
) -> None:
    """Bit for bit, wherever it is cut: whether a tile is masked depends on the rows beside."""
    cache = Cache([(200, 233)], heads, kv_heads, size, 16, dtype)
    whole = cache(softcap=softcap, window=window)
    for cuts in ([0, 100, 200], [0, 2, 33, 64, 129, 200]):
        for begin, end in pairwise(cuts):
            part = ops.paged_attention(
                cache.q[begin:end],
                cache.kv,
                LAYER,
                cache.block_tables,
                torch.tensor([0, end - begin], dtype=torch.int32).cuda(),
                torch.tensor([33 + end], dtype=torch.int32).cuda(),
                0.125,
                softcap,
                window,
            )
            assert torch.equal(part, whole[begin:end])


def test_cache_of_another_dtype() -> None:
    for kv_dtype in DTYPES:
        check(Cache([(1, 50), (6, 40)], 4, 2, 32, 16, torch.float32, kv_dtype=kv_dtype))
    check(Cache([(1, 50), (6, 40)], 4, 2, 32, 16, torch.bfloat16, kv_dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_is_the_same_in_every_batch(dtype: torch.dtype) -> None:
    """Bit for bit, within decodes and within prompts."""
    for sequences in ([(1, 700), (1, 40), (1, 5000)], [(20, 90), (130, 530), (7, 7)]):
        cache = Cache(sequences, 6, 2, 64, 16, dtype)
        whole = cache()
        for s, queries in enumerate(cache.counts):
            begin = sum(cache.counts[:s])
            assert torch.equal(cache.part(s), whole[begin : begin + queries])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
def test_decodes_ahead_of_chunks(
    dtype: torch.dtype, block_size: int, heads: int, kv_heads: int, size: int
) -> None:
    """Decodes go to their own kernel, chunks to theirs; sequences without tokens and padding behind both."""
    decodes = [(1, 1), (1, 16), (1, 700), (1, 5000), (1, 33)]
    chunks = [(70, 70), (33, 260), (1, 90), (2, 513), (64, 64), (0, 1), (0, 1)]
    for count in (1, 3, 5):
        for padding in (0, 150):
            sequences = decodes[:count] + chunks
            check(
                Cache(sequences, heads, kv_heads, size, block_size, dtype, padding=padding),
                num_decodes=count,
            )
    check(
        Cache([*decodes, (0, 1)], heads, kv_heads, size, block_size, dtype, padding=9),
        num_decodes=5,
    )
    nothing = [*decodes, (0, 0), (0, 0)]
    check(Cache(nothing, heads, kv_heads, size, block_size, dtype, padding=150), num_decodes=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 300])
def test_a_decode_is_the_same_beside_chunks(dtype: torch.dtype, window: int) -> None:
    """Bit for bit alone, among decodes, and in a mixed batch of any padding; so is a chunk."""
    decodes, chunks = [(1, 700), (1, 40), (1, 5000), (1, 1)], [(70, 600), (9, 9), (0, 1)]
    mixed = Cache(decodes + chunks, 8, 2, 128, 16, dtype, padding=50)
    whole = mixed(window=window, num_decodes=len(decodes))
    n = len(decodes)
    where = (
        mixed.kv,
        LAYER,
        mixed.block_tables[:n],
        mixed.cu_seqlens_q[: n + 1],
        mixed.context_lens[:n],
    )
    among = ops.paged_attention(mixed.q[:n], *where, 0.125, 0.0, window, n)
    assert torch.equal(among, whole[:n])
    for s, queries in enumerate(mixed.counts):
        begin = int(mixed.cu_seqlens_q[s])
        alone = ops.paged_attention(
            mixed.q[begin : begin + queries],
            mixed.kv,
            LAYER,
            mixed.block_tables[s : s + 1],
            torch.tensor([0, queries], dtype=torch.int32).cuda(),
            mixed.context_lens[s : s + 1],
            0.125,
            0.0,
            window,
            int(s < n),
        )
        assert torch.equal(alone, whole[begin : begin + queries])


def test_more_decodes_than_sequences_are_refused() -> None:
    with pytest.raises(RuntimeError, match="num_decodes 4 of 3 sequences"):
        Cache([(1, 40), (1, 3), (5, 5)], 4, 2, 32, 16, torch.bfloat16)(num_decodes=4)


def test_no_queries() -> None:
    assert Cache([(0, 40), (0, 3)], 4, 2, 32, 16, torch.bfloat16)().shape == (0, 4, 32)
