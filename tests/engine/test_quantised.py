"""A quantised base with adapters on top: alone or in a batch, and against its dequantised weights held plainly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.layers.quantised import SCHEMES
from engine.messages import Request
from engine.models import weights
from engine.models.decoder import Decoder
from tests.engine.harness import Harness, Outcome, config_of, request
from tests.tiny import TARGETS, VOCAB, make_adapter, make_model

RANKS = [3, 16, 8, 64]
# Of log-probabilities. A token that passes through 8 bits keeps 15 below its largest magnitude; where the last of them
# falls, the last bit of a float32 before it may decide, which on a GPU depends on the batch.
TOLERANCE = {"bitsandbytes": 3e-3, "bitsandbytes-nf4": 1e-4, "bitsandbytes-fp4": 1e-4}
BATCHED = 1e-4

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="exact on a CPU only")


def quantised(folder: Path, scheme: str | None, **fields: object) -> EngineConfig:
    """The configuration of a small engine; `scheme` None: plain weights."""
    model = ModelConfig(**({"model_id": str(folder), "dtype": "float32"} | fields), quantize=scheme)  # type: ignore[arg-type]
    return replace(config_of(folder, max_batch_prefill_tokens=40), model=model)


@dataclass
class Scene:
    folder: Path
    model: PreTrainedModel
    adapters: list[Path]
    prompts: list[list[int]]

    def requests(self, harness: Harness, temperature: float = 0.8) -> list[Request]:
        """Two for each adapter and two for the base; half greedy, half sampled with their own seeds."""
        images = [*map(harness.stage, self.adapters), None]
        return [
            request(
                str(i), prompt, images[i % len(images)], temperature=temperature * (i % 2), seed=i
            )
            for i, prompt in enumerate(self.prompts)
        ]

    def dequantised(self, decoder: Decoder, folder: Path) -> None:
        """The checkpoint with every linear of the layers as the quantised one multiplies with it."""
        state = {name: one.clone() for name, one in self.model.state_dict().items()}
        for name, place in weights.destinations(decoder).items():
            if place.linear is not None and name.endswith(".weight"):
                row = 0
                for target in place.linear.group.targets:
                    module = target.whole.module.format(layer=place.linear.layer)
                    last = row + target.out_features
                    if name == f"{module}.weight":
                        rows = place.linear.method.weight_rows(slice(None))[row:last].float().cpu()  # type: ignore[attr-defined]
                        state[name].copy_(rows.T if decoder.spec.names.transposed else rows)
                    row = last
        self.model.save_pretrained(folder, state_dict=state)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """gpt2 has biases and keeps its matrices transposed."""
    folder = tmp_path_factory.mktemp("quantised")
    model = make_model(request.param, folder / "base")
    adapters = []
    for i, rank in enumerate(RANKS):
        adapters.append(folder / f"adapter{i}")
        targets = list(TARGETS)[i % len(TARGETS)]
        make_adapter(model, adapters[-1], seed=i, rank=rank, targets=targets).unload()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, VOCAB, (2 * (len(RANKS) + 1), 30), generator=generator).tolist()
    cut = [prompt[: 3 + 3 * i] for i, prompt in enumerate(prompts)]
    return Scene(folder / "base", model, adapters, cut)


def assert_same(
    outcomes: dict[str, Outcome], expected: dict[str, Outcome], tolerance: float
) -> None:
    assert outcomes.keys() == expected.keys()
    for id, outcome in outcomes.items():
        assert outcome.error is None
        assert outcome.tokens == expected[id].tokens, id
        found, wanted = torch.tensor(outcome.logprobs), torch.tensor(expected[id].logprobs)
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


def assert_same_but_for_ties(
    outcomes: dict[str, Outcome], expected: dict[str, Outcome], tolerance: float
) -> None:
    """Greedy texts, each up to where the two best tokens were nearer than `tolerance`; such places are few."""
    ties = 0
    for id, outcome in outcomes.items():
        assert outcome.error is None and len(outcome.outputs) == len(expected[id].outputs)
        for found, wanted in zip(outcome.outputs, expected[id].outputs, strict=True):
            assert found.logprob is not None and wanted.logprob is not None
            assert abs(found.logprob - wanted.logprob) <= tolerance, id
            if found.token != wanted.token:
                ties += 1
                break
    assert ties <= len(outcomes) // 4


def run(
    config: EngineConfig, scene: Scene, together: bool = True, temperature: float = 0.8
) -> dict[str, Outcome]:
    """All requests in one batch, or one after another."""
    harness = Harness(config)
    requests = scene.requests(harness, temperature)
    if together:
        outcomes = harness.run(requests)
        assert harness.engine.stats.steps < 40  # they did share their steps
    else:
        outcomes = {id: one for each in requests for id, one in harness.run([each]).items()}
    harness.close()
    return outcomes


def scores(config: EngineConfig, scene: Scene) -> torch.Tensor:
    """Log-probabilities of all prompts' tokens, each prompt with its adapter, all in one batch."""
    harness = Harness(config)
    requests = [
        request(one.id, one.tokens, one.adapter, 1, prompt_logprobs=True)
        for one in scene.requests(harness)
    ]
    found = [outcome.prompt_logprobs for outcome in harness.run(requests).values()]
    harness.close()
    return torch.tensor([logprob for one in found if one is not None for logprob in one])


def assert_like_dequantised(scene: Scene, scheme: str, folder: Path) -> None:
    config = quantised(scene.folder, scheme)
    harness = Harness(config)
    scene.dequantised(harness.engine.model, folder)
    harness.close()
    plain = scores(quantised(folder, None), scene)
    assert len(plain) == sum(len(prompt) - 1 for prompt in scene.prompts)
    torch.testing.assert_close(scores(config, scene), plain, atol=TOLERANCE[scheme], rtol=0)
    original = scores(quantised(scene.folder, None), scene)
    assert (plain - original).abs().max() > 10 * TOLERANCE[scheme]  # of which this would tell


@every_scheme
@on_a_cpu
def test_mixed_batch(scene: Scene, scheme: str) -> None:
    config = quantised(scene.folder, scheme)
    alone = run(config, scene, together=False)
    assert len({tuple(outcome.tokens) for outcome in alone.values()}) == len(alone)
    assert_same(run(config, scene), alone, BATCHED)


@every_scheme
def test_like_dequantised(scene: Scene, scheme: str, tmp_path: Path) -> None:
    assert_like_dequantised(scene, scheme, tmp_path)


@every_scheme
@on_a_cpu
def test_half_precision(scene: Scene, scheme: str) -> None:
    """The same to the bit alone and in a batch."""
    config = quantised(scene.folder, scheme, dtype="bfloat16")
    alone, together = run(config, scene, together=False), run(config, scene)
    assert {id: one.outputs for id, one in together.items()} == {
        id: one.outputs for id, one in alone.items()
    }


@every_scheme
def test_what_the_engine_tells(scene: Scene, scheme: str) -> None:
    plain = Harness(quantised(scene.folder, None))
    made = Harness(quantised(scene.folder, scheme, load_format="dummy"))
    linears = [
        linear
        for layer in made.engine.model.layers
        for linear in (layer.attention.qkv, layer.attention.out, layer.mlp.up, layer.mlp.down)
    ]
    saved = sum(
        linear.method.bias.nbytes if linear.method.bias is not None else 0 for linear in linears
    )
    saved += sum(4 * sum(linear.splits) * linear.group.in_features for linear in linears)
    saved -= sum(linear.method.size for linear in linears)
    assert made.engine.plan.weights == plain.engine.plan.weights - saved
    assert saved > 0
    assert plain.engine.info.quantize is None and made.engine.info.quantize == scheme
    (outcome,) = made.run([request("dummy", scene.prompts[0], max_new_tokens=3)]).values()
    assert outcome.error is None and len(outcome.tokens) == 3
    plain.close()
    made.close()


def test_missing_package_keeps_the_engine_from_starting(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="cannot be imported"):
        Harness(quantised(scene.folder, "bitsandbytes"))
