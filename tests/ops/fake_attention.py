"""Stand-ins for the packages `flashinfer` and `flash_attn`: the calls that we make, computed by the reference op.

They take the arguments of the real functions under the same names, and nothing else. What is planned on the host must
agree with what the device's arrays say when it runs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from engine.ops import reference


def _attend(
    q: Tensor,
    cache: tuple[Tensor, Tensor],
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    options: tuple[float, float, int],
) -> Tensor:
    """Options are scale, softcap, window."""
    keys, values = cache
    assert keys.stride() == values.stride() and keys.stride(-1) == 1 and q.stride(-1) == 1
    kv = torch.stack([keys, values], dim=1)[:, None]
    return reference.paged_attention(q, kv, 0, block_tables, cu_seqlens_q, context_lens, *options)


def _running(counts: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)])


class _Wrapper:
    """Plans and runs; with `use_cuda_graph` the page arrays are the caller's buffers."""

    def __init__(self, buffer: Tensor, layout: str, graph: bool) -> None:
        assert layout == "NHD" and buffer.dtype == torch.uint8 and not buffer.any()
        self.graph = graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor
    ) -> None:
        assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8

    def _plan(
        self,
        qo_indptr: Tensor,
        indptr: Tensor,
        last: Tensor,
        shape: tuple[int, int, int, int],
        options: dict[str, Any],
    ) -> None:
        assert qo_indptr.dtype == indptr.dtype == last.dtype == torch.int32
        assert len(qo_indptr) == len(indptr) == len(last) + 1
        assert options["q_data_type"] == options["kv_data_type"]
        window = options["window_left"] + 1
        softcap = options["logits_soft_cap"] or 0.0
        self.options = (options["sm_scale"], softcap, window)
        self.shape = shape
        self.qo_indptr, self.planned = qo_indptr, (indptr - indptr[0], last)

    def _run(self, q: Tensor, cache: tuple[Tensor, Tensor], out: Tensor) -> None:
        heads, kv_heads, size, block_size = self.shape
        assert cache[0].shape[1:] == (block_size, kv_heads, size)
        assert len(q) == self.qo_indptr[-1] and q.shape[1:] == (heads, size)
        indptr, indices, last = self.pages
        assert torch.equal(indptr - indptr[0], self.planned[0])
        assert torch.equal(last, self.planned[1])
        counts = indptr.diff()
        context_lens = (counts - 1) * block_size + last
        block_tables = torch.zeros(len(last), int(counts.max()), dtype=torch.int32)
        for s, (first, end) in enumerate(zip(indptr[:-1], indptr[1:], strict=True)):
            block_tables[s, : end - first] = indices[first:end]
        out.copy_(_attend(q, cache, block_tables, self.qo_indptr, context_lens, self.options))


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str,
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        assert use_tensor_cores
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        self.pages: Any = buffers

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> None:
        if self.graph:
            assert len(indptr) == len(self.pages[0])
            self.pages[0].copy_(indptr)
            self.pages[1][: len(indices)].copy_(indices)
            self.pages[2].copy_(last_page_len)
        else:
            self.pages = (indptr, indices, last_page_len)
        qo_indptr = torch.arange(len(indptr), dtype=torch.int32)
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self._plan(qo_indptr, indptr, last_page_len, shape, options)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> None:
        self._run(q, paged_kv_cache, out)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str) -> None:
        super().__init__(float_workspace_buffer, kv_layout, False)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        **options: Any,
    ) -> None:
        assert causal and qo_indptr[0] == 0
        self.pages = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._plan(qo_indptr, paged_kv_indptr, paged_kv_last_page_len, shape, options)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> None:
        self._run(q, paged_kv_cache, out)


def fast_decode_plan(
    wrapper: BatchDecodeWithPagedKVCacheWrapper,
    indptr: Tensor,
    indices: Tensor,
    last_page_len: Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    *,
    global_override_indptr_cpu: Tensor,
    **options: Any,
) -> None:
    """Copies nothing: in a graph the buffers are filled by the graph."""
    assert wrapper.graph and len(indices) <= len(wrapper.pages[1])
    assert indptr is global_override_indptr_cpu
    shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
    wrapper._plan(wrapper.qo_indptr, indptr, last_page_len, shape, options)


def flash_attn_with_kvcache(
    q: Tensor,  # [B, 1, H, D]
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    counts = torch.full((len(q),), q.shape[1], dtype=torch.int32)
    assert causal and k_cache.shape[1] % 256 == 0
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    options = (softmax_scale, softcap, window_size[0] + 1)
    cu_seqlens_q = _running(counts)
    found = _attend(
        q.flatten(0, 1), (k_cache, v_cache), block_table, cu_seqlens_q, cache_seqlens, options
    )
    return found.view(q.shape)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    context_lens = cu_seqlens_k.diff()
    assert causal and k.shape[1] % 256 == 0
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[0] == cu_seqlens_k[0] == 0
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == context_lens.max()
    options = (softmax_scale, softcap, window_size[0] + 1)
    return _attend(q, (k, v), block_table, cu_seqlens_q, context_lens, options)


class Mark:
    def synchronize(self) -> None: ...


flashinfer = SimpleNamespace(
    __version__="fake",
    BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
    fast_decode_plan=fast_decode_plan,
)
flash_attn = SimpleNamespace(
    __version__="fake",
    flash_attn_with_kvcache=flash_attn_with_kvcache,
    flash_attn_varlen_func=flash_attn_varlen_func,
)
