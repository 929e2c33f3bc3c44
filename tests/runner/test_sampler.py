"""The sampler against transformers' logits processors, Philox's published vectors, and itself alone."""

from __future__ import annotations

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

from engine.messages import Admit, SamplingParams
from engine.runner.rows import RowTable
from engine.runner.sampler import SamplePlan, distribution, penalise, philox

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
    rows: int, params: list[SamplingParams], seed: int = 3
) -> tuple[RowTable, torch.Tensor]:
    """Rows 1 .. with random known tokens of random lengths, and those lengths."""
    generator = torch.Generator().manual_seed(seed)
    table = RowTable(rows + 1, 64, 4, CPU)
    lengths = torch.randint(5, 60, (rows,), generator=generator)
    for i, length in enumerate(lengths.tolist()):
        tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
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


def test_rows_with_different_parameters_keep_their_own() -> None:
    params = [params for params, _ in WARPERS.values()]
    logits = logits_of(len(params), 2.0, 2)
    together = SamplePlan(params, CPU).filters
    assert together is not None
    probs = distribution(logits, together)
    for i, one in enumerate(params):
        alone = SamplePlan([one], CPU).filters
        assert alone is not None
        assert torch.equal(distribution(logits[i : i + 1], alone)[0], probs[i])


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
