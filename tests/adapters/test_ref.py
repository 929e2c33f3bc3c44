"""What a client writes, and what is understood."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from engine.adapters.ref import AdapterRef
from engine.errors import InvalidRequest
from engine.lora.recipe import STRATEGIES, Recipe


@pytest.mark.parametrize(
    ("text", "id", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("a@b@c", "a@b", "c"),
        (" plain ", "plain", None),
        ("/folder/of@home/x", "/folder/of", "home/x"),  # the local source tries the whole first
        ("name@", "name@", None),
        ("@name", "@name", None),
        ("dir/@x", "dir/@x", None),
    ],
)
def test_ids(text: str, id: str, revision: str | None) -> None:
    ref = AdapterRef.parse(text)
    assert (ref.id, ref.revision, ref.source) == (id, revision, None)
    assert ref.name == text.strip()


def test_sources() -> None:
    assert AdapterRef.parse("a", "HUB").source == "hub"
    assert AdapterRef.parse("a", " Local").source == "local"
    assert AdapterRef.parse("a", "").source is None
    assert AdapterRef.parse("a", "anything").source == "anything"  # the registry knows which exist
    for source in ("a\0b", "\ud800", "x" * 65):
        with pytest.raises(InvalidRequest) as caught:
            AdapterRef.parse("a", source)
        assert caught.value.field == "adapter_source"


@pytest.mark.parametrize("text", ["", "  ", "a\0b", "a\nb", "x" * 2000])
def test_bad_ids(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        AdapterRef.parse(text)
    assert caught.value.field == "adapter_id"


def test_a_merge() -> None:
    recipe = Recipe.parse([1, 0.5], "ties", 0.5)
    ref = AdapterRef.merged([" a@main ", "org/b"], recipe, "Hub")
    assert ref.name == "a@main,org/b" and ref.source == "hub"
    assert ref.parts == (AdapterRef(("a",), "hub", "main"), AdapterRef(("org/b",), "hub"))
    assert AdapterRef.parse("a").parts == (AdapterRef.parse("a"),)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(ref), type=AdapterRef) == ref
    other = AdapterRef.merged(["a@main", "org/b"], Recipe.parse([1, 0.5], "ties", 0.25), "hub")
    assert len({ref, other, AdapterRef.merged(["a@main", "org/b"], recipe, "hub")}) == 2


@pytest.mark.parametrize(
    ("ids", "weights", "field"),
    [
        ([], [], "ids"),
        (["a"] * 17, [1] * 17, "ids"),
        (["a", "b"], [1], "weights"),
        (["a", " "], [1, 1], "ids[1]"),
        (["x" * 1000 + str(number) for number in range(5)], [1] * 5, "ids"),
    ],
)
def test_bad_merges(ids: list[str], weights: list[float], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        AdapterRef.merged(ids, Recipe.parse(weights))
    assert caught.value.field == f"merged_adapters.{field}"


@pytest.mark.parametrize(
    ("given", "field", "text"),
    [
        ({"weights": [1, math.inf]}, "weights", "between"),
        ({"weights": [1, math.nan]}, "weights", "between"),
        ({"weights": [1, -1e7]}, "weights", "between"),
        ({"strategy": "slerp"}, "merge_strategy", "'slerp' is not supported"),
        ({"strategy": "ties_svd"}, "merge_strategy", "'ties_svd' is not supported"),
        ({"strategy": "ties"}, "density", "required"),
        ({"strategy": "ties", "density": 0}, "density", "above 0"),
        ({"strategy": "dare_linear", "density": 1.1}, "density", "above 0"),
        ({"strategy": "magnitude_prune", "density": math.nan}, "density", "above 0"),
        ({"majority_sign": "most"}, "majority_sign_method", "total, frequency"),
        ({"seed": -1}, "seed", "between"),
        ({"seed": 2**63}, "seed", "between"),
    ],
)
def test_bad_recipes(given: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text) as caught:
        Recipe.parse(**({"weights": [1, 1]} | given))
    assert caught.value.field == f"merged_adapters.{field}"
    if field == "merge_strategy":
        assert all(name in (caught.value.hint or "") for name in STRATEGIES)


def test_options_that_a_strategy_does_not_use_are_ignored() -> None:
    """LoRAX's client sends all of them."""
    for strategy in ("linear", "cat", "svd"):
        assert Recipe.parse([1, 1], strategy, 0.0, "frequency", 7) == Recipe.parse([1, 1], strategy)
    pruned = Recipe.parse([1, 1], "magnitude_prune", 0.5, "frequency", 7)
    assert pruned == Recipe.parse([1, 1], "magnitude_prune", 0.5)
    assert Recipe.parse([1, 1], "ties", 0.5, seed=7) == Recipe.parse([1, 1], "ties", 0.5)
    assert Recipe.parse([2], "dare_ties", 0.5, seed=7) == Recipe.parse([2])
