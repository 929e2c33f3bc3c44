"""`merged_adapters`: several adapters of one request, merged. The same object on LoRAX's and OpenAI's routes."""

from __future__ import annotations

from msgspec import Struct

from engine.adapters.ref import AdapterRef
from engine.lora.recipe import Recipe


class MergedAdapters(Struct, frozen=True):
    ids: list[str]
    weights: list[float]
    merge_strategy: str | None = None
    density: float | None = None
    majority_sign_method: str | None = None
    seed: int | None = None

    def ref(self, adapter_source: str | None) -> AdapterRef:
        """The merge. Raises InvalidRequest."""
        recipe = Recipe.parse(
            self.weights,
            self.merge_strategy or "linear",
            self.density,
            self.majority_sign_method or "total",
            self.seed or 0,
        )
        return AdapterRef.merged(self.ids, recipe, adapter_source)
