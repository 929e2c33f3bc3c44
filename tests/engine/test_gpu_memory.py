"""A GPU that runs out of memory in a step: torch is held to a little more than the engine keeps."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import ModelConfig
from engine.messages import Request
from tests.engine.harness import MIB, Harness, Outcome, config_of, request

pytestmark = pytest.mark.gpu

VOCAB, PROMPT, STEP = 32000, 1500, 2048
SPARE = 96 * MIB  # log-probabilities of as much of a prompt as a step takes are 67 MB, twice
TOLERANCE = 1e-4  # of log-probabilities, in float32
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    config = config_of(
        tmp_path,
        max_batch_size=8,
        max_batch_prefill_tokens=STEP,
        max_total_tokens=STEP,
        prefix_caching=False,
    )
    model = ModelConfig(model_id=str(tmp_path), dtype="float32", load_format="dummy")
    torch.manual_seed(0)
    harness = Harness(replace(config, model=model))
    yield harness
    torch.cuda.set_per_process_memory_fraction(1.0)
    harness.close()


def requests() -> list[Request]:
    chooser = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [chooser.randrange(VOCAB) for _ in range(count)]

    return [
        *(request(f"short {i}", tokens(5 + i), max_new_tokens=60) for i in range(4)),
        request("scored", tokens(PROMPT), max_new_tokens=4, prompt_logprobs=True),
    ]


def scores(outcome: Outcome) -> torch.Tensor:
    return torch.tensor(outcome.logprobs + (outcome.prompt_logprobs or []))


def test_a_step_that_does_not_fit_is_computed_in_parts(harness: Harness) -> None:
    expected = harness.run(requests())
    budget = harness.engine.scheduler._budget
    assert budget.tokens == budget.max_tokens, "there was memory for the undisturbed run"
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + SPARE) / total)
    found = harness.run(requests())
    assert budget.tokens < budget.max_tokens, "nothing ran out of memory"
    for id, outcome in expected.items():
        assert found[id].error is None, found[id].error
        assert found[id].tokens == outcome.tokens, id
        torch.testing.assert_close(scores(found[id]), scores(outcome), atol=TOLERANCE, rtol=0)
    assert harness.engine.stats.free_blocks == harness.engine.stats.total_blocks


@pytest.fixture
def before() -> int:
    """Bytes on the device that are not the engine's, if asked for ahead of it."""
    gc.collect()
    return torch.cuda.memory_allocated()


def test_the_plan_holds(before: int, harness: Harness) -> None:
    """What the engine keeps on the device is what it planned to, within the room for a step."""
    plan = harness.engine.plan
    kept = plan.weights + plan.num_blocks * plan.kv_block + plan.arena + plan.records
    used = torch.cuda.memory_allocated() - before
    assert kept <= used <= kept + plan.working
