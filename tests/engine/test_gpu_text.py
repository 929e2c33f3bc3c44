"""Text of tiny models in float32: a GPU gives what the CPU gives, token for token, for every family."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.engine.harness import Device, Harness, Outcome, config_of, request
from tests.tiny import CONFIGS, TARGETS, VOCAB, make_adapter, make_model

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-3  # of log-probabilities
RANKS = {"attention": 3, "all": 16, "mlp": 64, "ends": 7}
NEW = 16
SEED = 3  # of prompts whose texts are nowhere near a tie


def run(folder: Path, device: Device) -> dict[str, Outcome]:
    """Base and adapters in one batch: prompts of 3 to 90 tokens, two requests for each adapter."""
    harness = Harness(config_of(folder / "base", device=device, max_batch_prefill_tokens=64))
    assert harness.engine.platform.device.type == device
    images = [None, *(harness.stage(folder / targets) for targets in TARGETS)]
    chooser = random.Random(SEED)
    requests = []
    for i in range(2 * len(images)):
        prompt = [chooser.randrange(2, VOCAB) for _ in range(3 + i * 87 // 9)]
        wants = {"num_alternatives": 2, "prompt_logprobs": i % 3 == 0}
        requests.append(request(str(i), prompt, images[i % len(images)], NEW, **wants))
    outcomes = harness.run(requests)
    harness.close()
    return outcomes


def closest(outcomes: dict[str, Outcome]) -> float:
    """The least distance of the best token from the second best."""
    pairs = [o.alternatives for outcome in outcomes.values() for o in outcome.outputs]
    return min(two[0][1] - two[1][1] for two in pairs if two)


def build(family: str, folder: Path) -> None:
    model = make_model(family, folder / "base")
    for seed, (targets, rank) in enumerate(RANKS.items()):
        make_adapter(model, folder / targets, seed=seed, rank=rank, targets=targets).unload()


@pytest.mark.parametrize("family", CONFIGS)
def test_text_is_the_cpus(family: str, tmp_path: Path) -> None:
    build(family, tmp_path)
    expected, found = run(tmp_path, "cpu"), run(tmp_path, "cuda")
    assert closest(expected) > 1e-3, "choose another SEED: rounding may decide this text"
    for id, outcome in expected.items():
        assert found[id].error is None and outcome.error is None
        assert found[id].tokens == outcome.tokens, id
        for ours, theirs in (
            (found[id].logprobs, outcome.logprobs),
            (found[id].prompt_logprobs or [], outcome.prompt_logprobs or []),
        ):
            assert len(ours) == len(theirs)
            torch.testing.assert_close(
                torch.tensor(ours), torch.tensor(theirs), atol=TOLERANCE, rtol=0
            )
