"""A merge is PEFT's `add_weighted_adapter`, for every strategy, and of equal recipes the same bytes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import AdapterIncompatible, AdapterLoadFailed
from engine.lora.image import image_size, write_image
from engine.lora.merge import Part, dare_mask, merge
from engine.lora.recipe import STRATEGIES, Recipe
from engine.lora.weights import LoraWeights, Matrix
from tests.lora import tiny

LAYOUT = tiny.llama_layout()
LINEARS = ["q_proj", "k_proj", "o_proj", "down_proj"]
BASE: dict[str, Any] = dict(r=4, lora_alpha=6, target_modules=LINEARS)
CASES: dict[str, list[dict[str, Any]]] = {
    "scales": [BASE, BASE | {"lora_alpha": 3}, BASE | {"use_rslora": True}],
    "targets": [
        dict(r=4, target_modules=["q_proj", "up_proj"]),
        dict(r=4, lora_alpha=9, target_modules=["q_proj", "down_proj", "o_proj"]),
    ],
    "ends": [
        dict(r=4, target_modules=["embed_tokens", "lm_head", "k_proj"]),
        dict(r=4, lora_alpha=5, target_modules=["embed_tokens", "v_proj"]),
    ],
    "patterns": [BASE | {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"o_proj": 2}}] * 2,
}
RANKS: dict[str, list[dict[str, Any]]] = {
    "ranks": [BASE, BASE | {"r": 7}, BASE | {"r": 2, "lora_alpha": 1}],
    "ranks and targets": [BASE | {"r": 3}, dict(r=5, target_modules=["embed_tokens", "q_proj"])],
    # Together more than the inputs.
    "wide": [
        dict(r=20, target_modules=["q_proj", "up_proj"]),
        dict(r=16, target_modules=["q_proj"]),
    ],
}
WEIGHTS = [0.7, -0.4, 1.3]
Scenes = Callable[[str], "Scene"]


def rows(matrix: Matrix) -> Tensor:
    out = torch.empty(matrix.shape, dtype=matrix.dtype)
    matrix.read(0, len(out), out.view(torch.uint8).numpy().reshape(-1).data)
    return out


class Scene:
    """One base model with several PEFT adapters, and the same adapters as files."""

    def __init__(self, folder: Path, cases: Sequence[dict[str, Any]]) -> None:
        self.base = tiny.llama()
        self.names = [f"adapter{number}" for number in range(len(cases))]
        self.folders = [folder / name for name in self.names]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model: PeftModel = get_peft_model(
                copy.deepcopy(self.base), LoraConfig(**cases[0]), self.names[0]
            )
            for name, fields in zip(self.names[1:], cases[1:], strict=True):
                self.model.add_adapter(name, LoraConfig(**fields))
            generator = torch.Generator().manual_seed(3)
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            self.model.eval().save_pretrained(str(folder), save_embedding_layers=False)

    @contextmanager
    def merged(self, recipe: Recipe, **given: Any) -> Iterator[LoraWeights]:
        with ExitStack() as stack:
            loaded = [stack.enter_context(tiny.load(one, LAYOUT)) for one in self.folders]
            yield merge(
                [Part(*one) for one in zip(self.names, loaded, strict=True)], recipe, **given
            )

    def peft_merges(self, recipe: Recipe, strategy: str) -> None:
        self.model.add_weighted_adapter(
            self.names,
            list(recipe.weights),
            "merged",
            strategy,
            density=recipe.density,
            majority_sign_method=recipe.majority_sign,
        )
        self.model.set_adapter("merged")

    def check(self, recipe: Recipe, strategy: str) -> None:
        """Ours and PEFT's updates of every module, and the logits of the whole model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.peft_merges(recipe, strategy)
        theirs = {
            name: module.get_delta_weight("merged")
            for name, module in self.model.base_model.model.named_modules()
            if hasattr(module, "base_layer")
        }
        ours = dict(copy.deepcopy(self.base).named_modules())
        model = ours[""]
        with self.merged(recipe) as weights, torch.no_grad():
            assert {pair.module.split(" of ")[0] for pair in weights.pairs.values()} == set(theirs)
            for pair in weights.pairs.values():
                name = pair.module.split(" of ")[0]
                delta = pair.scale * rows(pair.b) @ rows(pair.a)
                if isinstance(ours[name], nn.Embedding):
                    delta = delta.T
                assert torch.allclose(delta, theirs[name], atol=1e-4, rtol=1e-4), name
                ours[name].weight += delta
            tokens = torch.arange(36).view(2, 18)
            got, want = model(tokens).logits, self.model(tokens).logits
        assert (want - self.base(tokens).logits).abs().max() > 0.01
        assert torch.allclose(got, want, atol=1e-4, rtol=0)
        self.model.set_adapter(self.names[0])
        self.model.delete_adapter("merged")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scene]:
    """The scene of a case, made once."""
    cases = CASES | RANKS
    return cache(lambda case: Scene(tmp_path_factory.mktemp("case"), cases[case]))


def recipe_of(count: int, strategy: str, sign: str = "total", seed: int = 0) -> Recipe:
    return Recipe.parse(WEIGHTS[:count], strategy, 0.6, sign, seed)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT prunes at random with our masks: of the same module, half and adapter."""
    merge_one = LoraModel._generalized_task_arithmetic_weighted_adapter

    def with_our_masks(self: Any, kind: str, adapters: list[str], *given: Any) -> Any:
        target = given[1]
        module = next(name for name, one in self.model.named_modules() if one is target)
        present = [
            number
            for number, name in enumerate(adapters)
            if name in target.lora_A or name in target.lora_embedding_A
        ]
        keys = iter([(0, number, half, module) for half in (0, 1) for number in present])

        def prune(tensor: Tensor, density: float, rescale: bool) -> Tensor:
            assert rescale
            return tensor * dare_mask(tensor.shape, density, next(keys)) / density

        monkeypatch.setattr("peft.utils.merge_utils.random_pruning", prune)
        merged = merge_one(self, kind, adapters, *given)
        pruned = kind.startswith("dare") and given[2] < 1
        assert not pruned or next(keys, None) is None
        return merged

    monkeypatch.setattr(LoraModel, "_generalized_task_arithmetic_weighted_adapter", with_our_masks)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_peft(case: str, strategy: str, masks: None, scenes: Scenes) -> None:
    scenes(case).check(recipe_of(len(CASES[case]), strategy), strategy)


@pytest.mark.parametrize("strategy", ["svd", "ties"])
def test_peft_of_one(strategy: str, tmp_path: Path) -> None:
    """By `linear`, whatever the strategy."""
    Scene(tmp_path, [BASE]).check(Recipe.parse([-0.7], strategy, 0.6), strategy)


@pytest.mark.parametrize("strategy", ["ties", "dare_ties"])
def test_peft_frequency(strategy: str, masks: None, scenes: Scenes) -> None:
    scenes("scales").check(recipe_of(3, strategy, "frequency"), strategy)


@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_peft_without_pruning(strategy: str, masks: None, scenes: Scenes) -> None:
    """A density of 1 keeps everything."""
    scenes("scales").check(Recipe.parse(WEIGHTS, strategy, 1), strategy)


@pytest.mark.parametrize("strategy", ["cat", "svd"])
@pytest.mark.parametrize("case", RANKS)
def test_peft_of_different_ranks(case: str, strategy: str, scenes: Scenes) -> None:
    scenes(case).check(recipe_of(len(RANKS[case]), strategy), strategy)


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"cat", "svd"}))
def test_different_ranks_are_refused(strategy: str, scenes: Scenes) -> None:
    """By PEFT too."""
    scene, recipe = scenes("ranks"), recipe_of(3, strategy)
    with pytest.raises(ValueError, match="same r value"):
        scene.peft_merges(recipe, strategy)
    with pytest.raises(AdapterIncompatible) as caught, scene.merged(recipe):
        pass
    assert caught.value.field == "merged_adapters.merge_strategy"
    assert "rank 4 in adapter0 and rank 7 in adapter1" in caught.value.message
    assert "cat" in (caught.value.hint or "")


def test_rank_limit(scenes: Scenes) -> None:
    scene = scenes("ranks")
    refused = pytest.raises(AdapterIncompatible, match="rank 13; the limit is 12")
    with refused as caught, scene.merged(recipe_of(3, "cat"), max_rank=12):
        pass
    assert "svd" in (caught.value.hint or "")
    with scene.merged(recipe_of(3, "svd"), max_rank=12) as weights:
        assert {pair.rank for pair in weights.pairs.values()} == {7}


def digest(weights: LoraWeights) -> bytes:
    out = memoryview(bytearray(image_size(weights, LAYOUT).total))
    return write_image(weights, LAYOUT, out)


def test_one_adapter_of_weight_1_is_the_adapter(tmp_path: Path) -> None:
    scene = Scene(tmp_path, [BASE])
    with tiny.load(scene.folders[0], LAYOUT) as alone:
        for strategy in STRATEGIES:
            with scene.merged(Recipe.parse([1], strategy, 0.5)) as weights:
                assert digest(weights) == digest(alone)


def test_digest_is_of_the_recipe(scenes: Scenes) -> None:
    """The same recipe gives the same bytes. Another weight, density, sign or seed gives others."""
    scene = scenes("scales")
    recipes = [
        Recipe.parse([1, 1, 1], "dare_ties", 0.5),
        Recipe.parse([1, 1, 1], "dare_ties", 0.5, seed=1),
        Recipe.parse([1, 1, 1], "dare_ties", 0.25),
        Recipe.parse([1, 1, 1], "dare_ties", 0.5, "frequency"),
        Recipe.parse([1, 1, 2], "dare_ties", 0.5),
        Recipe.parse([1, 1, 1], "dare_linear", 0.5),
        Recipe.parse([1, 1, 1], "ties", 0.5),
        Recipe.parse([1, 1, 1], "cat"),
    ]
    digests = []
    for recipe in [*recipes, *recipes]:
        with scene.merged(recipe) as weights:
            digests.append(digest(weights))
    assert digests[: len(recipes)] == digests[len(recipes) :]
    assert len(set(digests)) == len(recipes)
    assert len({recipe.key for recipe in recipes}) == len(recipes)


def test_dare_mask() -> None:
    """It keeps the density, each key draws its own values, and the rescaled mean is that of the values."""
    masks = [dare_mask((200, 500), 0.3, ("key", number)) for number in range(20)]
    for mask in masks:
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert abs(mask.mean().item() - 0.3) < 0.01
    both = (masks[0] * masks[1]).mean().item()
    assert abs(both - 0.09) < 0.01, "masks of two keys are independent"
    values = torch.randn(200, 500).abs()
    kept = torch.stack([values * mask / 0.3 for mask in masks]).mean(dim=0)
    assert abs(kept.mean() / values.mean() - 1) < 0.02


def test_one_group_in_memory(scenes: Scenes) -> None:
    """Every module is computed once while the image is written, after a pause."""
    scene, pauses = scenes("scales"), []
    with scene.merged(recipe_of(3, "ties"), pause=lambda: pauses.append(1)) as weights:
        assert not pauses
        digest(weights)
        assert len(pauses) == len(weights.pairs)


def test_a_bad_part_is_named(tmp_path: Path) -> None:
    scene = Scene(tmp_path, CASES["scales"])
    file = scene.folders[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    for strategy in STRATEGIES:
        save_file(tensors, file)
        with scene.merged(recipe_of(3, strategy)) as weights:
            with pytest.raises(AdapterIncompatible, match="of adapter1 has values"):
                digest(weights)
            file.write_bytes(file.read_bytes()[:-1])
            with pytest.raises(AdapterLoadFailed, match="adapter1") as caught:
                weights.verify()
            assert caught.value.field == "merged_adapters"
