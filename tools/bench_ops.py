"""Times the CPU's ops against PyTorch, interleaved, with what the machine allows beside.

    python -m tools.bench_ops --threads 1 --dtype float32 --tokens 1,4,16,64,256

With one thread the clock is the thread's CPU time, which other processes disturb less; with more it is wall time. The
time shown is the best of `--repeats` rounds, the ratio is the median of the rounds' ratios. Weights are cycled through
more memory than the caches hold. Limits: a pass of `torch.sum` over 256 MB, and the best float32 rate of a multiply-add
loop as a large `torch.mm` reaches it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import extension, reference

LINEAR_SHAPES = [
    (960, 576),
    (576, 576),
    (3072, 576),
    (576, 1536),
]  # [N, K] of SmolLM2-135M's layers
HEAD_SHAPE = (49152, 576)
POOL_BYTES = 200 << 20
ops = torch.ops.lorax


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table: two ways to the same answer, each run `calls` times in a round."""

    name: str
    shape: str
    ours: Callable[[int], object]  # of the number of the call
    torchs: Callable[[int], object]
    calls: int
    num_bytes: float  # that one call must move
    num_flops: float


def linear_case(
    tokens: int, shapes: Sequence[tuple[int, int]], label: str, dtype: torch.dtype
) -> Case:
    """All of a layer's linears, one after the other, as one call."""
    size = sum(n * k for n, k in shapes)
    copies = max(1, POOL_BYTES // (size * dtype.itemsize))
    weights = [[torch.randn(n, k).to(dtype) for n, k in shapes] for _ in range(copies)]
    inputs = [torch.randn(tokens, k).to(dtype) for _, k in shapes]

    def run(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], None]:
        def call(i: int) -> None:
            for x, weight in zip(inputs, weights[i % copies], strict=True):
                function(x, weight)

        return call

    return Case(
        name=f"linear {label}",
        shape=f"{tokens} tokens",
        ours=run(lambda x, weight: ops.linear(x, weight, None)),
        torchs=run(F.linear),
        calls=copies,
        num_bytes=size * dtype.itemsize,
        num_flops=2 * tokens * size,
    )


def norm_case(tokens: int, width: int, dtype: torch.dtype) -> Case:
    x, residual = torch.randn(tokens, width).to(dtype), torch.zeros(tokens, width).to(dtype)
    weight = torch.ones(width).to(dtype)

    def torchs(_: int) -> Tensor:
        residual.add_(x)
        return F.rms_norm(residual, (width,), weight, 1e-5)

    return Case(
        name="add_rms_norm",
        shape=f"{tokens} x {width}",
        ours=lambda _: ops.add_rms_norm(x, residual, weight, 1e-5),
        torchs=torchs,
        calls=100,
        num_bytes=4 * x.nbytes,
        num_flops=0,
    )


def act_case(tokens: int, width: int, dtype: torch.dtype) -> Case:
    x = torch.randn(tokens, 2 * width).to(dtype)
    return Case(
        name="act_and_mul silu",
        shape=f"{tokens} x {width}",
        ours=lambda _: ops.act_and_mul(x, "silu"),
        torchs=lambda _: reference.act_and_mul(x, "silu"),
        calls=100,
        num_bytes=1.5 * x.nbytes,
        num_flops=0,
    )


def rope_case(tokens: int, dtype: torch.dtype) -> Case:
    qkv = torch.randn(tokens, 15, 64).to(dtype)
    kv = torch.zeros((tokens // 16 + 1, 1, 2, 16, 3, 64), dtype=dtype)
    angles = torch.randn(2048, 32)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.arange(tokens)  # and the slot mapping
    arguments = (qkv[:, :9], qkv[:, 9:12], qkv[:, 12:], cos_sin, positions, kv, positions, 0, False)
    return Case(
        name="rope_store_kv_",
        shape=f"{tokens} x (9 + 2 x 3) x 64",
        ours=lambda _: ops.rope_store_kv_(*arguments),
        torchs=lambda _: reference.rope_store_kv_(*arguments),
        calls=50,
        num_bytes=3 * qkv.nbytes,
        num_flops=0,
    )


def seconds(function: Callable[[int], object], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for i in range(calls):
        function(i)
    return (clock() - start) / calls


def measure(case: Case, repeats: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """(our best, torch's best, median of torch / ours) over interleaved rounds."""
    rounds = []
    seconds(case.ours, 1, clock), seconds(case.torchs, 1, clock)
    for _ in range(repeats):
        rounds.append(
            (seconds(case.ours, case.calls, clock), seconds(case.torchs, case.calls, clock))
        )
    ratio = statistics.median(theirs / ours for ours, theirs in rounds)
    return min(ours for ours, _ in rounds), min(theirs for _, theirs in rounds), ratio


def limits(repeats: int, clock: Callable[[], float]) -> tuple[float, float]:
    """(bytes per second of a pass over memory, float32 operations per second of a large matrix product)."""
    flat, square = torch.zeros(64 << 20), torch.randn(1024, 1024)
    read = min(seconds(lambda _: flat.sum(), 1, clock) for _ in range(repeats))
    product = min(seconds(lambda _: square @ square, 2, clock) for _ in range(repeats))
    return flat.nbytes / read, 2 * 1024**3 / product


def cases(tokens: int, dtype: torch.dtype) -> list[Case]:
    return [
        linear_case(tokens, LINEAR_SHAPES, "layer", dtype),
        linear_case(tokens, [HEAD_SHAPE], "head", dtype),
        norm_case(tokens, 576, dtype),
        act_case(tokens, 1536, dtype),
        rope_case(tokens, dtype),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--tokens", default="1,4,16,64,256")
    parser.add_argument("--isa", choices=["generic", "avx2", "avx512", "avx512_bf16"])
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    if arguments.isa and not extension.use_isa(arguments.isa):
        parser.error(f"this machine has no {arguments.isa}")
    status = extension.load()
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {arguments.isa or status.isa or status.reason}"
    )
    bandwidth, rate = limits(arguments.repeats, clock)
    print(f"limits: {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s (torch.mm 1024)\n")
    print(
        f"{'op':18}{'shape':24}{'ours us':>10}{'torch us':>10}{'ratio':>7}{'GB/s':>7}{'GFLOP/s':>9}{'limit us':>10}"
    )
    for tokens in map(int, arguments.tokens.split(",")):
        for case in cases(tokens, getattr(torch, arguments.dtype)):
            ours, theirs, ratio = measure(case, arguments.repeats, clock)
            limit = max(
                case.num_bytes / bandwidth if case.name.startswith("linear") else 0,
                case.num_flops / rate,
            )
            print(
                f"{case.name:18}{case.shape:24}{ours * 1e6:10.1f}{theirs * 1e6:10.1f}{ratio:7.2f}"
                f"{case.num_bytes / ours / 1e9:7.1f}{case.num_flops / ours / 1e9:9.0f}"
                f"{limit * 1e6:10.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
