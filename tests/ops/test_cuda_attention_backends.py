"""FlashInfer and flash-attn on a GPU against the float32 reference and the built-in op; captured and replayed.

FlashInfer builds kernels for every (dtype, head size, window or not, softcap or not) when it first needs them, a minute
or more each; the cases marked slow need some that the others do not.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.layers.batch import KVView
from engine.ops import attention, reference
from engine.ops.attention import AttentionBackend, Capacity, Gpu, Needs, StepLengths, choose
from tests.ops.test_cuda_attention import LAYER, LAYERS, TOLERANCES, Cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # the packages' own
    pytest.mark.timeout(900),  # kernels are built at first use
]

PACKAGES = {"flashinfer": "flashinfer", "flash-attn": "flash_attn"}


def needs_of(
    heads: int,
    kv_heads: int,
    size: int,
    dtype: torch.dtype = torch.bfloat16,
    softcap: float = 0.0,
    windows: tuple[int, ...] = (0,),
) -> Needs:
    device = torch.device("cuda")
    gpu = Gpu.of(device) if torch.cuda.is_available() else None
    scale = 0.3 if softcap else size**-0.5
    return Needs(heads, kv_heads, size, scale, softcap, frozenset(windows), dtype, device, gpu)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"heads": 32, "kv_heads": 8, "size": 128},
    "windows": {"heads": 8, "kv_heads": 1, "size": 128, "windows": (0, 20, 300)},
    "softcap": {"heads": 9, "kv_heads": 3, "size": 64, "softcap": 3.0, "windows": (0, 20)},
    "half": {"heads": 40, "kv_heads": 2, "size": 64, "dtype": torch.float16},
}
RUNS = [
    pytest.param("flashinfer", "plain"),
    pytest.param("flashinfer", "windows"),
    pytest.param("flashinfer", "softcap", marks=pytest.mark.slow),
    pytest.param("flashinfer", "half", marks=pytest.mark.slow),
    *(pytest.param("flash-attn", case) for case in CASES),
]
every_run = pytest.mark.parametrize(("name", "case"), RUNS)


@pytest.fixture
def made(name: attention.Name, case: str) -> tuple[AttentionBackend, Needs]:
    pytest.importorskip(PACKAGES[name])
    needs = needs_of(**CASES[case])
    backend = choose(name, needs)
    backend.start(Capacity(16, 400, backend.default_block_size))
    return backend, needs


def check(actual: Tensor, q: Tensor, view: KVView, needs: Needs, window: int) -> None:
    """`actual` is as near to the float32 reference as the built-in op is asked to be, and near that op."""
    where = (view.cache, LAYER, view.block_tables, view.cu_seqlens_q, view.context_lens)
    rest = (needs.scale, needs.softcap, window)
    expected = reference.paged_attention(q.float(), *where, *rest)
    tolerance = TOLERANCES[needs.dtype]
    assert actual.is_contiguous() and actual.dtype == needs.dtype
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)
    own = torch.ops.lorax.paged_attention(q, *where, *rest)
    torch.testing.assert_close(actual, own, rtol=2 * tolerance, atol=2 * tolerance)


SEQUENCES = {
    "mixed": [(1, 1), (1, 17), (1, 300), (5, 5), (70, 70), (33, 260), (1, 16), (2, 33)],
    "decodes": [(1, n) for n in (1, 15, 16, 17, 255, 256, 257, 600, 5000)],
    "prompts": [(300, 300), (129, 129), (1, 1), (16, 700)],
}


@every_run
@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_step(made: tuple[AttentionBackend, Needs], kind: str) -> None:
    """Every place that no sequence owns holds NaN; a backend is planned anew for the next step."""
    backend, needs = made
    for _ in range(2):
        sequences = SEQUENCES[kind]
        if kind == "decodes":
            sequences = random.sample(sequences, len(sequences))
        shape = (needs.heads, needs.kv_heads, needs.head_dim, backend.default_block_size)
        cache = Cache(sequences, *shape, needs.dtype)
        context_lens = [length for _, length in sequences]
        step = StepLengths(cache.counts, context_lens)
        attend = backend.step(step, cache.block_tables, cache.context_lens)
        slot_mapping = torch.zeros(0, dtype=torch.int64)
        where = (cache.kv, cache.block_tables, cache.cu_seqlens_q, cache.context_lens, slot_mapping)
        view = KVView(*where, step.num_decodes, attend)
        for window in needs.windows:
            actual = view.attend(cache.q, view, LAYER, needs.scale, needs.softcap, window)
            check(actual, cache.q, view, needs, window)


class Rows:
    """Rows of one token each in tensors at fixed addresses, and a cache that is full of numbers."""

    def __init__(self, backend: AttentionBackend, needs: Needs, rows: int, blocks: int) -> None:
        self.rows, self.blocks, self.block_size = rows, blocks, backend.default_block_size
        self.num_blocks = rows * blocks + 5
        shape = (self.num_blocks, LAYERS, 2, self.block_size, needs.kv_heads, needs.head_dim)
        self.cache = torch.full(shape, float("nan"), dtype=needs.dtype, device="cuda")
        self.cache[:, LAYER].normal_()
        self.block_tables = torch.zeros(rows, blocks, dtype=torch.int32, device="cuda")
        self.context_lens = torch.ones(rows, dtype=torch.int32, device="cuda")
        self.cu_seqlens_q = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
        wide = (needs.heads + 2 * needs.kv_heads) * needs.head_dim
        self.fused = torch.zeros(rows, wide, dtype=needs.dtype, device="cuda")
        q = self.fused[:, : needs.heads * needs.head_dim]
        self.q = q.unflatten(1, (needs.heads, needs.head_dim))

    def change(self) -> list[int]:
        """Other queries, blocks and lengths; one row is the scratch row of a graph's padding."""
        context_lens = [
            1,
            *(random.randint(1, self.blocks * self.block_size) for _ in range(self.rows - 1)),
        ]
        order = torch.randperm(self.num_blocks - 1)[: self.block_tables.numel()] + 1
        self.block_tables.copy_(order.view_as(self.block_tables).int())
        self.block_tables[0] = 0
        self.context_lens.copy_(torch.tensor(context_lens, dtype=torch.int32))
        self.fused.normal_()
        return context_lens

    def view(self, attend: attention.Attend) -> KVView:
        slot_mapping = torch.zeros(0, dtype=torch.int64)
        return KVView(
            self.cache,
            self.block_tables,
            self.cu_seqlens_q,
            self.context_lens,
            slot_mapping,
            self.rows,
            attend,
        )


@every_run
def test_graphs_replay_for_any_lengths(made: tuple[AttentionBackend, Needs]) -> None:
    """Two sizes, captured with rows of one position; then replayed in turn, planned but never captured again."""
    backend, needs = made
    blocks = 400 // (backend.default_block_size // 16)
    graphs = []
    for size in (16, 3):
        rows, captured = Rows(backend, needs, size, blocks), backend.captured(size)
        graph, outputs = torch.cuda.CUDAGraph(), {}

        def run(rows: Rows = rows, captured: Any = captured) -> dict[int, Tensor]:
            view = rows.view(captured.attend(rows.block_tables, rows.context_lens))
            return {
                window: view.attend(rows.q, view, LAYER, needs.scale, needs.softcap, window)
                for window in sorted(needs.windows)
            }

        captured.plan([1] * size)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        captured.plan([1] * size)
        with torch.cuda.graph(graph):
            outputs = run()
        graphs.append((rows, captured, graph, outputs))
    for rows, captured, graph, outputs in graphs * 4:
        captured.plan(rows.change())
        graph.replay()
        for window, actual in outputs.items():
            check(actual, rows.q, rows.view(attention.builtin_attend), needs, window)


@every_run
def test_steps_and_graphs_share_a_backend(made: tuple[AttentionBackend, Needs]) -> None:
    """A step of prompts between replays, none of them waited for, as an engine that runs ahead launches them."""
    backend, needs = made
    rows, captured = Rows(backend, needs, 4, 8), backend.captured(4)
    window = max(needs.windows)

    def run() -> Tensor:
        view = rows.view(captured.attend(rows.block_tables, rows.context_lens))
        return view.attend(rows.q, view, LAYER, needs.scale, needs.softcap, window)

    captured.plan([1] * 4)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    context_lens = rows.change()
    shape = (needs.heads, needs.kv_heads, needs.head_dim, backend.default_block_size)
    cache = Cache([(1, 40), (9, 80), (30, 30)], *shape, needs.dtype)
    whole = StepLengths(cache.counts, cache.context_lens.tolist())
    slot_mapping = torch.zeros(0, dtype=torch.int64)
    where = (cache.kv, cache.block_tables, cache.cu_seqlens_q, cache.context_lens, slot_mapping)
    view = KVView(*where, whole.num_decodes)
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(20):
        captured.plan(context_lens)
        graph.replay()
        first = out.clone()
        attend = backend.step(whole, cache.block_tables, cache.context_lens)
        second = attend(cache.q, view, LAYER, needs.scale, needs.softcap, window)
        found.append((first, second))
    for first, second in found:
        check(first, rows.q, rows.view(attention.builtin_attend), needs, window)
        check(second, cache.q, view, needs, window)
