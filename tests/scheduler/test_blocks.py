"""The block pool: reference counts, the prefix cache, the order of eviction."""

from __future__ import annotations

import random

import pytest

from engine.scheduler.blocks import BlockPool, extend_keys, root_key


def keys_of(tokens: list[int], size: int, root: bytes = b"root") -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, root, tokens, size, len(tokens) // size)
    return keys


def test_the_scratch_block_is_never_handed_out() -> None:
    pool = BlockPool(5, 4)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.available == 0


def test_more_than_available_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        BlockPool(3, 4).allocate(3)


def test_keys_name_the_prefix_and_not_the_block() -> None:
    first, second = keys_of([1, 2, 3, 4, 5, 6, 7, 8], 4), keys_of([9, 2, 3, 4, 5, 6, 7, 8], 4)
    assert first[0] != second[0] and first[1] != second[1]
    assert keys_of([1, 2, 3, 4, 5], 4) == first[:1]


def test_keys_can_be_extended_piece_by_piece() -> None:
    tokens = list(range(40))
    keys: list[bytes] = []
    for count in (1, 1, 3, 10):
        extend_keys(keys, b"root", tokens, 4, count)
    assert keys == keys_of(tokens, 4)


def test_roots_separate_adapters_and_tenants() -> None:
    roots = [
        root_key(None, b""),
        root_key(b"", b""),
        root_key(b"a", b""),
        root_key(None, b"a"),
        root_key(b"a", b"b"),
        root_key(b"ab", b""),
        root_key(b"", b"ab"),
    ]
    assert len(set(roots)) == len(roots)
    assert root_key(b"a", b"b") == root_key(b"a", b"b")


def test_freed_blocks_stay_findable_until_taken_least_recent_first() -> None:
    pool = BlockPool(5, 2)
    one, two = keys_of([1, 1, 2, 2], 2), keys_of([3, 3, 4, 4], 2)
    first, second = pool.allocate(2), pool.allocate(2)
    for block, key in zip(first + second, one + two, strict=True):
        pool.register(block, key)
    pool.free(first)
    pool.free(second)
    pool.check([])
    assert pool.available == 4 and pool.num_keys == 4
    assert pool.match(one) == first and pool.match(two) == second
    taken = pool.allocate(1)
    assert taken == first[1:]  # the end of the older prefix goes first
    assert pool.match(one) == first[:1]
    pool.share(first[:1])
    pool.check([taken, first[:1]])
    assert sorted(pool.allocate(2)) == sorted(second)
    assert pool.match(two) == []
    assert pool.match(one) == first[:1]


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(4, 2)
    (key,) = keys_of([1, 1], 2)
    (block,) = pool.allocate(1)
    pool.register(block, key)
    pool.free([block])
    pool.allocate(2)
    assert pool.match([key]) == [block]


def test_a_second_block_of_equal_contents_stays_unknown() -> None:
    pool = BlockPool(4, 2)
    (key,) = keys_of([1, 1], 2)
    first, second = pool.allocate(2)
    pool.register(first, key)
    pool.register(second, key)
    pool.free([second])
    pool.check([[first]])
    assert pool.match([key]) == [first] and pool.num_keys == 1


def test_check_finds_a_leak_and_a_double_use() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(2)
    pool.check([blocks])
    for wrong in ([], [blocks, blocks[:1]], [blocks + blocks[:1]]):
        with pytest.raises(AssertionError):
            pool.check(wrong)


@pytest.mark.parametrize("seed", range(20))
def test_random_use(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(rng.randrange(2, 30), 2)
    tables: list[list[int]] = []
    contents: dict[int, bytes] = {}  # what the device would hold
    for _ in range(300):
        keys = keys_of([rng.randrange(2) for _ in range(12)], 2)
        found = pool.match(keys)
        assert [contents[block] for block in found] == keys[: len(found)]
        pool.share(found)
        if len(keys) - len(found) <= pool.available and rng.random() < 0.6:
            new = pool.allocate(len(keys) - len(found))
            table = found + new
            for block, key in zip(new, keys[len(found) :], strict=True):
                contents[block] = key
                if rng.random() < 0.8:
                    pool.register(block, key)
            tables.append(table)
        else:
            pool.free(found)
        if tables and rng.random() < 0.6:
            pool.free(tables.pop(rng.randrange(len(tables))))
        pool.check(tables)
    for table in tables:
        pool.free(table)
    pool.check([])
    assert pool.available == pool.usable
