"""The decode step of many sequences on a GPU, base and with adapters, at the shape of Mistral 7B.

    python -m tools.bench_step [--batch 64] [--repeat 3] [--eager] [--attention-backend auto]

A step is (wall time of generating 256 tokens - wall time of generating 1) / 255, so it holds host work, sampling and
read-back. Weights and adapters are random (`--load-format dummy`); the cases take turns in one engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine.bench import Bench, Workload
from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.messages import AdapterImageRef

INPUT, OUTPUT = 128, 256
SHAPE = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def config_of(folder: Path, batch: int, memory: MemoryConfig) -> EngineConfig:
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return EngineConfig(
        model=ModelConfig(model_id=str(folder), load_format="dummy", dtype="bfloat16"),
        adapters=AdapterConfig(adapter_memory_fraction=0.2),
        scheduler=SchedulerConfig(
            max_batch_size=batch,
            max_total_tokens=1024,
            max_batch_prefill_tokens=8192,
            prefix_caching=False,
        ),
        memory=memory,
    )


def wall(bench: Bench, adapters: Sequence[AdapterImageRef | None], tokens: int) -> float:
    """Seconds to generate `tokens` tokens for each."""
    bench.workload = replace(bench.workload, output_tokens=tokens)
    for request in bench._requests(adapters):
        bench.engine.submit(request)
    torch.cuda.synchronize()
    start = time.perf_counter()
    while bench.engine.has_work:
        bench.engine.step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--attention-backend", default="auto")
    given = parser.parse_args()
    memory = MemoryConfig(
        cuda_memory_fraction=0.8, eager=given.eager, attention_backend=given.attention_backend
    )
    workload = Workload(given.batch, INPUT, OUTPUT, given.batch, (given.rank,))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config_of(Path(folder), given.batch, memory), workload)
    refs = bench.images.refs
    cases: dict[str, list[AdapterImageRef | None]] = {"base": [None] * given.batch}
    for count in sorted({1, min(8, given.batch), given.batch}):
        cases[f"{count} distinct"] = [refs[i % count] for i in range(given.batch)]
    steps: dict[str, list[float]] = {case: [] for case in cases}
    prefill: dict[str, list[float]] = {case: [] for case in cases}
    for adapters in cases.values():
        wall(bench, adapters, 4)
    for _ in range(given.repeat):
        for case, adapters in cases.items():
            first = wall(bench, adapters, 1)
            steps[case].append((wall(bench, adapters, OUTPUT) - first) / (OUTPUT - 1) * 1000)
            prefill[case].append(given.batch * INPUT / first)
    print(bench.engine.platform.name, dict(bench.engine.info.backends))
    for case in cases:
        step, rate = statistics.median(steps[case]), statistics.median(prefill[case])
        print(f"{case:12s} step {step:7.3f} ms   prefill {rate:8.0f} tokens/s")
    bench.close()


if __name__ == "__main__":
    main()
