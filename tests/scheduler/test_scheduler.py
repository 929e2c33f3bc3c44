"""The scheduler against a runner that trusts nothing: every way to the same answer gives the same answer."""

from __future__ import annotations

import random

import pytest

from engine.errors import AdapterTooLarge
from engine.scheduler.admission import MAX_PLACING
from engine.scheduler.backlog import MAX_GROWTH, PATIENCE
from tests.scheduler.fake import (
    EOS,
    House,
    exact,
    expected,
    expected_logprobs,
    image,
    random_prompt,
    request,
)

DEPTHS = pytest.mark.parametrize("depth", [0, 1])


def batch(seed: int, count: int, adapters: int = 0, longest: int = 40, new: int = 20):
    rng = random.Random(seed)
    made = []
    for index in range(count):
        choice = rng.randrange(adapters + 1)
        adapter = image(f"a{choice}") if choice else None
        prompt = random_prompt(rng, rng.randrange(1, longest))
        made.append(request(f"r{index}", prompt, rng.randrange(1, new), adapter, arrival=index))
    return made


# -- one request


@DEPTHS
def test_one_request(depth: int) -> None:
    house = House(depth=depth)
    one = request("a", [1, 2, 3], max_new_tokens=10, eos=False)
    assert house.generate([one])["a"] == expected(one)
    assert house.last["a"].finish == "length"
    usage = house.last["a"].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.generated_tokens, usage.cached_tokens) == (3, 10, 0)
    assert house.first["a"].admitted == 100.0 + house.step_seconds


@DEPTHS
@pytest.mark.parametrize("new", [1, 2, 3])
def test_never_computes_beyond_max_new_tokens(depth: int, new: int) -> None:
    house = House(depth=depth, prefix_caching=False)
    house.generate([request("a", [1, 2, 3], new, eos=False)])
    assert house.runner.computed_tokens == 3 + new - 1


@DEPTHS
def test_ends_at_an_end_of_sequence_token(depth: int) -> None:
    rng = random.Random(1)
    while True:
        one = request("a", random_prompt(rng, 5), 200)
        if 3 < len(expected(one)) < 100:
            break
    house = House(depth=depth)
    tokens = house.generate([one])["a"]
    assert tokens == expected(one) and tokens[-1] == EOS
    assert house.last["a"].finish == "eos"
    assert house.last["a"].tokens[0].token == EOS


def test_ends_at_max_total_tokens() -> None:
    house = House(max_total=10)
    tokens = house.generate([request("a", [1, 2, 3], 50, eos=False)])["a"]
    assert len(tokens) == 7 and house.last["a"].finish == "length"


def test_ends_where_the_kv_cache_ends() -> None:
    house = House(blocks=3, block_size=4)
    tokens = house.generate([request("a", [1, 2, 3], 50, eos=False)])["a"]
    assert len(tokens) == 6 and house.last["a"].finish == "length"


def test_nothing_to_do_is_no_plan() -> None:
    house = House()
    assert house.scheduler.plan() is None and not house.scheduler.has_work
    house.generate([request("a", [1])])
    assert house.scheduler.plan() is None and not house.scheduler.has_work


# -- equalities


@DEPTHS
@pytest.mark.parametrize("seed", range(5))
def test_batch_equals_alone(depth: int, seed: int) -> None:
    requests = batch(seed, 12, adapters=3)
    house = House(depth=depth, delay=lambda: seed % 3)
    house.generate(requests)
    exact(house, requests)


@DEPTHS
@pytest.mark.parametrize("step_tokens", [4, 5, 17, 1000])
def test_chunked_equals_whole(depth: int, step_tokens: int) -> None:
    requests = batch(3, 8, adapters=2)
    house = House(depth=depth, step_tokens=step_tokens, blocks=200)
    house.generate(requests)
    exact(house, requests)
    if step_tokens == 1000:
        assert all(chunk.sample for plan in house.plans for chunk in plan.chunks)


@DEPTHS
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_equals_not(depth: int, prefix_caching: bool) -> None:
    requests = [
        request(f"r{i}", [i + 1] * 5, 50, image("a") if i % 2 else None, arrival=i, eos=False)
        for i in range(8)
    ]
    house = House(depth=depth, blocks=24, prefix_caching=prefix_caching)
    house.generate(requests)
    exact(house, requests)
    preemptions = house.scheduler.stats().preemptions
    assert preemptions > 0
    assert preemptions == sum(one.usage.preemptions for one in house.last.values() if one.usage)


@DEPTHS
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_cached_equals_uncached(depth: int, prefix_caching: bool) -> None:
    rng = random.Random(5)
    stem = random_prompt(rng, 21)
    requests = [
        request(f"r{i}", stem + random_prompt(rng, i), 6, image(f"a{i % 2}") if i % 3 else None)
        for i in range(12)
    ]
    house = House(depth=depth, prefix_caching=prefix_caching)
    house.generate(requests)
    exact(house, requests)
    stats = house.scheduler.stats()
    assert (stats.prefix_hits > 0) == prefix_caching
    cached = sum(one.usage.cached_tokens for one in house.last.values() if one.usage)
    assert cached == stats.prefix_hits


@DEPTHS
def test_exchanged_adapters_equal_all_resident(depth: int) -> None:
    requests = batch(6, 20, adapters=8, longest=10)
    roomy = House(depth=depth, slots=9, arena=4096)
    tight = House(depth=depth, slots=9, arena=512, delay=lambda: 2)
    assert roomy.generate(requests) == tight.generate(requests)
    exact(tight, requests)
    assert roomy.table.num_evictions == 0 < tight.table.num_evictions


# -- steps


def test_decode_goes_on_beside_many_prefills() -> None:
    house = House(rows=4, step_tokens=8, depth=0, blocks=200)
    house.add(request("talks", [1], 40, eos=False))
    house.step()
    for index in range(3):
        house.add(request(f"long{index}", [index + 2] * 60, 1, eos=False))
    for _ in range(39):
        house.step()
    assert house.last["talks"].finish == "length"
    house.drain()


def chunk_tokens(house: House) -> list[tuple[int, int]]:
    """(rows that decode, prompt tokens beside them) of every step."""
    decoding: list[int] = []
    found = []
    for plan in house.plans:
        decoding = decoding if plan.decode is None else plan.decode
        found.append((len(decoding), sum(chunk.count for chunk in plan.chunks)))
    return found


@pytest.mark.parametrize("depth", [0, 1])
def test_chunks_beside_decoding_rows_are_bounded(depth: int) -> None:
    """By how many they are, and nothing is lost by it; where nobody decodes, a step takes all that it has room for."""
    rng = random.Random(0)
    short = [request(str(i), random_prompt(rng, 3), 40, eos=False) for i in range(4)]
    long = [request(str(4 + i), random_prompt(rng, 50 + i), 12, eos=False) for i in range(4)]
    bounds = [0, 16, 16, 16, 12, 8, 8, 8, 8]
    house = House(blocks=400, rows=8, step_tokens=64, chunk_tokens=bounds, depth=depth)
    for one in short:
        house.add(one)
    for _ in range(4):
        house.step()
    house.generate(long)
    exact(house, short + long)
    steps = chunk_tokens(house)
    reached = {tokens for decoding, tokens in steps if decoding and tokens == bounds[decoding]}
    assert {8, 12} <= reached
    assert all(tokens <= bounds[decoding] for decoding, tokens in steps if decoding)
    assert max(tokens for decoding, tokens in steps if not decoding) == 12


def test_chunks_grow_with_those_who_wait_for_their_first_token() -> None:
    """Who waits for an adapter is not counted."""
    house = House(
        blocks=400, rows=8, step_tokens=64, chunk_tokens=[8] * 9, depth=0, delay=lambda: 30
    )
    house.add(request("talks", [1], 40, eos=False))
    house.step()
    house.add(request("cold", [9] * 60, 1, image("cold"), eos=False))
    for index in range(6):
        house.add(request(f"long{index}", [index + 2] * 60, 1, eos=False))
    house.step()
    assert chunk_tokens(house)[-1] == (1, 48)
    house.drain()


def test_chunks_grow_while_prompts_do_not_keep_up() -> None:
    """After a while; and are as small as before once nothing is left over."""
    house = House(
        blocks=4000,
        rows=8,
        step_tokens=600,
        max_total=4000,
        max_input=4000,
        chunk_tokens=[8] * 9,
        depth=0,
    )
    for index in range(3):
        house.add(request(f"talks{index}", [1 + index], 900, eos=False))
    house.step()
    for id in ("long", "again"):
        planned = len(house.plans)
        house.add(request(id, random_prompt(random.Random(id), 700), 1, eos=False))
        while id not in house.last:
            house.step()
        beside = [tokens for _, tokens in chunk_tokens(house)[planned:] if tokens]
        grown = next(index for index, tokens in enumerate(beside) if tokens > 8)
        assert {*beside[:grown]} == {8}
        expected = PATIENCE * 12 / 8 / house.step_seconds  # when a block of 4 more fits in
        assert abs(grown - expected) <= 2
        assert beside[grown:-1] == sorted(beside[grown:-1]) and max(beside) <= 8 * MAX_GROWTH
    house.add(request("short", [9] * 40, 1, eos=False))
    planned = len(house.plans)
    house.drain()
    assert max(tokens for _, tokens in chunk_tokens(house)[planned:]) == 8


@DEPTHS
@pytest.mark.parametrize("scored_tokens", [1, 5, 8])
def test_prompts_that_are_scored_leave_room_for_others(depth: int, scored_tokens: int) -> None:
    """Their share of a step is bounded, what they get is the same, and others go on beside them."""
    rng = random.Random(scored_tokens)
    scored = [
        request(f"s{i}", random_prompt(rng, 30 + i), 5, eos=False, prompt_logprobs=True)
        for i in range(3)
    ]
    plain = [request(f"p{i}", random_prompt(rng, 40), 5, eos=False) for i in range(3)]
    house = House(blocks=400, rows=8, step_tokens=24, depth=depth, scored_tokens=scored_tokens)
    house.generate(scored + plain)
    exact(house, scored + plain)
    for one in scored:
        assert house.first[one.id].prompt_logprobs == expected_logprobs(one)
    wanted = [sum(chunk.count for chunk in plan.chunks if chunk.scores) for plan in house.plans]
    assert 0 < max(wanted) <= scored_tokens
    last = max(step for step, tokens in enumerate(wanted) if tokens)
    begun = {
        chunk.row for plan in house.plans[: last // 2] for chunk in plan.chunks if not chunk.scores
    }
    assert len(begun) == len(plain), "they do not wait behind those that are scored"


def test_chunks_are_first_come_first_served() -> None:
    house = House(rows=4, step_tokens=16, blocks=200)
    for index in range(4):
        house.add(request(f"r{index}", [index + 1] * 50, 1, arrival=-index))
    house.drain()
    assert house.order == ["r3", "r2", "r1", "r0"]


def test_a_chunk_ends_at_a_block_unless_it_reaches_the_end() -> None:
    house = House(rows=4, step_tokens=19, block_size=8, blocks=200)
    requests = [request(f"r{i}", [i + 1] * 61, 5, eos=False) for i in range(4)]
    house.generate(requests)
    exact(house, requests)
    chunks = [chunk for plan in house.plans for chunk in plan.chunks]
    assert len(chunks) > 8
    for chunk in chunks:
        assert chunk.sample or (chunk.start + chunk.count) % 8 == 0


def test_a_budget_below_one_block_still_makes_progress() -> None:
    house = House(rows=2, step_tokens=3, block_size=16)
    requests = [request(f"r{i}", [i + 1] * 40, 5) for i in range(3)]
    house.generate(requests)
    exact(house, requests)


@DEPTHS
def test_decode_rows_are_named_only_when_they_change(depth: int) -> None:
    house = House(depth=depth, block_size=4)
    house.generate([request("a", [1], 30, eos=False), request("b", [2], 30, eos=False)])
    named = [plan for plan in house.plans if plan.decode is not None]
    assert [plan.decode for plan in named] == [[], [1, 2], []]
    assert len(house.plans) == 31
    assert house.plans[-1].release == [1, 2]


def test_rows_are_sorted_by_slot_and_stable() -> None:
    house = House(rows=6, slots=4, depth=0)
    adapters = [image("b"), None, image("a"), image("b"), None, image("a")]
    for index, adapter in enumerate(adapters):
        house.add(request(f"r{index}", [1, index], 30, adapter, eos=False))
    for _ in range(6):
        house.step()
    assert house.runner.decode is not None
    slots = [house.runner.rows[row].slot for row in house.runner.decode]
    assert slots == [0, 0, 1, 1, 2, 2]
    house.drain()


def test_a_row_that_ended_wastes_one_token_at_most() -> None:
    rng = random.Random(2)
    one = request("a", random_prompt(rng, 5), 200)
    house = House(depth=1, prefix_caching=False)
    house.generate([one])
    needed = len(one.tokens) + len(expected(one)) - 1
    assert house.last["a"].finish == "eos"
    assert house.runner.computed_tokens == needed + 1


def test_run_ahead_goes_on_with_admission() -> None:
    house = House(rows=4, step_tokens=8, depth=1)
    for index in range(3):
        house.add(request(f"r{index}", [index + 1] * 8, 2))
    plans = [house.scheduler.plan(), house.scheduler.plan()]
    assert [plan and plan.admit[0].row for plan in plans] == [1, 2]


def test_run_ahead_plans_before_the_result_is_known() -> None:
    house = House(depth=1)
    house.add(request("a", [1, 2], 5, eos=False))
    first = house.scheduler.plan()
    second = house.scheduler.plan()
    assert first is not None and second is not None
    assert first.chunks[0].sample and second.decode == [1]


# -- memory


def test_no_request_overtakes_another_for_memory() -> None:
    house = House(rows=4, blocks=14, block_size=4, depth=0)
    house.add(request("big", [1] * 40, 9, arrival=0, eos=False))
    house.step()
    house.add(request("bigger", [2] * 44, 1, arrival=1))
    house.add(request("small", [3], 1, arrival=2))
    house.drain()
    assert house.order == ["big", "bigger", "small"]


@DEPTHS
def test_the_youngest_is_preempted_and_goes_on_first(depth: int) -> None:
    house = House(rows=4, blocks=41, block_size=4, depth=depth, prefix_caching=False)
    requests = [request(f"r{i}", [i + 1] * 12, 60, arrival=i, eos=False) for i in range(3)]
    for one in requests:
        house.add(one)
    while not house.scheduler.stats().preemptions:
        house.step()
    house.add(request("new", [9], 1, arrival=-1))
    house.drain()
    exact(house, requests)
    heads = [admit.tokens[0] for plan in house.plans for admit in plan.admit]
    assert heads[:3] == [1, 2, 3] and heads[-2:] == [3, 9], "new arrived first but never ran"
    usages = {one.id: one.usage for one in house.last.values()}
    assert usages["r0"] is not None and usages["r0"].preemptions == 0
    assert usages["r2"] is not None and usages["r2"].preemptions > 0


def test_preemption_does_not_repeat_with_every_block() -> None:
    house = House(rows=2, blocks=21, block_size=4, prefix_caching=False)
    requests = [request(f"r{i}", [i + 1] * 8, 60, arrival=i, eos=False) for i in range(2)]
    house.generate(requests)
    exact(house, requests)
    assert house.scheduler.stats().preemptions == 1


def test_an_admission_leaves_room_for_the_running_to_grow() -> None:
    house = House(rows=2, blocks=21, block_size=4)
    requests = [
        request("long", [1] * 60, 19, arrival=0, eos=False),
        request("short", [2] * 4, 12, arrival=1, eos=False),
    ]
    house.generate(requests)
    exact(house, requests)
    assert house.scheduler.stats().preemptions == 0


# -- adapters


def test_a_request_waits_only_for_its_own_adapter() -> None:
    house = House(delay=lambda: 20, depth=0)
    house.add(request("slow", [1], 2, image("a"), arrival=0, eos=False))
    house.add(request("base", [1], 2, arrival=1, eos=False))
    house.drain()
    assert house.order == ["base", "slow"]
    assert len(house.plans) > 20, "empty steps while the copy goes on"
    stats = house.scheduler.stats()
    assert stats.placements == stats.placed == len(stats.place_seconds) == 1


def test_preloaded_adapters_stay() -> None:
    house = House(arena=512, slots=8)
    house.scheduler.preload(image("p"))
    house.scheduler.check()
    house.drain()
    assert house.table.slot_of(image("p").digest) is not None
    requests = [request(f"r{i}", [1], 3, image(f"a{i}"), arrival=i) for i in range(5)]
    requests.append(request("p", [1], 3, image("p")))
    house.generate(requests)
    exact(house, requests)
    assert house.table.slot_of(image("p").digest) is not None
    with pytest.raises(AdapterTooLarge):
        house.scheduler.preload(image("q", 512))


def test_adapters_of_later_requests_are_placed_while_rows_are_full() -> None:
    house = House(rows=1, depth=0)
    house.add(request("a", [1], 20, arrival=0, eos=False))
    house.add(request("b", [1], 1, image("b"), arrival=1))
    house.add(request("c", [1], 1, image("c"), arrival=2))
    for _ in range(5):
        house.step()
    assert len(house.table.residents()) == 2
    house.drain()


def test_only_so_many_copies_are_under_way() -> None:
    house = House(rows=8, slots=50, arena=50 * 256, delay=lambda: 3)
    for index in range(45):
        house.add(request(f"r{index}", [1], 2, image(f"a{index}"), arrival=index))
    most = 0
    while house.step():
        most = max(most, house.table.num_placing)
    assert most == MAX_PLACING < 45
    house.drain()


def test_an_adapter_is_not_taken_from_an_earlier_request() -> None:
    house = House(rows=1, depth=0, arena=256)
    house.add(request("a", [1], 20, arrival=0, eos=False))
    house.add(request("b", [1], 1, image("b"), arrival=1))
    house.add(request("c", [1], 1, image("c"), arrival=2))
    house.drain()
    assert house.order == ["a", "b", "c"]
    assert house.table.num_evictions == 1


# -- views


def test_stats() -> None:
    house = House(rows=2, depth=0)
    for index in range(3):
        house.add(request(f"r{index}", [index + 1] * 5, 5, image("a"), eos=False))
    stats = house.scheduler.stats()
    assert (stats.waiting, stats.running, stats.rows) == (3, 0, 2)
    for _ in range(4):
        house.step()
    stats = house.scheduler.stats()
    assert (stats.waiting, stats.running) == (1, 2)
    assert stats.resident == [("a", image("a").digest, 256)]
    assert (stats.arena_bytes, stats.arena_used) == (1024, 256)
    assert (stats.placements, stats.evictions) == (1, 0)
    assert stats.steps == 4 and stats.step_tokens == house.runner.computed_tokens > 0
    assert stats.free_blocks < stats.total_blocks == 63
    house.drain()
    stats = house.scheduler.stats()
    assert stats.free_blocks == stats.total_blocks and stats.cached_blocks > 0
    assert stats.step_tokens == house.runner.computed_tokens
