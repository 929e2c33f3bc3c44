"""Sampling on the GPU: no way of it waits for the device, and each gives the CPU's tokens."""

from __future__ import annotations

import pytest
import torch

from engine.messages import SamplingParams
from engine.ops import extension
from engine.runner.rows import RowTable
from engine.runner.sampler import SamplePlan
from tests.runner.test_cuda_graphs import no_waiting
from tests.runner.test_sampler import logits_of, mixed_params, table_of

pytestmark = pytest.mark.gpu

PARAMS = {
    "greedy": SamplingParams(),
    "logprobs": SamplingParams(logprobs=True, num_alternatives=4),
    "temperature": SamplingParams(temperature=0.8, seed=3),
    "top_k": SamplingParams(temperature=1.0, top_k=30, seed=1 << 40),
    "top_p": SamplingParams(temperature=1.0, top_p=0.9, seed=-9),
    "typical_p": SamplingParams(temperature=1.0, typical_p=0.9, seed=4),
    "min_p": SamplingParams(temperature=1.3, min_p=0.05, seed=5),
    "penalties": SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=1),
    "all": SamplingParams(
        temperature=1.1,
        top_k=900,
        top_p=0.95,
        typical_p=0.9,
        min_p=0.001,
        repetition_penalty=1.2,
        seed=8,
        logprobs=True,
    ),
}


@pytest.fixture(autouse=True)
def loaded() -> None:
    assert "pick_greedy_" in extension.load_cuda().ops, extension.load_cuda().reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("names", [[name] for name in PARAMS] + [list(PARAMS)], ids=str)
def test_tokens_are_those_of_the_cpu(
    names: list[str], index: torch.dtype, dtype: torch.dtype
) -> None:
    """Twice, because libraries allocate on a first call; the second one must not wait."""
    params = [PARAMS[name] for name in names] * 3
    logits = logits_of(len(params), 2.0, 7).to(dtype)
    cuda = torch.device("cuda")
    here, lengths = table_of(len(params), params)
    there = RowTable(len(here.num_computed), 64, 4, cuda)
    there.words.words.copy_(here.words.words)
    rows = torch.arange(1, len(params) + 1)
    expected = SamplePlan(params, torch.device("cpu")).sample(logits, here, rows, lengths)
    arguments = (logits.cuda(), there, rows.to(cuda, index), lengths.to(cuda, index))
    longest = int(lengths.max())
    SamplePlan(params, cuda).sample(*arguments, longest)
    torch.cuda.synchronize()
    with no_waiting():
        found = SamplePlan(params, cuda).sample(*arguments, longest)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert torch.equal(there.tokens.cpu(), here.tokens)
    if expected.logprobs is not None and found.logprobs is not None:
        torch.testing.assert_close(found.logprobs.cpu(), expected.logprobs)


def test_rows_of_a_mixed_batch_are_those_of_the_cpu_alone() -> None:
    """No two rows have the same values."""
    params = mixed_params()
    logits = logits_of(len(params), 2.0, 9)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    here, lengths = table_of(len(params), params)
    there = RowTable(len(here.num_computed), 64, 4, cuda)
    there.words.words.copy_(here.words.words)
    rows = torch.arange(1, len(params) + 1)
    found = SamplePlan(params, cuda).sample(logits.cuda(), there, rows.cuda(), lengths.cuda())
    for i, one in enumerate(params):
        row = slice(i, i + 1)
        alone = SamplePlan([one], cpu).sample(logits[row], here, rows[row], lengths[row])
        assert int(found.tokens[i]) == int(alone.tokens), one
    assert torch.equal(there.tokens.cpu(), here.tokens)
