"""The seam of attention backends: choice and refusal, page arrays, and each backend over a stand-in for its package."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.layers.batch import KVView
from engine.ops import attention
from engine.ops.attention import AttentionBackend, Capacity, Gpu, Needs, StepLengths, choose
from engine.ops.attention.builtin import Builtin
from engine.ops.attention.flash_attention import FlashAttention
from engine.ops.attention.flashinfer import FlashInfer
from engine.ops.attention.pages import Pages
from tests.ops import fake_attention

pytestmark = pytest.mark.usefixtures("fresh")

LAYERS, LAYER = 3, 1
CPU = torch.device("cpu")
HOPPER = Gpu((9, 0), 132)
LLAMA = Needs(32, 8, 128, 128**-0.5, 0.0, frozenset({0}), torch.bfloat16, CPU, HOPPER)
PACKAGES = {"flashinfer": "flashinfer", "flash-attn": "flash_attn"}


def test_auto_and_builtin_serve_everything() -> None:
    odd = replace(LLAMA, head_dim=33, dtype=torch.float32, softcap=2.0, gpu=None)
    for needs in (LLAMA, odd):
        for name in ("auto", "builtin"):
            chosen = choose(name, needs)
            assert chosen.name == "builtin" and not chosen.serves
            assert chosen.workspace(256) == 0


@pytest.mark.parametrize(
    ("name", "needs", "reason"),
    [
        ("flashinfer", replace(LLAMA, gpu=None), "needs a GPU"),
        ("flash-attn", replace(LLAMA, gpu=None), "needs a GPU"),
        ("flashinfer", replace(LLAMA, dtype=torch.float32), "not in float32"),
        ("flash-attn", replace(LLAMA, dtype=torch.float32), "not in float32"),
        ("flashinfer", replace(LLAMA, gpu=Gpu((7, 5), 72)), "this one has 7.5"),
        ("flash-attn", replace(LLAMA, gpu=Gpu((7, 5), 72)), "this one has 7.5"),
        ("flashinfer", replace(LLAMA, head_dim=96), "heads of 64, 128, 256, not of 96"),
        ("flash-attn", replace(LLAMA, head_dim=100), "not of 100"),
        ("flash-attn", replace(LLAMA, head_dim=320), "not of 320"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(
    name: attention.Name, needs: Needs, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its package is looked for; the remedy works."""
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ConfigError, match=reason) as caught:
        choose(name, needs)
    assert caught.value.field == "attention_backend"
    assert "--attention-backend builtin" in (caught.value.hint or "")
    assert choose("builtin", needs).name == "builtin"


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named(name: attention.Name, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ConfigError, match="is not installed|does not load") as caught:
        choose(name, LLAMA)
    assert caught.value.field == "attention_backend"
    assert "pip install" in (caught.value.hint or "")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_does_not_load_says_why(
    name: attention.Name, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.delitem(sys.modules, PACKAGES[name], raising=False)
    (tmp_path / f"{PACKAGES[name]}.py").write_text("raise ImportError('undefined symbol: x')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"{PACKAGES[name]} does not load: undefined symbol"):
        choose(name, LLAMA)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_chosen_package_is_named_where_ops_are(
    name: attention.Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType(PACKAGES[name])
    module.__dict__["__version__"] = "1.2.3"
    monkeypatch.setitem(sys.modules, PACKAGES[name], module)
    chosen = choose(name, LLAMA)
    assert (chosen.name, chosen.serves) == (name, {"paged_attention": f"{name} 1.2.3"})


def test_kernels_that_cannot_be_built_are_refused() -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Could not find nvcc")

    package = ModuleType("flashinfer")
    package.__dict__.update(vars(fake_attention.flashinfer))
    decode = type("Decode", (fake_attention.BatchDecodeWithPagedKVCacheWrapper,), {"plan": fail})
    package.__dict__["BatchDecodeWithPagedKVCacheWrapper"] = decode
    with pytest.raises(ConfigError, match="could not build or load its kernels: Could not find"):
        FlashInfer(LLAMA, package, fake_attention.Mark).start(Capacity(4, 8, 16))


def test_decodes_are_the_leading_sequences_of_one_token() -> None:
    assert StepLengths([1, 1, 5, 1], [3, 4, 9, 9]).num_decodes == 2
    assert StepLengths([1, 1], [3, 4]).num_decodes == 2
    assert StepLengths([7, 1], [7, 4]).num_decodes == 0


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_pages_and_block_tables_hold_the_same(block_size: int) -> None:
    """Each from the other, and the host's arrays equal the device's."""
    backend = FlashInfer(replace(LLAMA, head_dim=64), fake_attention.flashinfer)
    backend.block_size = block_size
    for _ in range(30):
        rows, widest = random.randint(1, 9), random.randint(1, 12)
        block_tables = torch.randint(0, 1000, (rows, widest), dtype=torch.int32)
        context_lens = torch.randint(1, widest * block_size + 1, (rows,), dtype=torch.int32)
        pages = Pages.empty(rows + 2, widest + 3, CPU).first(rows)
        for _ in range(2):  # nothing of the first time is left
            pages.fill(block_tables, context_lens, block_size)
        rebuilt = [
            pages.indices[a:b] for a, b in zip(pages.indptr[:-1], pages.indptr[1:], strict=True)
        ]
        for table, owned, length, last in zip(
            block_tables, rebuilt, context_lens, pages.last, strict=True
        ):
            assert torch.equal(owned, table[: len(owned)])
            assert (len(owned) - 1) * block_size + last == length and 1 <= last <= block_size
        indptr, last_pages = backend.host_pages(context_lens.tolist())
        assert torch.equal(indptr, pages.indptr) and torch.equal(last_pages, pages.last)
        assert indptr.dtype == last_pages.dtype == torch.int32


class Scene:
    """Sequences of (tokens, length) over a cache that holds NaN everywhere else, and the built-in op over them."""

    def __init__(self, sequences: list[tuple[int, int]], needs: Needs, block_size: int) -> None:
        needed = [-(-length // block_size) for _, length in sequences]
        order = random.sample(range(1, sum(needed) + 3), sum(needed) + 2)
        shape = (len(order) + 1, LAYERS, 2, block_size, needs.kv_heads, needs.head_dim)
        self.cache = torch.full(shape, float("nan"))
        block_tables = torch.zeros(len(sequences), max(needed) + 1, dtype=torch.int32)
        for s, (count, (_, length)) in enumerate(zip(needed, sequences, strict=True)):
            owned, order = order[:count], order[count:]
            block_tables[s, :count] = torch.tensor(owned)
            for i, index in enumerate(owned):
                used = min(block_size, length - i * block_size)
                self.cache[index, LAYER, :, :used] = torch.randn(2, used, *shape[4:])
        counts, context_lens = [n for n, _ in sequences], [n for _, n in sequences]
        self.step = StepLengths(counts, context_lens)
        self.block_tables, self.context_lens = (
            block_tables,
            torch.tensor(context_lens, dtype=torch.int32),
        )
        self.cu_seqlens_q = torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)]).int()
        wide = torch.randn(sum(counts), needs.heads + 2 * needs.kv_heads, needs.head_dim)
        self.q = wide[:, : needs.heads]
        self.needs = needs

    def view(self, attend: attention.Attend = attention.builtin_attend) -> KVView:
        slot_mapping = torch.zeros(0, dtype=torch.int64)
        num_decodes = self.step.num_decodes
        return KVView(
            self.cache,
            self.block_tables,
            self.cu_seqlens_q,
            self.context_lens,
            slot_mapping,
            num_decodes,
            attend,
        )

    def attend(self, attend: attention.Attend, window: int) -> Tensor:
        view = self.view(attend)
        return view.attend(self.q, view, LAYER, self.needs.scale, self.needs.softcap, window)

    def check(self, attend: attention.Attend) -> None:
        for window in self.needs.windows:
            actual = self.attend(attend, window)
            assert actual.is_contiguous() and not actual.isnan().any()
            expected = self.attend(attention.builtin_attend, window)
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def made(name: str, needs: Needs, capacity: Capacity) -> AttentionBackend:
    backends: dict[str, Callable[[], AttentionBackend]] = {
        "builtin": Builtin,
        "flashinfer": lambda: FlashInfer(needs, fake_attention.flashinfer, fake_attention.Mark),
        "flash-attn": lambda: FlashAttention(needs, fake_attention.flash_attn),
    }
    backend = backends[name]()
    backend.start(capacity)
    return backend


SMALL = replace(LLAMA, heads=6, kv_heads=2, head_dim=16, scale=0.3)
NEEDS = [
    SMALL,
    replace(SMALL, softcap=3.0, windows=frozenset({0, 20})),
    replace(SMALL, windows=frozenset({1, 300})),
]
STEPS = [
    [(1, 1), (1, 17), (1, 300), (5, 5), (70, 70), (33, 260), (1, 16), (2, 33)],
    [(1, 1), (1, 257), (1, 16)],
    [(40, 40), (3, 300)],
]


@pytest.mark.parametrize("name", ["builtin", *PACKAGES])
@pytest.mark.parametrize("needs", NEEDS)
def test_a_step_equals_the_builtin_op(name: str, needs: Needs) -> None:
    block_size = 256 if name == "flash-attn" else random.choice([16, 32])
    backend = made(name, needs, Capacity(8, 20, block_size))
    for sequences in STEPS * 2:
        scene = Scene(sequences, needs, block_size)
        scene.check(backend.step(scene.step, scene.block_tables, scene.context_lens))


@pytest.mark.parametrize("name", ["builtin", *PACKAGES])
@pytest.mark.parametrize("needs", NEEDS)
def test_a_graph_serves_any_lengths(name: str, needs: Needs) -> None:
    """Graphs of two sizes in turn, each planned ahead for rows of other lengths and blocks."""
    block_size = 256 if name == "flash-attn" else 16
    backend = made(name, needs, Capacity(6, 40, block_size))
    graphs = {rows: backend.captured(rows) for rows in (6, 3)}
    for rows in (6, 3, 3, 6):
        scene = Scene([(1, random.randint(1, 600)) for _ in range(rows)], needs, block_size)
        graphs[rows].plan(scene.context_lens.tolist())
        scene.check(graphs[rows].attend(scene.block_tables, scene.context_lens))


def test_a_plan_that_does_not_fit_the_arrays_is_noticed() -> None:
    """The stand-in sees it when host and device disagree: this is what the tests above rest on."""
    backend = made("flashinfer", SMALL, Capacity(2, 40, 16))
    graph = backend.captured(2)
    scene = Scene([(1, 40), (1, 9)], SMALL, 16)
    graph.plan([40, 8])
    with pytest.raises(AssertionError):
        scene.check(graph.attend(scene.block_tables, scene.context_lens))


def test_flashinfer_waits_for_its_last_upload_only() -> None:
    """Before a plan is written, the copy of the one before must have left the pinned buffer."""
    events: list[str] = []

    class Recorded:
        def __init__(self) -> None:
            events.append("mark")

        def synchronize(self) -> None:
            events.append("wait")

    backend = FlashInfer(SMALL, fake_attention.flashinfer, Recorded)
    backend.start(Capacity(2, 4, 16))
    graph = backend.captured(2)
    events.clear()
    graph.plan([1, 2])
    graph.plan([2, 3])
    backend.step(StepLengths([1], [1]), torch.zeros(1, 1).int(), torch.ones(1).int())
    assert events == ["wait", "mark"] * 3
