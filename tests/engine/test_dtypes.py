"""Half precision: near the float32 reference, and the same to the bit alone and in a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import ModelConfig
from tests.engine.harness import Harness, config_of, request
from tests.tiny import VOCAB, make_adapter, make_model

# Of log-probabilities: a few roundings of the logits, whose size is about 8.
TOLERANCE = {"bfloat16": 0.25, "float16": 0.03}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "base")
    wrapped = make_adapter(model, tmp_path / "adapter", seed=3, rank=12)
    config = replace(
        config_of(tmp_path / "base"),
        model=ModelConfig(model_id=str(tmp_path / "base"), dtype=dtype),  # type: ignore[arg-type]
    )
    harness = Harness(config)
    image = harness.stage(tmp_path / "adapter")
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(2, VOCAB, (4, 40), generator=generator).tolist()
    requests = [
        request(str(i), prompt[: 10 + 10 * i], image if i % 2 else None)
        for i, prompt in enumerate(prompts)
    ]
    together = harness.run(requests)
    for one in requests:
        (alone,) = harness.run([one]).values()
        assert alone.outputs == together[one.id].outputs
    scored = harness.run([request("s", prompts[0], image, 1, prompt_logprobs=True)])["s"]
    with torch.inference_mode():
        text = torch.tensor([prompts[0]])
        expected = wrapped(text).logits[0, :-1].log_softmax(-1).gather(1, text[0, 1:, None])[:, 0]
    found = torch.tensor(scored.prompt_logprobs)
    assert (found - expected).abs().max() < TOLERANCE[dtype]
    harness.close()
