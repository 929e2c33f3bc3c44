"""Decode steps with adapters of each format, and the steps beside which a DoRA adapter is placed.

    python -m tools.bench_formats [--shape mistral-7b] [--batch 64] [--adapters 8] [--rank 16] [--steps 100]

Weights and adapters are random. Formats: LoRA on every linear of the layers; the same with DoRA; with own rows of 16
tokens; with an own head. Then LoRA adapters decode, and new DoRA adapters are placed one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from engine.adapters.tiers import HostRegion
from engine.bench.limits import needed_fraction
from engine.bench.shapes import write_model
from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.lora.image import image_size, write_image
from engine.lora.weights import Extras, LoraWeights, OwnRows, Pair, TargetIndex, TensorMatrix
from engine.messages import AdapterImageRef, Request, SamplingParams, aligned
from engine.models import adapter_layout
from engine.ops.layout import ShardLayout
from engine.platform import detect

PROMPT, LONGEST, WARM_UP = 128, 4096, 30
FORMATS = ("lora", "dora", "16 own rows", "own head")
HEADS = 2  # adapters with an own head, each as large as the base's
PLACED = 8  # DoRA adapters that are placed beside steps


class Random:
    """Matrices of one pool of random numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.pool = torch.randn(1 << 24).mul_(0.02).to(dtype)
        self.at = 0

    def matrix(self, rows: int, columns: int) -> TensorMatrix:
        half, need = len(self.pool) // 2, rows * columns
        self.at = (self.at + 12289) % half
        if need <= half:
            return TensorMatrix(self.pool[self.at : self.at + need].view(rows, columns))
        return TensorMatrix(self.pool.repeat(-(-need // len(self.pool)))[:need].view(rows, columns))


def weights_of(form: str, layout: ShardLayout, rank: int, random: Random) -> LoraWeights:
    """A random adapter of one format."""
    pairs, extras, own = {}, {}, {}
    for layer, number, group in layout.targets.each_group():
        for index, target in enumerate(group.targets):
            place = TargetIndex(layer, number, index)
            if layer == layout.num_layers:
                count = 16 if form == "16 own rows" else group.vocab
                hidden = target.out_features if group.embedding else group.in_features
                if form == "16 own rows" or (form == "own head" and not group.embedding):
                    ids = torch.arange(count, dtype=torch.int32)
                    rows = random.matrix(count, hidden)
                    own[place] = OwnRows(target.module, ids, rows, group.vocab)
                continue
            a, b = random.matrix(rank, group.in_features), random.matrix(target.out_features, rank)
            pairs[place] = Pair(a, b, 1.0, target.module)
            if form == "dora":
                magnitude = TensorMatrix(torch.rand(1, target.out_features) + 0.5)
                extras[place] = Extras(target.module, magnitude)
    return LoraWeights(pairs, extras, own)


def images_of(
    layout: ShardLayout, rank: int, adapters: int
) -> tuple[HostRegion, dict[str, list[AdapterImageRef]]]:
    """Images of every format in a region of their own; those to place beside steps are "placed"."""
    random = Random(getattr(torch, layout.dtype))
    counts = {form: HEADS if form == "own head" else adapters for form in FORMATS}
    made = {
        form: [weights_of(form, layout, rank, random) for _ in range(count)]
        for form, count in counts.items()
    }
    made["placed"] = [weights_of("dora", layout, rank, random) for _ in range(PLACED)]
    sizes = [aligned(image_size(one, layout).total) for of in made.values() for one in of]
    region = HostRegion.create(sum(sizes))
    refs: dict[str, list[AdapterImageRef]] = {}
    offset = 0
    for form, several in made.items():
        for one in several:
            size = image_size(one, layout)
            digest = write_image(one, layout, region.view[offset : offset + size.total])
            ref = AdapterImageRef(digest, offset, size.data_bytes, size.stacked_rank, form)
            refs.setdefault(form, []).append(ref)
            offset += aligned(size.total)
    return region, refs


def engine_of(
    folder: Path, shape: str, batch: int, rank: int, adapters: int
) -> tuple[Engine, dict[str, list[AdapterImageRef]]]:
    model = ModelConfig(
        str(write_model(folder / shape, shape)), dtype="bfloat16", load_format="dummy"
    )
    region, refs = images_of(adapter_layout(model, "cuda")[0], rank, adapters)
    scheduler = SchedulerConfig(
        max_batch_size=batch + PLACED,
        max_batch_prefill_tokens=batch * PROMPT,
        max_total_tokens=LONGEST,
        prefix_caching=False,
    )
    config = EngineConfig(model, scheduler=scheduler, memory=MemoryConfig(device="cuda"))
    arena = sum(aligned(ref.data_bytes) for several in refs.values() for ref in several)
    fraction = needed_fraction(arena, detect(config).budget)
    given = AdapterConfig(adapter_memory_fraction=fraction)
    return Engine(replace(config, adapters=given), region), refs


def submit(engine: Engine, id: str, adapter: AdapterImageRef | None, new: int) -> None:
    tokens = [(len(id) * 31 + i * 7) % engine.spec.vocab for i in range(PROMPT)]
    engine.submit(Request(id, tokens, SamplingParams(), new, [], adapter))


def steps(engine: Engine, count: int) -> list[float]:
    """Milliseconds from one step's end to the next one's."""
    found, last = [], time.perf_counter()
    for _ in range(count):
        engine.step()
        now = time.perf_counter()
        found.append((now - last) * 1000)
        last = now
    return found


def start(engine: Engine, name: str, refs: list[AdapterImageRef], batch: int) -> list[str]:
    """Starts `batch` long requests and waits until all decode. Returns their ids."""
    ids = [f"{name} {number}" for number in range(batch)]
    for number, id in enumerate(ids):
        submit(engine, id, refs[number % len(refs)], LONGEST - PROMPT - 1)
    while engine.stats.running < batch:
        engine.step()
    steps(engine, WARM_UP)
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="mistral-7b")
    for name, default in (("--batch", 64), ("--adapters", 8), ("--rank", 16), ("--steps", 100)):
        parser.add_argument(name, type=int, default=default)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine, refs = engine_of(Path(folder), given.shape, given.batch, given.rank, given.adapters)
    print(f"{engine.platform.name}, {given.shape}, {given.batch} rows")
    for form in FORMATS:
        ids = start(engine, form, refs[form], given.batch)
        median = statistics.median(steps(engine, given.steps))
        size = refs[form][0].data_bytes / 1e6
        print(f"{form:12} {len(refs[form])} adapters of {size:6.1f} MB: {median:7.3f} ms a step")
        for id in ids:
            engine.cancel(id)
        steps(engine, 3)
    start(engine, "quiet", refs["lora"], given.batch)
    quiet = statistics.median(steps(engine, given.steps))
    found, waits = [], []
    for number, ref in enumerate(refs["placed"]):
        placed, began = engine.stats.placed, time.perf_counter()
        submit(engine, f"new {number}", ref, 2)
        while engine.stats.placed == placed:
            found += steps(engine, 1)
        waits.append(time.perf_counter() - began)
        steps(engine, 8)
    found.sort()
    median, slow = statistics.median(found), found[len(found) * 99 // 100]
    print(f"step beside nothing      {quiet:7.3f} ms")
    print(
        f"step beside a DoRA norm  {median:7.3f} ms, {median / quiet:.3f} times; p99 {slow:.3f} ms"
    )
    print(f"a DoRA adapter is placed in {statistics.median(waits) * 1000:.0f} ms")
    engine.close()


if __name__ == "__main__":
    main()
