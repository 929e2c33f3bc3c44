"""The sampler against transformers' logits processors, Philox's published vectors, and itself alone."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from engine.messages import Admit, SamplingParams, TokenOutput
from engine.runner.rows import RowTable
from engine.runner.sampler import (
    WATERMARK_KEY,
    Masks,
    SamplePlan,
    allowed,
    distribution,
    draw,
    penalise,
    philox,
    philox_uniform,
)

CPU = torch.device("cpu")
VOCAB = 3000

WARPERS = {
    "temperature": (SamplingParams(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
    "top_k": (SamplingParams(temperature=1.0, top_k=17), [TopKLogitsWarper(17)]),
    "top_p": (SamplingParams(temperature=1.0, top_p=0.83), [TopPLogitsWarper(0.83)]),
    "typical_p": (SamplingParams(temperature=1.0, typical_p=0.6), [TypicalLogitsWarper(0.6)]),
    "min_p": (SamplingParams(temperature=1.0, min_p=0.05), [MinPLogitsWarper(0.05)]),
    "all": (
        SamplingParams(temperature=1.3, top_k=200, top_p=0.9, typical_p=0.8, min_p=0.01),
        [
            TemperatureLogitsWarper(1.3),
            TopKLogitsWarper(200),
            TopPLogitsWarper(0.9),
            TypicalLogitsWarper(0.8),
            MinPLogitsWarper(0.01),
        ],
    ),
}


def logits_of(rows: int, spread: float, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def table_of(
    rows: int, params: list[SamplingParams], seed: int = 3, kinds: int = VOCAB
) -> tuple[RowTable, torch.Tensor]:
    """Rows 1 .. with random known tokens below `kinds` of random lengths, and those lengths."""
    generator = torch.Generator().manual_seed(seed)
    table = RowTable(rows + 1, 64, 4, CPU)
    lengths = torch.randint(5, 60, (rows,), generator=generator)
    for i, length in enumerate(lengths.tolist()):
        tokens = torch.randint(0, kinds, (length,), generator=generator).tolist()
        table.admit(Admit(i + 1, 0, tokens, length // 2, 0, [], params[i]))
    return table, lengths


@pytest.mark.parametrize("spread", [0.5, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("name", WARPERS)
def test_distribution_is_that_of_transformers(name: str, spread: float) -> None:
    params, warpers = WARPERS[name]
    logits = logits_of(8, spread, 1)
    filters = SamplePlan([params] * 8, CPU).filters
    assert filters is not None
    warped = logits.clone()
    for warper in warpers:
        warped = warper(None, warped)
    torch.testing.assert_close(distribution(logits, filters), warped.softmax(-1))


# Rows of one batch, of which no two have the same values: each filter by itself at its extremes, then every
# combination of filters, some rows greedy, with penalties or with reported log-probabilities.
VALUES = {
    "temperature": (0.05, 0.7, 1.9, 30.0),
    "top_k": (1, 2, 3, 17, 18, 400, VOCAB - 1, VOCAB, VOCAB + 1, 1 << 30),
    "top_p": (1e-6, 0.2, 0.5, 0.83, 0.9, 0.97),
    "typical_p": (1e-6, 0.2, 0.6, 0.9, 0.95),
    "min_p": (1e-5, 0.01, 0.05, 0.3, 1.0),
    "repetition_penalty": (0.5, 1.1, 1.4, 3.0),
    "frequency_penalty": (-1.5, 0.3, 0.7, 2.0),
    "presence_penalty": (-2.0, -0.5, 0.4, 1.1),
}
FILTERS = ("top_k", "top_p", "typical_p", "min_p")


def mixed_params() -> list[SamplingParams]:
    rows: list[dict[str, float]] = [{"temperature": 1.0}, {"temperature": 0.0}]
    for name, values in VALUES.items():
        rows += [{"temperature": 1.0} | {name: value} for value in values]
    for number, used in enumerate(itertools.product((False, True), repeat=len(FILTERS))):
        names = [name for name, on in zip(FILTERS, used, strict=True) if on]
        row = {name: VALUES[name][-2 - number % 3] for name in names}
        rows.append(row | {"temperature": 0.8 + number / 10})
        for at, name in enumerate(("repetition_penalty", "frequency_penalty", "presence_penalty")):
            if number >> at & 1:
                rows[-1][name] = VALUES[name][number % 4]
    rows += [{"repetition_penalty": 1.3}, {"frequency_penalty": 1.2}, {"presence_penalty": 0.9}]
    return [
        SamplingParams(
            **row,  # type: ignore[arg-type]
            seed=(-1) ** number * (number << 7 * (number % 9)),
            logprobs=number % 3 == 0,
            num_alternatives=(0, 3, 0, 1, 7)[number % 5],
        )
        for number, row in enumerate(rows)
    ]


def warped(params: SamplingParams, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities of one row by transformers' processors, alone."""
    warpers = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.typical_p < 1:
        warpers.append(TypicalLogitsWarper(params.typical_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    logits = logits[None].clone()
    for warper in warpers:
        logits = warper(None, logits)
    return logits.softmax(-1)[0]


def expected_token(
    params: SamplingParams, logits: torch.Tensor, tokens: list[int], prompt: int
) -> int:
    """One row's next token, by loops."""
    logits = logits.clone()
    for token in set(tokens):
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token, count in Counter(tokens[prompt:]).items():
        logits[token] -= count * params.frequency_penalty + params.presence_penalty
    if not params.temperature:
        return int(logits.argmax())
    uniform = philox_uniform(torch.tensor([params.seed]), torch.tensor([len(tokens)]))
    probs = warped(params, logits).double()
    return int((probs.cumsum(-1) <= uniform * probs.sum()).sum())


@pytest.mark.parametrize("spread", [0.3, 2.0], ids=["flat", "peaked"])
def test_every_row_of_a_mixed_batch_has_the_distribution_of_transformers(spread: float) -> None:
    params = [one for one in mixed_params() if one.temperature]
    logits = logits_of(len(params), spread, 2)
    together = SamplePlan(params, CPU).filters
    assert together is not None
    probs = distribution(logits, together)
    for i, one in enumerate(params):
        alone = SamplePlan([one], CPU).filters
        assert alone is not None
        assert torch.equal(distribution(logits[i : i + 1], alone)[0], probs[i]), one
        expected = warped(one, logits[i])
        if one.top_p == one.typical_p == 1:  # no sums, whose rounding could decide on a token
            assert torch.equal(probs[i] > 0, expected > 0), one
        torch.testing.assert_close(probs[i], expected, msg=str(one))


@pytest.mark.parametrize("order", [1, -1, 11], ids=["in order", "backwards", "mixed up"])
def test_every_row_of_a_mixed_batch_samples_as_alone_and_by_loops(order: int) -> None:
    """With rows of the table in any order, and nothing but the new tokens written to it."""
    params = mixed_params()
    count = len(params)
    table, lengths = table_of(count, params, kinds=30)
    logits, before = logits_of(count, 2.0, 9), table.tokens.clone()
    logits[:, :60] += 4 * logits[:, :60].sign()  # so that penalties decide
    logits[::2] -= 20  # below zero they are multiplied
    at = [i * order % count for i in range(count)]
    assert len(set(at)) == count
    rows = torch.tensor(at) + 1
    chosen = SamplePlan([params[i] for i in at], CPU).sample(logits[at], table, rows, lengths[at])
    outputs = chosen.outputs()
    after = table.tokens.clone()
    for output, i in zip(outputs, at, strict=True):
        length = int(lengths[i])
        known = before[i + 1, :length].tolist()
        assert output.token == expected_token(params[i], logits[i], known, length // 2), params[i]
        assert after[i + 1, length] == output.token
        alone = SamplePlan([params[i]], CPU).sample(
            logits[i : i + 1], table, torch.tensor([i + 1]), lengths[i : i + 1]
        )
        assert alone.outputs() == [output]
        logprobs = logits[i].log_softmax(-1)
        reported = params[i].logprobs or params[i].num_alternatives
        assert output.logprob == (float(logprobs[output.token]) if reported else None)
        top = logprobs.topk(params[i].num_alternatives)
        pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        assert output.alternatives == (pairs or None)
    before[rows, lengths[at]] = after[rows, lengths[at]]
    assert torch.equal(before, after)


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = logits_of(4, 2.0, 4)
    tokens = torch.randint(0, VOCAB, (4, 30))
    expected = RepetitionPenaltyLogitsProcessor(1.4)(tokens, logits.clone())
    off, lengths = torch.zeros(4), torch.full((4,), 30)
    penalise(logits, tokens, lengths, lengths, torch.full((4,), 1.4), off, off)
    torch.testing.assert_close(logits, expected)


def test_frequency_and_presence_count_the_output_only() -> None:
    tokens = torch.tensor(
        [[7, 7, 5, 5, 5, 9, 1, 1]]
    )  # prompt 7 7, output 5 5 5 9, 1 1 not known yet
    logits = torch.zeros(1, 12)
    one = torch.ones(1)
    penalise(logits, tokens, torch.tensor([6]), torch.tensor([2]), one, one * 0.5, one * 0.25)
    expected = torch.zeros(12)
    expected[5], expected[9] = -(3 * 0.5 + 0.25), -(0.5 + 0.25)
    torch.testing.assert_close(logits[0], expected)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter: str, key: str, words: str) -> None:
    """Known answers of the Random123 library (Salmon et al. 2011)."""
    as_tensors = [[torch.tensor([int(w, 16)]) for w in text.split()] for text in (counter, key)]
    assert [int(word) for word in philox(*as_tensors)] == [int(w, 16) for w in words.split()]


def test_a_draw_on_the_edge_is_of_the_next_token_that_is_left() -> None:
    """Never of a filtered one."""
    probs = torch.tensor([[0.25, 0.25, 0.0, 0.5]]).expand(4, 4)
    edges = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert draw(probs, edges).tolist() == [0, 1, 3, 3]


def test_draws_follow_the_distribution() -> None:
    n = 20_000
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, float("-inf")]]).expand(n, 5)
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(n)]
    table, _ = table_of(1, [SamplingParams()])
    rows = torch.ones(n, dtype=torch.int64)
    chosen = SamplePlan(params, CPU).sample(logits, table, rows, torch.full((n,), 11)).tokens
    frequency = torch.bincount(chosen, minlength=5) / n
    expected = logits[0].softmax(-1)
    # Five standard deviations of a binomial share.
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_a_row_samples_the_same_alone_and_in_a_batch() -> None:
    params = [
        SamplingParams(),
        SamplingParams(logprobs=True, num_alternatives=3),
        SamplingParams(temperature=1.0, seed=5, repetition_penalty=1.3, logprobs=True),
        SamplingParams(temperature=0.8, seed=6, top_p=0.9, frequency_penalty=0.7),
        SamplingParams(temperature=1.5, seed=-7, typical_p=0.9, presence_penalty=-0.5),
        SamplingParams(temperature=1.0, seed=1 << 62, min_p=0.02, top_k=40, num_alternatives=1),
    ]
    table, lengths = table_of(len(params), params)
    logits = logits_of(len(params), 1.5, 9)
    rows = torch.arange(1, len(params) + 1)
    sampled = SamplePlan(params, CPU).sample(logits, table, rows, lengths)
    chosen, outputs = sampled.tokens, sampled.outputs()
    assert chosen.tolist() == [output.token for output in outputs]
    for i, one in enumerate(params):
        alone = SamplePlan([one], CPU).sample(
            logits[i : i + 1], table, rows[i : i + 1], lengths[i : i + 1]
        )
        assert alone.outputs() == [outputs[i]]


def test_log_probabilities_are_the_models_own() -> None:
    params = [SamplingParams(temperature=2.0, top_k=2, logprobs=True, num_alternatives=4, seed=1)]
    table, lengths = table_of(1, params)
    logits = logits_of(1, 1.0, 8)
    sampled = SamplePlan(params, CPU).sample(logits, table, torch.tensor([1]), lengths)
    (output,) = sampled.outputs()
    expected = logits.log_softmax(-1)[0]
    assert output.logprob == float(expected[output.token])
    assert output.alternatives is not None
    assert [token for token, _ in output.alternatives] == expected.topk(4).indices.tolist()


@pytest.mark.parametrize("vocab", [31, 32, 70])
def test_bitmask_is_minus_infinity(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(5, vocab, generator=generator)
    keep = torch.rand(5, vocab, generator=generator) < 0.5
    keep[:, vocab - 1] = True
    words = torch.zeros(5, -(-vocab // 32), dtype=torch.int64)
    for row, token in keep.nonzero().tolist():
        words[row, token // 32] |= 1 << (token % 32)
    bitmask = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    found = allowed(logits, bitmask)
    assert torch.equal(found, torch.where(keep, logits, float("-inf")))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_mask_is_of_its_rows_only(temperature: float) -> None:
    """Other rows keep their tokens; log-probabilities are those before the mask."""
    generator = torch.Generator().manual_seed(3)
    logits, vocab = torch.randn(6, 70, generator=generator), 70
    params = [SamplingParams(temperature=temperature, seed=row, logprobs=True) for row in range(6)]
    table, rows, lengths = RowTable(7, 40, 4, CPU), torch.arange(1, 7), torch.full((6,), 11)

    def sample(masks: Masks | None) -> list[TokenOutput]:
        plan = SamplePlan(params, CPU)
        return plan.sample(logits, table, rows, lengths, masks=masks).outputs()

    free = sample(None)
    at, only = torch.tensor([1, 4]), (69, 5)
    bits = torch.zeros(2, -(-vocab // 32), dtype=torch.int32)
    for row, token in enumerate(only):
        bits[row, token // 32] |= 1 << (token % 32)
    found = sample(Masks(at, bits))
    reported = logits.log_softmax(-1)
    for row in range(6):
        token = only[(1, 4).index(row)] if row in (1, 4) else free[row].token
        assert found[row].token == token
        assert found[row].logprob == pytest.approx(float(reported[row, token]))


def test_biases_and_delayed_tokens() -> None:
    """A biased logit is the logit plus its bias; a delayed token is impossible while the output is short."""
    logits = torch.zeros(4, 20)
    logits[:, 3], logits[:, 7] = 2.0, 1.0
    params = [
        SamplingParams(),
        SamplingParams(logit_bias={7: 1.5, 3: 0.25, 19: 1e-3}),
        SamplingParams(min_tokens=2, delayed=(3, 5)),
        SamplingParams(min_tokens=1, delayed=(3, 5), logit_bias={3: 100.0}),
    ]
    table = RowTable(5, 40, 4, CPU)
    for row in range(1, 5):
        table.admit(Admit(row, 0, [1] * 10, 9, 0, [], SamplingParams()))  # one token of output
    rows, lengths = torch.arange(1, 5), torch.full((4,), 10)
    chosen = SamplePlan(params, CPU).sample(logits, table, rows, lengths).tokens.tolist()
    assert chosen == [3, 7, 7, 3]
    chosen = SamplePlan(params, CPU).sample(logits, table, rows, lengths + 1).tokens.tolist()
    assert chosen == [3, 7, 3, 3]


def test_the_watermark_favours_the_green_list_of_the_token_before() -> None:
    """As often as gamma says a token is green; with a large delta only green tokens come. Computed one by one."""
    vocab, gamma, n = 500, 0.3, 8
    table = RowTable(n + 1, 40, 4, CPU)
    for row in range(1, n + 1):
        table.admit(Admit(row, 0, [row] * 10, 10, 0, [], SamplingParams()))
    params = [
        SamplingParams(temperature=1.0, seed=row, watermark_gamma=gamma, watermark_delta=50.0)
        for row in range(n - 1)
    ] + [SamplingParams()]
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(1))
    rows, lengths = torch.arange(1, n + 1), torch.full((n,), 10)
    chosen = SamplePlan(params, CPU).sample(logits, table, rows, lengths).tokens.tolist()
    for row in range(n - 1):
        key = torch.tensor([WATERMARK_KEY + row + 1])
        green = [
            float(philox_uniform(key, torch.tensor([token]))) < gamma for token in range(vocab)
        ]
        assert green[chosen[row]] and sum(green) / vocab == pytest.approx(gamma, abs=0.1)
    assert chosen[-1] == int(logits[-1].argmax()), "a row without a watermark is free"
