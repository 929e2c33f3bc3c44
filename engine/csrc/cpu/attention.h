// Causal attention over a paged cache on the CPU.
#pragma once

#include "kernels.h"

namespace lorax {

struct AttentionArgs {
  DType dtype;  // of q and out
  const void* q;
  int64_t q_stride, q_head_stride;  // from token to token, from head to head
  void* out;                        // [T, heads, size], contiguous

  DType kv_dtype;
  const void* kv;  // of the layer
  int64_t block_stride, value_stride, position_stride,
      kv_head_stride;  // of kv; from a key to its value
  int64_t block;       // positions

  const int32_t* tables;
  int64_t table_stride;
  const int32_t* starts;
  const int32_t* lengths;
  int64_t sequences;

  int64_t heads, groups, size;  // query heads, key-value heads, head size
  float scale, softcap;         // softcap 0: none
  int64_t window;               // 0: none
};

}  // namespace lorax

LORAX_DECLARE_KERNEL(attention, AttentionArgs)
