"""What LoRA and attention cost on the CPU, beside what the memory allows.

    python tools/bench_lora_cpu.py                      # SmolLM2-135M, 16 adapters of rank 16
    python tools/bench_lora_cpu.py --dtype bfloat16 --rank 64 --adapters 4 --tokens 4

Every figure is taken in turns with a plain read of the same bytes (`torch.sum`, which is bound by memory) in the same
process and with the same threads, so that other programs on the machine disturb both alike. Each run goes in steps (a
group of a layer, or a layer); "undisturbed" adds up the fastest time of every step. Needs the CPU extension.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.ops import extension
from engine.ops.layout import ALIGN, RECORD_WORDS, padded

ops = torch.ops.lorax
LAYERS = 30
GROUPS: list[
    tuple[int, list[int]]
] = [  # SmolLM2-135M: (input width, output widths of the group's targets)
    (576, [576, 192, 192]),
    (576, [576]),
    (576, [1536, 1536]),
    (1536, [576]),
]
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64


@dataclass(frozen=True)
class Adapters:
    """Equal adapters of one rank on every target, one after another in the arena; slot 0 is the base model."""

    arena: Tensor
    records: Tensor
    num_bytes: int


def make_adapters(count: int, rank: int, dtype: torch.dtype) -> Adapters:
    size = dtype.itemsize
    records = torch.zeros(count + 1, LAYERS + 1, len(GROUPS), RECORD_WORDS, dtype=torch.int32)
    at = 0
    for slot in range(1, count + 1):
        for layer in range(LAYERS):
            for group, (k, splits) in enumerate(GROUPS):
                record = records[slot, layer, group]
                record[0] = at // ALIGN
                at += rank * len(splits) * padded(k * size)
                record[1] = at // ALIGN
                at += sum(rank * padded(n * size) for n in splits)
                ranks = torch.tensor(
                    [rank if i < len(splits) else 0 for i in range(4)], dtype=torch.uint16
                )
                record[3:5] = ranks.view(torch.int32)
                record[5:8] = torch.ones(3).view(torch.int32)
    arena = torch.empty(at // size, dtype=dtype).normal_(std=0.05).view(torch.uint8)
    return Adapters(arena, records, at)


Steps = list[Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Seconds of a run made of steps."""

    undisturbed: float  # the sum of every step's fastest time
    median: float  # of whole rounds


def interleaved(rounds: int, runs: dict[str, Steps]) -> dict[str, Timing]:
    """Times the runs in turns."""
    fastest = {name: [float("inf")] * len(steps) for name, steps in runs.items()}
    totals: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, steps in runs.items():
            total = 0.0
            for i, step in enumerate(steps):
                begin = time.perf_counter()
                step()
                seconds = time.perf_counter() - begin
                total += seconds
                fastest[name][i] = min(fastest[name][i], seconds)
            totals[name].append(total)
    return {name: Timing(sum(fastest[name]), statistics.median(totals[name])) for name in runs}


def plain_read(data: Tensor, steps: int) -> Steps:
    """Reads all of the bytes once, in as many steps."""
    return [part.sum for part in data.view(torch.float32).flatten().tensor_split(steps)]


def report(title: str, num_bytes: int, timings: dict[str, Timing], limit: str) -> None:
    print(f"\n{title} ({num_bytes / 1e6:.1f} MB)")
    print(
        f"  {'':20}{'undisturbed':>12}{'median':>10}{'GB/s':>7}   x {limit} (undisturbed, median)"
    )
    for name, timing in timings.items():
        ratios = (
            timing.undisturbed / timings[limit].undisturbed,
            timing.median / timings[limit].median,
        )
        print(
            f"  {name:20}{timing.undisturbed * 1e3:10.2f}ms{timing.median * 1e3:8.2f}ms"
            f"{num_bytes / timing.undisturbed / 1e9:7.1f}   {ratios[0]:.2f}, {ratios[1]:.2f}"
        )


def bench_lora(args: argparse.Namespace, dtype: torch.dtype) -> None:
    adapters = make_adapters(args.adapters, args.rank, dtype)
    tokens = args.tokens or args.adapters
    counts = [tokens // args.adapters + (s < tokens % args.adapters) for s in range(args.adapters)]
    slots = torch.arange(1, args.adapters + 1, dtype=torch.int32)
    segment_starts = torch.tensor(
        [sum(counts[:s]) for s in range(args.adapters + 1)], dtype=torch.int32
    )
    xs = [torch.randn(tokens, k).to(dtype) for k, _ in GROUPS]
    ys = [torch.randn(tokens, sum(splits)).to(dtype) for _, splits in GROUPS]

    def where(layer: int, group: int) -> tuple[object, ...]:
        return adapters.arena, adapters.records, slots, segment_starts, layer, group

    def shrink(layer: int, group: int) -> Tensor:
        t: Tensor = ops.lora_shrink(
            xs[group], *where(layer, group), args.rank * len(GROUPS[group][1])
        )
        return t

    def both(layer: int, group: int) -> None:
        ops.lora_expand_(ys[group], shrink(layer, group), *where(layer, group), GROUPS[group][1])

    base = torch.zeros(1, dtype=torch.int32), torch.tensor([0, tokens], dtype=torch.int32)

    def base_only(layer: int, group: int) -> None:
        records = adapters.arena, adapters.records, *base, layer, group
        t = ops.lora_shrink(xs[group], *records, args.rank * len(GROUPS[group][1]))
        ops.lora_expand_(ys[group], t, *records, GROUPS[group][1])

    addresses = [(layer, group) for layer in range(LAYERS) for group in range(len(GROUPS))]
    runs: dict[str, Steps] = {
        "plain read": plain_read(adapters.arena, len(addresses)),
        "shrink and expand": [partial(both, *place) for place in addresses],
        "base only": [partial(base_only, *place) for place in addresses],
    }
    timings = interleaved(args.rounds, runs)
    title = f"LoRA, {args.adapters} adapters of rank {args.rank}, {tokens} tokens, {args.dtype}"
    report(title, adapters.num_bytes, timings, "plain read")
    print(
        f"  a call that finds no adapter: {timings['base only'].undisturbed / 2 / len(addresses) * 1e6:.1f} us"
    )
    multiplied = (
        sum((k * len(splits) + sum(splits)) * args.rank for k, splits in GROUPS) * LAYERS * tokens
    )
    print(f"  {2 * multiplied / timings['shrink and expand'].undisturbed / 1e9:.1f} GFLOP/s")


def bench_attention(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Decode: one query of each sequence against its keys and values, layer after layer."""
    block_size = 32

    def attend(
        q: Tensor, rows: tuple[Tensor, Tensor, Tensor], kv: Tensor
    ) -> list[Callable[[], object]]:
        options = *rows, HEAD_DIM**-0.5, 0.0, 0
        return [
            partial(ops.paged_attention, q, kv, layer, *options) for layer in range(args.kv_layers)
        ]

    for sequences, length in ((16, 1024), (1, 8192), (64, 128)):
        per_sequence = (length + block_size - 1) // block_size
        num_blocks = sequences * per_sequence + 1
        kv = torch.empty(
            (num_blocks, args.kv_layers, 2, block_size, KV_HEADS, HEAD_DIM), dtype=dtype
        ).normal_()
        block_tables = (
            torch.randperm(num_blocks - 1, dtype=torch.int32).view(sequences, per_sequence) + 1
        )
        cu_seqlens_q = torch.arange(sequences + 1, dtype=torch.int32)
        context_lens = torch.full((sequences,), length, dtype=torch.int32)
        q = torch.randn(sequences, HEADS, HEAD_DIM).to(dtype)

        attention = attend(q, (block_tables, cu_seqlens_q, context_lens), kv)
        timings = interleaved(
            args.rounds, {"plain read": plain_read(kv, args.kv_layers), "attention": attention}
        )
        title = (
            f"attention, {sequences} sequences of {length}, {args.kv_layers} layers, {args.dtype}"
        )
        report(title, kv.nbytes, timings, "plain read")

    tokens = 512
    kv = torch.randn(
        (1 + tokens // block_size, args.kv_layers, 2, block_size, KV_HEADS, HEAD_DIM)
    ).to(dtype)
    table = torch.arange(1, 1 + tokens // block_size, dtype=torch.int32)[None]
    rows = (
        table,
        torch.tensor([0, tokens], dtype=torch.int32),
        torch.tensor([tokens], dtype=torch.int32),
    )
    q = torch.randn(tokens, HEADS, HEAD_DIM).to(dtype)
    wide = torch.randn(1, HEADS, tokens, HEAD_DIM).to(dtype)

    torch_attention = partial(
        torch.nn.functional.scaled_dot_product_attention, wide, wide, wide, is_causal=True
    )
    runs: dict[str, Steps] = {
        "torch's attention": [torch_attention] * args.kv_layers,
        "attention": attend(q, rows, kv),
    }
    timings = interleaved(args.rounds, runs)
    title = f"attention, a prompt of {tokens}, {args.kv_layers} layers, {args.dtype}"
    report(title, kv.nbytes, timings, "torch's attention")
    multiplied = HEADS * HEAD_DIM * tokens * (tokens + 1) * args.kv_layers
    print(f"  {2 * multiplied / timings['attention'].undisturbed / 1e9:.1f} GFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=0, help="in all; default: one per adapter")
    parser.add_argument("--kv-layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--isa", help="default: the best of this machine")
    parser.add_argument("--only", choices=["lora", "attention"])
    args = parser.parse_args()
    status = extension.load()
    if status.path is None:
        sys.exit(f"error: {status.reason}")
    if args.isa and not extension.use_isa(args.isa):
        sys.exit(f"error: this machine has no {args.isa}")
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.isa or status.isa}, {args.rounds} rounds"
    )
    dtype = getattr(torch, args.dtype)
    if args.only != "attention":
        bench_lora(args, dtype)
    if args.only != "lora":
        bench_attention(args, dtype)


if __name__ == "__main__":
    main()
