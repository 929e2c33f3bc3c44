"""A small eager run on a GPU that calls every op of the engine, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m tools.sanitize_ops [--dtype bfloat16]
    compute-sanitizer --tool racecheck python -m tools.sanitize_ops --own-products

Prompts, decodes, adapters on every linear, embedding and head, greedy and sampled. It fails if an op was not called, so
that a clean report means all of them. racecheck of 2025.3 ends in an error of its own once cuBLAS has multiplied, so
for it `--own-products` keeps to our kernels and to torch's elementwise ones.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.bench.adapters import Images
from engine.bench.shapes import write_model
from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.layers.linear import Plain
from engine.messages import AdapterImageRef, Request, SamplingParams
from engine.models import adapter_layout
from engine.ops.schemas import NAMESPACE, SCHEMAS

# Widths that tensor cores take, and that they do not.
WIDTHS = {
    "even": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "head_dim": 64,
    },
    "odd": {"hidden_size": 72, "intermediate_size": 104, "num_attention_heads": 6, "head_dim": 12},
}
RANKS = (16, 5, 40)
REQUESTS, NEW = 9, 4
LONGEST = 1216  # tokens of a prompt: keys in two parts, and a step beyond what kernels for few tokens take
LINEAR_TOKENS = 256  # kLinearFewTokens in csrc/cuda/linear.h


class Called(TorchDispatchMode):
    """Notes which of our ops were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == NAMESPACE:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def requests(refs: list[AdapterImageRef], vocab: int) -> list[Request]:
    """Base and adapters in turn, prompts of 1 to LONGEST tokens, every way to sample."""
    chooser = random.Random(0)
    ways = (
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9, seed=1, logprobs=True),
        SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.2, seed=2),
        SamplingParams(prompt_logprobs=True, num_alternatives=3),
    )
    made = []
    for i in range(REQUESTS):
        tokens = [chooser.randrange(vocab) for _ in range(1 + i * (LONGEST - 1) // (REQUESTS - 1))]
        adapter = [None, *refs][i % (1 + len(refs))]
        request = Request(
            id=str(i),
            tokens=tokens,
            sampling=ways[i % len(ways)],
            max_new_tokens=NEW,
            eos_token_ids=[],
            adapter=adapter,
        )
        made.append(request)
    return made


def run(folder: Path, name: str, dtype: str, device: str) -> set[str]:
    """One model from start to end; the ops that were called."""
    changes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 640}
    base = write_model(folder / name, "llama-3-8b", **(WIDTHS[name] | changes))
    model = ModelConfig(str(base), dtype=dtype, load_format="dummy")  # type: ignore[arg-type]
    layout = adapter_layout(model, device)[0]
    targets = sorted({t.name for _, _, group in layout.each_group() for t in group.targets})
    images = Images(layout, [RANKS], len(RANKS), targets)
    config = EngineConfig(
        model,
        AdapterConfig(adapter_memory_fraction=0.3, max_active_adapters=8),
        SchedulerConfig(
            max_batch_size=16,
            max_batch_prefill_tokens=LONGEST,
            max_total_tokens=LONGEST + 64,
        ),
        MemoryConfig(cpu_memory_gb=0.2),
    )
    memory = replace(config.memory, eager=True, device=device, cuda_memory_fraction=0.2)  # type: ignore[arg-type]
    engine = Engine(replace(config, memory=memory), images.region)
    for one in requests(images.mixes[0], engine.spec.vocab):
        engine.submit(one)
    with Called() as called:
        while engine.has_work:
            for update in engine.step():
                assert update.error is None, update.error
    engine.close()
    images.region.close()
    return called.names


def own_product(linear: Plain, x: Tensor) -> Tensor:
    """x @ weight.T + bias without a library: few tokens at a time by our kernel, which takes all of these widths on
    Hopper; float32 element by element."""
    weight, bias = linear.weight, linear.bias
    if x.dtype != torch.float32:
        pieces = x.split(LINEAR_TOKENS)
        return torch.cat([torch.ops.lorax.linear(piece, weight, bias) for piece in pieces])
    y = (x[:, None, :] * weight).sum(-1)
    return y if bias is None else y + bias


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--own-products", action="store_true", help="no matrix products by cuBLAS; on Hopper"
    )
    given = parser.parse_args()
    if given.own_products:
        Plain.matmul = own_product  # type: ignore[method-assign]
    names: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for dtype in given.dtype:
            for name in WIDTHS:
                names |= run(Path(folder), name, dtype, given.device)
                print(f"{dtype}, {name} widths: done", flush=True)
    missing = sorted(SCHEMAS.keys() - names)
    if missing and given.device == "cuda":  # a CPU's tables need no op to be written
        raise SystemExit(f"never called: {', '.join(missing)}")
    print(f"called {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
