"""Decode on the CPU against transformers + PEFT, interleaved in one run: SmolLM2-135M's shape, random weights.

    python -m tools.bench_peft [--sequences 16] [--rounds 7] [--json FILE]

Four cases take turns, round after round, and the medians are compared: the base model here and in transformers; as
many distinct rank-16 adapters on all seven projections as there are sequences, here and in PEFT's `adapter_names`
batch. A fifth measures one plain read of the adapters' bytes, which is the least that the adapters can cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from engine.adapters.tiers import HostRegion
from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.messages import AdapterImageRef, Request, SamplingParams
from tools.adapters import stage

RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MIB = 1 << 20
WARM_UP = 100  # steps


def smollm2_135m() -> LlamaConfig:
    """The shape of HuggingFaceTB/SmolLM2-135M."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )


class Peft:
    """transformers, and PEFT on top of it with one adapter per sequence."""

    def __init__(self, config: LlamaConfig, prompts: list[list[int]], folder: Path) -> None:
        torch.manual_seed(0)
        self.base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.prompts = torch.tensor(prompts)
        names = [f"adapter{i}" for i in range(len(prompts))]
        lora = LoraConfig(
            r=RANK, lora_alpha=32, target_modules=PROJECTIONS, init_lora_weights=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = get_peft_model(self.base, lora, adapter_name=names[0])
            for name in names[1:]:
                self.model.add_adapter(name, lora)
            self.model.eval().save_pretrained(folder, selected_adapters=names)
        self.folders = [folder / name for name in names]
        self.names = names

    @torch.inference_mode()
    def decode(self, steps: int, adapters: bool) -> list[float]:
        """Seconds of each of `steps` decode steps after the prompts."""
        if adapters:
            run: Callable[..., Any] = lambda **k: self.model(**k, adapter_names=self.names)  # noqa: E731
            return self._steps(run, steps)
        with self.model.disable_adapter():
            return self._steps(self.model, steps)

    def _steps(self, run: Callable[..., Any], steps: int) -> list[float]:
        out = run(input_ids=self.prompts, use_cache=True)
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            ids = out.logits[:, -1:].argmax(-1)
            out = run(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - start)
        return seconds


class Ours:
    """The engine in this process."""

    def __init__(self, model: Path, prompts: list[list[int]], adapters: list[Path]) -> None:
        self.region = HostRegion.create(1024 * MIB)
        config = EngineConfig(
            model=ModelConfig(model_id=str(model), dtype="float32", load_format="dummy"),
            adapters=AdapterConfig(adapter_memory_fraction=0.25),
            scheduler=SchedulerConfig(
                max_batch_size=len(prompts), max_batch_prefill_tokens=1024, prefix_caching=False
            ),
            memory=MemoryConfig(cpu_memory_gb=2.0),
        )
        self.engine = Engine(config, self.region)
        self.prompts = prompts
        self.images = self._stage(adapters)
        self.count = 0

    def _stage(self, adapters: list[Path]) -> list[AdapterImageRef]:
        images, free = [], 0
        for folder in adapters:
            image, free = stage(folder, self.engine.layout, self.region, free)
            images.append(image)
        return images

    @property
    def adapter_bytes(self) -> int:
        return sum(image.data_bytes for image in self.images)

    def decode(self, steps: int, adapters: bool) -> list[float]:
        """Seconds of each of `steps` steps in which every sequence advances by one token."""
        for i, prompt in enumerate(self.prompts):
            self.count += 1
            image = self.images[i] if adapters else None
            request = Request(
                id=str(self.count),
                tokens=prompt,
                sampling=SamplingParams(),
                max_new_tokens=steps + 8,
                eos_token_ids=[],
                adapter=image,
            )
            self.engine.submit(request)
        seconds: list[float] = []
        while self.engine.has_work:
            start = time.perf_counter()
            updates = self.engine.step()
            if len(updates) == len(self.prompts):
                seconds.append(time.perf_counter() - start)
        return seconds[1 : steps + 1]

    def read_adapters(self) -> float:
        """Seconds of one plain read of the adapters' bytes in the arena, with all threads."""
        flat = self.engine.runner.adapters.arena[: self.adapter_bytes].view(torch.float32)
        start = time.perf_counter()
        flat.sum()
        return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    shape = (args.sequences, args.prompt)
    config = smollm2_135m()
    prompts = torch.randint(2, config.vocab_size, shape, generator=generator).tolist()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder / "model")
        peft = Peft(config, prompts, folder / "adapters")
        ours = Ours(folder / "model", prompts, peft.folders)
    cases: dict[str, Callable[[], list[float]]] = {
        "base": lambda: ours.decode(args.steps, False),
        "transformers": lambda: peft.decode(args.steps, False),
        "adapters": lambda: ours.decode(args.steps, True),
        "peft": lambda: peft.decode(args.steps, True),
        "read": lambda: [ours.read_adapters() for _ in range(args.steps)],
    }
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    ours.decode(WARM_UP, True)  # until every adapter lies in the arena
    for run in cases.values():
        run()
    for _ in range(args.rounds):
        for case, run in cases.items():
            seconds[case].append(statistics.median(run()))
    medians = {case: statistics.median(values) for case, values in seconds.items()}
    added = statistics.median(
        [a - b for a, b in zip(seconds["adapters"], seconds["base"], strict=True)]
    )
    ratios = {
        "base: transformers / ours": medians["transformers"] / medians["base"],
        "adapters: PEFT / ours": medians["peft"] / medians["adapters"],
        "added by adapters / one read of their bytes": added / medians["read"],
        "adapters / base": medians["adapters"] / medians["base"],
    }
    steps = {f"{case} step, ms": value * 1e3 for case, value in medians.items()}
    return {**steps, "adapter bytes, MB": ours.adapter_bytes / 1e6, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args)
    for name, value in found.items():
        print(f"{name:48} {value:10.2f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
