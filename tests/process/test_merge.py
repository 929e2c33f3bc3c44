"""A merge, from the reference through the pipe, exchange and engine to tokens: PEFT's, on the tiny llama."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engine.adapters.ref import AdapterRef
from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.errors import AdapterIncompatible
from engine.lora.recipe import Recipe
from engine.messages import Request, SamplingParams, TokenOutput
from engine.process import LocalBackend, ProcessBackend
from tests.process.fakes import AnyBackend, updates_of
from tests.tiny import make_adapter, make_model

RANKS = {"one": 4, "two": 4, "wide": 7}
PROMPT = [5, 6, 7, 8]
CASES = [
    ("linear", ("one", "two")),
    ("ties", ("one", "two")),
    ("magnitude_prune", ("two", "one")),
    ("cat", ("one", "two", "wide")),
    ("svd", ("one", "wide")),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = tmp_path_factory.mktemp("merged")
    model = make_model("llama", folder / "base")
    for seed, (name, rank) in enumerate(RANKS.items()):
        make_adapter(model, folder / name, seed + 1, rank=rank).unload()
    return EngineConfig(
        model=ModelConfig(model_id=str(folder / "base"), dtype="float32"),
        adapters=AdapterConfig(
            adapter_source="local", adapter_root=(str(folder),), host_cache_gb=0.02
        ),
        scheduler=SchedulerConfig(max_total_tokens=100),
        memory=MemoryConfig(cpu_memory_gb=0.05, num_threads=1),
    )


def peft_model(root: Path, names: tuple[str, ...], recipe: Recipe, strategy: str) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base, str(root / names[0]), names[0])
        for name in names[1:]:
            model.load_adapter(str(root / name), name)
        model.add_weighted_adapter(
            list(names), list(recipe.weights), "merged", strategy, density=recipe.density
        )
    model.set_adapter("merged")
    return model.eval()


async def outputs_of(backend: AnyBackend, ref: AdapterRef) -> list[TokenOutput]:
    lease = await backend.acquire(ref, None)
    try:
        sampling = SamplingParams(logprobs=True)
        request = Request("r", PROMPT, sampling, 12, [], adapter=lease.image)
        return [output async for update in updates_of(backend, request) for output in update.tokens]
    finally:
        lease.release()


@pytest.mark.parametrize("kind", [LocalBackend, ProcessBackend])
async def test_merges_are_those_of_peft(config: EngineConfig, kind: type[AnyBackend]) -> None:
    """Every token is PEFT's most likely one, with its log-probability."""
    root = Path(config.adapters.adapter_root[0])
    backend: AnyBackend = await kind.start(config)
    answers = set()
    try:
        for strategy, names in CASES:
            recipe = Recipe.parse([0.8, -0.6, 0.5][: len(names)], strategy, 0.5)
            found = await outputs_of(backend, AdapterRef.merged(names, recipe))
            tokens = [output.token for output in found]
            with torch.no_grad():
                model = peft_model(root, names, recipe, strategy)
                logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
            assert tokens == logits.argmax(dim=-1).tolist(), strategy
            want = logits.log_softmax(dim=-1).amax(dim=-1)
            got = torch.tensor([output.logprob for output in found])
            assert torch.allclose(got, want, atol=1e-4), strategy
            answers.add(tuple(tokens))
        assert len(answers) == len(CASES)
        dare = AdapterRef.merged(("one", "two"), Recipe.parse([1, 1], "dare_ties", 0.5, seed=3))
        assert await outputs_of(backend, dare) == await outputs_of(backend, dare)
        with pytest.raises(AdapterIncompatible, match="rank 4 in one and rank 7 in wide"):
            await backend.acquire(AdapterRef.merged(("one", "wide"), Recipe.parse([1, 1])), None)
    finally:
        await backend.close()
