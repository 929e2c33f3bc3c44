"""The least computation and data movement of a decode step and of a prefill, for the roofline
(Williams, Waterman and Patterson 2009).

Bytes are those of weights, keys and values, and distinct adapters. Operations are those of matrix products and
attention; a multiply-add counts as two. Norms, activations and sampling are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from engine.bench.engine_report import Work
from engine.messages import AdapterImageRef
from engine.models.spec import ModelSpec
from engine.ops.layout import ShardLayout
from engine.runner.memory import MemoryPlan

BatchAdapters = Sequence[AdapterImageRef | None]  # the adapter of each request


@dataclass(frozen=True, slots=True)
class Model:
    """The properties of an engine that determine its work."""

    spec: ModelSpec
    layout: ShardLayout
    plan: MemoryPlan
    itemsize: int  # bytes of an element of activations, keys, values and adapters

    def decode(self, contexts: Sequence[float], adapters: BatchAdapters) -> Work:
        """A step of one token per sequence. `contexts`: mean context lengths; `adapters`: of some or all sequences."""
        attention = sum(self._layers(partial(min, context)) for context in contexts)
        per_token = 2 * (self._linears + self._head)
        return Work(
            len(contexts) * per_token + int(attention * self._attended) + self._delta(adapters, 1),
            self._weights,
            int(attention * self._position_bytes),
            _distinct_bytes(adapters),
        )

    def prefill(self, tokens: int, adapters: BatchAdapters) -> Work:
        """The prompts of a batch, of `tokens` each, up to the first output tokens."""
        batch = len(adapters)
        seen = batch * self._layers(partial(_seen, tokens))
        steps = -(-batch * tokens // self.plan.max_step_tokens)
        return Work(
            batch * 2 * (tokens * self._linears + self._head)
            + int(seen * self._attended)
            + self._delta(adapters, tokens),
            steps * self._weights,
            batch * tokens * self.spec.num_layers * self._position_bytes,  # written
            _distinct_bytes(adapters),
        )

    @property
    def _linears(self) -> int:
        """Number of weights in the layers' linears."""
        sizes = (group.in_features * group.out_features for group in self.layout.groups)
        return self.layout.num_layers * sum(sizes)

    @property
    def _head(self) -> int:
        return self.spec.hidden * self.spec.vocab

    @property
    def _weights(self) -> int:
        """Bytes of the weights that a step reads: all but an untied embedding, of which it reads a few rows."""
        spec = self.spec
        unread = 0 if spec.tied else spec.vocab * spec.hidden * self.itemsize
        return self.plan.weights - unread

    @property
    def _position_bytes(self) -> int:
        """Bytes of the key and value of one position in one layer."""
        attention = self.spec.attention
        return 2 * attention.kv_heads * attention.head_dim * self.itemsize

    @property
    def _attended(self) -> int:
        """Operations of one query on one position in one layer, for the key and for the value."""
        return 4 * self.spec.attention.heads * self.spec.attention.head_dim

    def _layers(self, positions: Callable[[float], float]) -> float:
        """The sum over the layers of `positions(window)`."""
        attention = self.spec.attention
        return sum(
            positions(attention.window(layer) or math.inf) for layer in range(self.spec.num_layers)
        )

    def _delta(self, adapters: BatchAdapters, tokens: int) -> int:
        """Operations of the adapters: each element once per token, with the padding of rows."""
        total = sum(ref.data_bytes for ref in adapters if ref is not None)
        return 2 * tokens * total // self.itemsize


def _seen(tokens: int, window: float) -> float:
    """Positions that the queries of a prompt attend to; the first query attends to one."""
    whole = min(tokens, window)
    return whole * (whole + 1) / 2 + (tokens - whole) * whole


def _distinct_bytes(adapters: BatchAdapters) -> int:
    return sum({ref.digest: ref.data_bytes for ref in adapters if ref is not None}.values())
