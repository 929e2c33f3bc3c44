"""Every family against transformers and PEFT: logits of base and adapters, and greedy text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from engine.errors import ModelError
from engine.layers.batch import Batch
from engine.models import spec_from
from engine.models.decoder import Decoder
from engine.models.weights import load
from tests.engine.harness import Harness, Wrapper, config_of, request
from tests.tiny import CONFIGS, TARGETS, VOCAB, make_adapter, make_model

TOLERANCE = 1e-4
PROMPT = 45
NEW = 10


@dataclass
class Family:
    model: PreTrainedModel
    harness: Harness
    folder: Path


@pytest.fixture(scope="module", params=CONFIGS)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    folder = tmp_path_factory.mktemp("family")
    model = make_model(request.param, folder / "base")
    harness = Harness(config_of(folder / "base", max_batch_prefill_tokens=64))
    yield Family(model, harness, folder)
    harness.close()


class Recorder(Wrapper):
    """Keeps the logits of every step."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.logits: list[torch.Tensor] = []

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.logits.append(self.model(batch))
        return self.logits[-1]


def prompt_of(seed: int) -> list[int]:
    return torch.randint(
        2, VOCAB, (PROMPT,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


def compare(family: Family, reference: torch.nn.Module, adapter: Path | None, seed: int) -> None:
    """Greedy text, the logits that chose it, and the prompt's log-probabilities, against the reference's."""
    harness, prompt = family.harness, prompt_of(seed)
    image = harness.stage(adapter) if adapter else None
    runner = harness.engine.runner
    recorder = Recorder(harness.engine.model)
    runner.model = recorder
    outcome = harness.run([request("r", prompt, image, NEW)])["r"]
    runner.model = harness.engine.model
    scored = harness.run([request("p", prompt, image, 1, prompt_logprobs=True)])["p"]
    with torch.inference_mode():
        text = torch.tensor([prompt + outcome.tokens])
        logits = reference(text).logits[0]
    ours = torch.cat([step for step in recorder.logits if len(step)])
    theirs = logits[PROMPT - 1 : -1]
    assert (ours - theirs).abs().max() < TOLERANCE
    assert theirs.argmax(-1).tolist() == outcome.tokens
    expected = logits[: PROMPT - 1].log_softmax(-1).gather(1, text[0, 1:PROMPT, None])[:, 0]
    assert scored.prompt_logprobs is not None
    torch.testing.assert_close(
        torch.tensor(scored.prompt_logprobs), expected, atol=TOLERANCE, rtol=0
    )


def test_base_is_that_of_transformers(family: Family) -> None:
    compare(family, family.model, None, seed=1)


@pytest.mark.parametrize("targets", TARGETS)
def test_adapter_is_that_of_peft(family: Family, targets: str, tmp_path: Path) -> None:
    rank = {"attention": 3, "all": 16, "mlp": 64, "ends": 7}[targets]
    wrapped = make_adapter(family.model, tmp_path, seed=rank, rank=rank, targets=targets)
    try:
        compare(family, wrapped, tmp_path, seed=2)
    finally:
        wrapped.unload()


def test_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    weights = []
    for folder in ("whole", "parts"):
        loaded = Decoder(spec_from(tmp_path / folder), torch.float32, torch.device("cpu"))
        load(loaded, tmp_path / folder)
        weights.append(loaded.layers[2].attention.qkv.method.weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "bert"}, "bert"),
        ({"intermediate_size": 128}, "shape"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"num_hidden_layers": 2}, "model.layers.2"),
        ({"hidden_act": "tanh"}, "tanh"),
    ],
)
def test_what_cannot_be_served_is_named(
    change: dict[str, object], named: str, tmp_path: Path
) -> None:
    import json

    make_model("llama", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=named):
        load(Decoder(spec_from(tmp_path), torch.float32, torch.device("cpu")), tmp_path)
