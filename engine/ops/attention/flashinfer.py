"""FlashInfer (Ye et al. 2025), from the package `flashinfer-python`: the host plans how a step is split among CTAs.

Decode tokens and chunks are two calls into one output. nvcc builds their kernels at first use; `start` uses them once.
A plan is a few KB that are copied to the device from one pinned buffer per wrapper. The next plan of a wrapper waits
until that copy is done. The copy is the first work of its step, so the host does not wait for the step itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.ops.attention.packages import imported, refusal_of_gpu_and_dtype
from engine.ops.attention.pages import Pages
from engine.ops.attention.seam import Attend, Capacity, Captured, KVFormat, Needs, StepLengths, View

logger = logging.getLogger(__name__)

HEAD_SIZES = (64, 128, 256)
LAYOUT = "NHD"  # a page is [positions, kv heads, head size]
PLAN_BYTES = 1 << 20  # room for the plan of a captured step, which takes about 100 bytes a row
OWN_BYTES = 8 << 20  # that a wrapper allocates for its own plan
PREFILL_TILE = 128  # packed query rows of a CTA at most
CTAS_PER_PROCESSOR = 2  # that its scheduler assumes


class Mark(Protocol):
    def synchronize(self) -> None: ...


def marked() -> Mark:
    """A mark that is reached when the device has done everything launched so far."""
    return torch.cuda.current_stream().record_event()


def _running_sum(counts: Sequence[int] | Tensor) -> Tensor:
    """[n + 1] int32 from 0."""
    sums = torch.zeros(len(counts) + 1, dtype=torch.int32)
    torch.cumsum(torch.as_tensor(counts, dtype=torch.int32), 0, dtype=torch.int32, out=sums[1:])
    return sums


def _left(window: int) -> int:
    """Positions to the left of the query's own position; -1: all."""
    return window - 1 if window else -1


@dataclass(frozen=True, slots=True)
class _Step:
    """The attention of one step: `num_decodes` sequences of one token, then chunks. Wrappers by window."""

    needs: Needs
    decode: Mapping[int, Any]
    prefill: Mapping[int, Any]
    num_decodes: int

    def __call__(
        self, q: Tensor, view: View, layer: int, scale: float, softcap: float, window: int
    ) -> Tensor:
        needs, n = self.needs, self.num_decodes
        assert (scale, softcap) == (needs.scale, needs.softcap), (
            "the plan was made for another scale or softcap"
        )
        cache = view.cache[:, layer, 0], view.cache[:, layer, 1]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if n:
            self.decode[window].run(q[:n], cache, out=out[:n])
        if n < len(q):
            self.prefill[window].run(q[n:], cache, out=out[n:])
        return out


class _Graph:
    """The decode tokens of one captured graph: fixed buffers that the graph fills, and a plan before each replay."""

    def __init__(self, backend: FlashInfer, rows: int) -> None:
        self.backend, self.rows = backend, rows
        self.pages = backend.pages.first(rows)
        self.wrappers: dict[int, Any] = {}
        indptr, last = backend.host_pages([1] * rows)
        for window, plan in backend.plans.items():
            wrapper = backend.package.BatchDecodeWithPagedKVCacheWrapper(
                backend.workspace_buffer,
                LAYOUT,
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=self.pages.indptr,
                paged_kv_indices_buffer=self.pages.indices,
                paged_kv_last_page_len_buffer=self.pages.last,
            )
            wrapper.reset_workspace_buffer(backend.workspace_buffer, plan)
            # the first plan is a full one, which loads the kernels
            wrapper.plan(
                indptr, self.pages.indices[:rows], last, *backend.shape, **backend.options(window)
            )
            self.wrappers[window] = wrapper
        self.copied = backend.mark()

    def attend(self, block_tables: Tensor, context_lens: Tensor) -> Attend:
        self.pages.fill(block_tables, context_lens, self.backend.block_size)
        return _Step(self.backend.needs, self.wrappers, {}, self.rows)

    def plan(self, context_lens: Iterable[int]) -> None:
        """Copies only the split of the keys to the device, because the graph fills the page arrays."""
        backend = self.backend
        self.copied.synchronize()
        indptr, last = backend.host_pages(list(context_lens))
        for window, wrapper in self.wrappers.items():
            backend.package.fast_decode_plan(
                wrapper,
                indptr,
                self.pages.indices,
                last,
                *backend.shape,
                global_override_indptr_cpu=indptr,
                **backend.options(window),
            )
        self.copied = backend.mark()


class FlashInfer:
    """Imports the package. Raises ConfigError that names the package if it is missing."""

    name = "flashinfer"
    default_block_size = 16
    block_unit = 1
    captures_chunks = False

    def __init__(
        self, needs: Needs, package: Any = None, mark: Callable[[], Mark] = marked
    ) -> None:
        install = "pip install flashinfer-python"
        self.package = package or imported(self.name, "flashinfer", install)
        self.needs, self.mark = needs, mark
        self.serves: Mapping[str, str] = {
            "paged_attention": f"{self.name} {self.package.__version__}"
        }

    @staticmethod
    def refusal(needs: Needs) -> str | None:
        if needs.head_dim not in HEAD_SIZES:
            sizes = ", ".join(map(str, HEAD_SIZES))
            return f"serves heads of {sizes}, not of {needs.head_dim}"
        return refusal_of_gpu_and_dtype(needs)

    def kv_format(self, dtype: torch.dtype) -> KVFormat:
        return KVFormat(dtype)

    def workspace(self, rows: int) -> int:
        plans = len(self.needs.windows) * (PLAN_BYTES + 2 * OWN_BYTES)
        return self._partial_bytes(rows) + plans

    def _partial_bytes(self, rows: int) -> int:
        """Bytes of the float32 partial sums of as many tiles as its scheduler may split a step into."""
        needs = self.needs
        assert needs.gpu is not None
        gqa_ratio = needs.heads // needs.kv_heads
        cut = CTAS_PER_PROCESSOR * needs.gpu.processors // needs.kv_heads
        tile = 16 if gqa_ratio <= 16 else 64 if gqa_ratio <= 64 else PREFILL_TILE
        decode = tile * max(cut, -(-rows * gqa_ratio // tile) + rows - 1)
        rows_of_tiles = max(decode, PREFILL_TILE * cut)
        aligned = 64  # bytes, for two allocations aligned to 16
        return needs.heads * rows_of_tiles * (needs.head_dim + 1) * 4 + aligned

    def start(self, capacity: Capacity) -> None:
        needs, device, package = self.needs, self.needs.device, self.package
        self.block_size = capacity.block_size
        self.shape = (needs.heads, needs.kv_heads, needs.head_dim, capacity.block_size)
        # for partial sums; FlashInfer needs zeros at first use
        self.workspace_buffer = torch.zeros(
            self._partial_bytes(capacity.rows), dtype=torch.uint8, device=device
        )
        self.plans = {
            window: torch.zeros(PLAN_BYTES, dtype=torch.uint8, device=device)
            for window in sorted(needs.windows)
        }
        self.pages = Pages.empty(capacity.rows, capacity.blocks, device)
        buffer = self.workspace_buffer
        self.decode = {
            window: package.BatchDecodeWithPagedKVCacheWrapper(
                buffer, LAYOUT, use_tensor_cores=True
            )
            for window in self.plans
        }
        self.prefill = {
            window: package.BatchPrefillWithPagedKVCacheWrapper(buffer, LAYOUT)
            for window in self.plans
        }
        self.copied = self.mark()
        self._build()

    def _build(self) -> None:
        """Plans a tiny step, which loads the kernels, or builds them at the first start on a machine."""
        logger.info("FlashInfer loads its kernels; the first start on a machine builds them")
        started = time.perf_counter()
        context_lens = torch.ones(2, dtype=torch.int32, device=self.needs.device)
        block_tables = torch.zeros(2, 1, dtype=torch.int32, device=self.needs.device)
        try:
            self.step(StepLengths([1, 2], [1, 2]), block_tables, context_lens)
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"--attention-backend {self.name} could not build or load its kernels: {error}",
                field="attention_backend",
                hint="it takes ninja and the nvcc of a whole CUDA toolkit (cuRAND's headers too), or use"
                " --attention-backend builtin",
            ) from error
        logger.info("FlashInfer's kernels are ready after %.1f s", time.perf_counter() - started)

    def options(self, window: int) -> dict[str, Any]:
        """The options of every plan of a window."""
        needs = self.needs
        return {
            "window_left": _left(window),
            "logits_soft_cap": needs.softcap or None,
            "q_data_type": needs.dtype,
            "kv_data_type": needs.dtype,
            "sm_scale": needs.scale,
        }

    def host_pages(self, context_lens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """indptr and the length of each last page, int32 in host memory."""
        host = torch.tensor(context_lens, dtype=torch.int32)
        counts = (host + (self.block_size - 1)) // self.block_size
        return _running_sum(counts), host - (counts - 1) * self.block_size

    def _pinned(self, host: Tensor) -> Tensor:
        return host.pin_memory() if self.needs.device.type == "cuda" else host

    def step(self, step: StepLengths, block_tables: Tensor, context_lens: Tensor) -> Attend:
        self.copied.synchronize()
        n = step.num_decodes
        rows, blocks = block_tables.shape
        pages = Pages.empty(rows, blocks, block_tables.device)
        pages.fill(block_tables, context_lens, self.block_size)
        # a plan copies these to the device, from pinned memory, so that nothing waits
        indptr, last = map(self._pinned, self.host_pages(step.context_lens))
        qo_indptr = self._pinned(_running_sum(step.query_lens[n:]))
        for window in self.plans:
            options = self.options(window)
            if n:
                self.decode[window].plan(
                    indptr[: n + 1], pages.indices, last[:n], *self.shape, **options
                )
            if n < len(last):
                self.prefill[window].plan(
                    qo_indptr,
                    indptr[n:],
                    pages.indices,
                    last[n:],
                    *self.shape,
                    causal=True,
                    **options,
                )
        self.copied = self.mark()
        return _Step(self.needs, self.decode, self.prefill, n)

    def captured(self, rows: int) -> Captured:
        return _Graph(self, rows)
