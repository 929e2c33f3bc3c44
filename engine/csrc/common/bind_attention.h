// Checks and arguments of paged_attention. The values of block_tables, cu_seqlens_q and
// context_lens are not checked here: a GPU's stay on the GPU.
#pragma once

#include <algorithm>
#include <limits>

#include "bind.h"

namespace lorax {

// The data of an int32 tensor with `dims` dimensions, `rows` of the first, and a contiguous last.
inline const int32_t* check_table(const char* op, const char* name, const Tensor& t, int64_t dims,
                                  int64_t rows) {
  LORAX_CHECK(
      on_device(t) && t.dim() == dims && t.scalar_type() == ScalarType::Int && t.size(0) == rows,
      op, ": ", name, " must be int32 on ", kDevice, " with ", dims, " dimensions and ", rows,
      " rows, its shape is ", shape_of(t));
  LORAX_CHECK(t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1, op, ": ", name,
              " must be contiguous");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// `Args` is the AttentionArgs of the device: the CPU counts in int64_t, the GPU in int. What only
// one of them has, and `out`, stay 0.
template <class Args>
Args attention_args(const char* op, const Tensor& q, const Tensor& kv, int64_t layer,
                    const Tensor& block_tables, const Tensor& cu_seqlens_q,
                    const Tensor& context_lens, double scale, double softcap, int64_t window) {
  using Count = decltype(Args::heads);
  check_layout(op, "q", q, 3);
  check_layout(op, "kv", kv, 6);
  Args args{};
  args.dtype = dtype_of(op, "q", q);
  args.kv_dtype = dtype_of(op, "kv", kv);
  LORAX_CHECK(kv.size(2) == 2, op,
              ": kv must be [blocks, layers, 2, block_size, kv_heads, head_dim], its shape is ",
              shape_of(kv));
  LORAX_CHECK(layer >= 0 && layer < kv.size(1), op, ": layer ", layer, " is not in the cache of ",
              kv.size(1), " layers");
  const int64_t heads = q.size(1), size = q.size(2), block_size = kv.size(3), kv_heads = kv.size(4);
  LORAX_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, op, ": ", heads,
              " query heads cannot share ", kv_heads, " key-value heads");
  LORAX_CHECK(size > 0 && size == kv.size(5), op, ": q has head size ", size, " and kv ",
              kv.size(5));
  LORAX_CHECK(block_size > 0, op, ": kv must have blocks of at least one position");
  LORAX_CHECK(window >= 0, op, ": window ", window, " is negative");
  LORAX_CHECK(softcap >= 0, op, ": softcap ", softcap, " is negative");
  const int64_t sequences = context_lens.dim() == 1 ? context_lens.size(0) : 0;
  args.lengths = check_table(op, "context_lens", context_lens, 1, sequences);
  args.starts = check_table(op, "cu_seqlens_q", cu_seqlens_q, 1, sequences + 1);
  args.tables = check_table(op, "block_tables", block_tables, 2, sequences);
  args.table_stride = block_tables.stride(0);
  args.sequences = Count(sequences);
  args.heads = Count(heads);
  args.groups = Count(kv_heads);
  args.size = Count(size);
  args.block = Count(block_size);
  args.window = Count(std::min<int64_t>(window, std::numeric_limits<Count>::max()));
  args.q = q.const_data_ptr();
  args.q_stride = q.stride(0);
  args.q_head_stride = q.stride(1);
  args.kv = static_cast<const char*>(kv.const_data_ptr()) +
            layer * kv.stride(1) * int64_t(kv.element_size());
  args.block_stride = kv.stride(0);
  args.value_stride = kv.stride(2);
  args.position_stride = kv.stride(3);
  args.kv_head_stride = kv.stride(4);
  args.scale = float(scale);
  args.softcap = float(softcap);
  return args;
}

}  // namespace lorax
