"""Steps padded to the shapes of the graphs give what the same steps give as they are; shapes and their bounds."""

from __future__ import annotations

import random

import pytest
import torch

from engine.messages import NOTHING, SCORES, TOKEN, Admit, Chunk, SamplingParams
from engine.ops.attention.builtin import Builtin
from engine.runner.batch import EVERYTHING, Adapters, BatchBuilder, Reach
from engine.runner.graphs import EVERYWHERE, IN_LAYERS, NO_LORA
from engine.runner.inputs import Description, runs
from engine.runner.rows import RowTable
from engine.runner.shapes import (
    FEW_TOKENS,
    Shape,
    chunk_bounds,
    decode_shapes,
    decode_words,
    mixed_shapes,
    mixed_words,
)
from tests.ops.test_cpu_lora import per_token
from tests.runner.twins import (
    Scene,
    Twins,
    let_attention_pad,
    make_scene,
    small_config,
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("steps"))


@pytest.mark.parametrize("ahead", [0, 1], ids=["in turn", "run ahead"])
@pytest.mark.parametrize("step_tokens", [23, 200])
def test_padded_is_plain(
    scene: Scene, ahead: int, step_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_attention_pad(monkeypatch)
    config = small_config(scene, max_batch_prefill_tokens=step_tokens)
    twins = Twins(scene, config, config)
    graphs = twins.capture()
    twins.run(40, seed=step_tokens + ahead, longest=min(150, 4 * step_tokens), ahead=ahead)
    replayed = graphs.replayed
    assert {kind for _, kind in replayed} == {NO_LORA, IN_LAYERS, EVERYWHERE, EVERYTHING}
    assert any(shape.chunks for shape, _ in replayed)
    assert any(not shape.chunks for shape, _ in replayed)
    assert len({shape for shape, _ in replayed}) > 3
    assert sum(plan.chunks != [] for plan in twins.plans) > 15
    assert twins.padded.engine.stats.evictions > 0
    assert len(replayed) > 0.8 * len([p for p in twins.plans if p.decode or p.chunks])
    twins.close()


def random_description(
    generator: random.Random, max_rows: int, max_tokens: int, chunks: bool, scored: bool = False
) -> Description:
    """Rows and chunks in the order of their slots, as a scheduler plans them; of some chunks all tokens are scored."""
    rows = generator.sample(range(1, max_rows + 1), generator.randint(1, max_rows))
    cut = generator.randint(0, len(rows)) if chunks else len(rows)
    decode, others = rows[:cut], rows[cut:]
    budget = max_tokens - len(decode)
    planned = []
    for row in others:
        count = generator.choice([1, generator.randint(1, 9), generator.randint(1, max_tokens)])
        if count > budget:
            break
        budget -= count
        start = generator.randint(0, 50)
        wanted = scored and generator.random() < 0.3
        wants = TOKEN if generator.random() < 0.5 else NOTHING
        planned.append(Chunk(row, start, count, wants | (SCORES if wanted else NOTHING)))
    popular = generator.choice([1, 3, 200])
    slots = sorted(generator.randrange(popular) for _ in decode)
    slots += sorted(generator.randrange(popular) for _ in planned)
    return Description(decode, planned, slots, [generator.randint(1, 60) for _ in decode])


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(1, 1), (7, 19), (20, 300), (256, 8192)])
def test_every_step_fits_its_bucket(max_rows: int, max_tokens: int) -> None:
    """As many rows, chunks and tokens as a bucket has never need more segments, outputs or words than it has."""
    generator = random.Random(max_rows)
    max_tokens = max(max_rows, max_tokens)
    shapes = decode_shapes(max_rows), mixed_shapes(max_rows, max_tokens)
    found = 0
    for i in range(400):
        step = random_description(
            generator, max_rows, max_tokens, chunks=i % 2 == 1, scored=i % 4 == 1
        )
        needed = step.shape
        assert len(step.words(needed)) == needed.words
        mixed = bool(step.chunks)
        assert needed.words <= (mixed_words if mixed else decode_words)(
            *([max_rows, max_tokens] if mixed else [max_rows])
        )
        for shape in shapes[mixed]:
            rows_fit = shape.decodes >= needed.decodes and shape.chunks >= needed.chunks
            tokens_fit = shape.tokens - shape.decodes >= needed.tokens - needed.decodes
            outputs_fit = shape.outputs >= needed.outputs
            assert outputs_fit or step.scored or not (rows_fit and tokens_fit)
            assert shape.holds(needed) == (rows_fit and tokens_fit and outputs_fit)
            if shape.holds(needed):
                found += 1
                assert len(step.words(shape)) == shape.words
        if not mixed and needed.decodes:
            assert any(shape.holds(needed) for shape in shapes[0])
    assert found >= 300


@pytest.mark.parametrize("seed", range(12))
def test_a_description_expands_to_its_tokens(seed: int) -> None:
    """Every token, place, output and slot of a step against what its rows hold, with padding and without."""
    generator = random.Random(seed)
    max_rows, block_size = 20, 4
    device = torch.device("cpu")
    spare = decode_words(max_rows) + mixed_words(max_rows, 300)
    table = RowTable(max_rows + 1, 400, 100, device, spare)
    records = torch.zeros(201, 2, 1, 8, dtype=torch.int32)
    attention = Builtin()
    cache = torch.zeros(9, 1, 2, block_size, 1, 1)
    adapters = Adapters(torch.zeros(16).byte(), records)
    builder = BatchBuilder(table, cache, adapters, attention)
    step = random_description(generator, max_rows, 300, chunks=seed % 3 > 0)
    held: dict[int, Admit] = {}
    for row, slot in zip([*step.decode, *(c.row for c in step.chunks)], step.slots, strict=True):
        tokens = [generator.randrange(1, 999) for _ in range(400)]
        blocks = [generator.randrange(1, 999) for _ in range(100)]
        computed = generator.randint(0, 399)
        held[row] = Admit(row, slot, tokens, 1, computed, blocks, SamplingParams())
        table.admit(held[row])
    builder.set_decode(step.decode)
    step = builder.describe(step.chunks)
    new = [(row, held[row].computed, 1) for row in step.decode]
    new += [(chunk.row, chunk.start, chunk.count) for chunk in step.chunks]
    shapes = mixed_shapes(max_rows, 300) if step.chunks else decode_shapes(max_rows)
    for shape in [step.shape, *(s for s in shapes if s.holds(step.shape))]:
        for row, admit in held.items():
            table.computed[row] = admit.computed
        builder.write(step, shape)
        reach = Reach(1, [[True], [True]])
        batch, rows, lengths = builder.expand(shape, 400, reach, attention.attend)
        ahead = shape.decodes - len(step.decode)
        assert batch.kv.num_decodes == shape.decodes
        last, slots = [], []
        for s, (row, start, count) in enumerate(new, ahead):
            at, end = int(batch.kv.cu_seqlens_q[s]), int(batch.kv.cu_seqlens_q[s + 1])
            positions = [*range(start, start + count)]
            assert batch.positions[at:end].tolist() == positions
            assert batch.ids[at:end].tolist() == [held[row].tokens[i] for i in positions]
            assert batch.kv.slot_mapping[at:end].tolist() == [
                held[row].blocks[i // block_size] * block_size + i % block_size for i in positions
            ]
            assert batch.kv.context_lens[s] == table.computed[row] == start + count
            last.append(end - 1)
            slots += [held[row].slot] * count
        assert batch.kv.cu_seqlens_q[: shape.decodes + 1].tolist() == [*range(shape.decodes + 1)]
        assert batch.lora is not None and batch.lora_outputs is not None
        assert per_token(batch.lora.slots, batch.lora.segment_starts)[ahead:] == slots
        sampled, first = step.sampled, 0 if step.chunks else ahead
        expected = [(new[s][0], new[s][1] + new[s][2]) for s in sampled]
        found = zip(rows.tolist()[first:], lengths.tolist()[first:], strict=True)
        assert [*found][: len(sampled)] == expected
        if step.chunks:
            assert batch.outputs is not None and len(batch.outputs) == shape.outputs
            assert batch.outputs[: len(sampled)].tolist() == [last[s] for s in sampled]
            assert not batch.outputs[len(sampled) :].any()
            of_outputs = per_token(batch.lora_outputs.slots, batch.lora_outputs.segment_starts)
            assert of_outputs == [step.slots[s] for s in sampled]


def test_buckets_rise_and_end_with_every_row() -> None:
    for max_rows in (1, 3, 16, 64, 200, 256):
        sizes = [shape.decodes for shape in decode_shapes(max_rows)]
        assert sizes == sorted(set(sizes)) and sizes[-1] == max_rows and sizes[0] == 1
        for max_tokens in (256, 1000, 8192):
            shapes = mixed_shapes(max_rows, max_tokens)
            tokens = [shape.tokens for shape in shapes]
            assert tokens == sorted(tokens)
            assert max(shape.decodes for shape in shapes) == max_rows
            most = max(shape.tokens - shape.decodes for shape in shapes)
            assert most == 2048 or max_tokens <= most < 2 * max_tokens


def test_segments() -> None:
    assert runs([0, 0, 5, 5, 2], [1, 3, 9, 8, 1]) == ([0, 5, 2], [0, 4, 21, 22])
    assert runs([2, 0, 2], [1, 2, 3]) == ([2, 0, 2], [0, 1, 3, 6])
    assert runs([0], [30]) == ([0], [0, 30])
    assert runs([], []) == ([], [0])


@pytest.mark.parametrize("max_rows", [1, 64, 150, 190, 256])
@pytest.mark.parametrize("most", [40, 128, 200])
def test_chunks_beside_decoding_rows_keep_the_bucket_small(max_rows: int, most: int) -> None:
    """As many tokens as the bound, no more, are computed in a step for few tokens, where that has room for chunks."""
    shapes = mixed_shapes(max_rows, 8192)

    def bucket(rows: int, tokens: int) -> Shape:
        needed = Shape(rows, 1, rows + tokens, rows + 1)
        return next(shape for shape in shapes if shape.holds(needed))

    bounds = chunk_bounds(max_rows, most)
    assert len(bounds) == max_rows + 1
    for rows, bound in enumerate(bounds):
        few = bucket(rows, 64).tokens <= FEW_TOKENS  # 64: the smallest bucket of chunks
        small = bound <= 128 and few
        assert not small or bucket(rows, bound).tokens <= FEW_TOKENS
        assert bound == most or (few and bound < most)
        assert bound == most or bucket(rows, bound + 1).tokens > FEW_TOKENS
