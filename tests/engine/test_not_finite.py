"""A request whose logits are not finite ends with a typed error, alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.harness import Harness, config_of, request
from tests.tiny import make_adapter, make_model

PROMPTS = [[5, 9, 120, 33, 7], [8, 8, 61, 14, 90, 2], [44, 3, 101]]


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_an_adapter_that_diverged(run_ahead: int, tmp_path: Path) -> None:
    """Greedy and sampled requests, beside others and ahead of others that reuse their blocks."""
    model = make_model("llama", tmp_path / "base")
    for name in ("good", "bad"):
        make_adapter(model, tmp_path / name, seed=1, rank=4).unload()
    config = tmp_path / "bad" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 1e30}))
    harness = Harness(config_of(tmp_path / "base", prefix_caching=False), run_ahead=run_ahead)
    good, bad = harness.stage(tmp_path / "good"), harness.stage(tmp_path / "bad")
    sound = [request(f"{i}", prompt, (good, None)[i % 2]) for i, prompt in enumerate(PROMPTS)]
    expected = harness.run(sound)
    broken = [
        request("greedy", PROMPTS[0], bad),
        request("drawn", PROMPTS[1], bad, temperature=0.9),
    ]
    broken.append(request("punished", PROMPTS[2], bad, repetition_penalty=1.3, num_alternatives=2))
    found = harness.run([*broken, *sound])
    for one in broken:
        error = found.pop(one.id).error
        assert error is not None and error["class"] == "AdapterIncompatible", error
        assert "not finite" in str(error["message"]) and error["field"] == "adapter_id"
    assert found == expected
    assert harness.run(sound) == expected
    harness.close()
