// Arguments of the rotary embedding that also fills the KV cache.
#pragma once

#include "dtype.h"

namespace lorax {

struct Heads {
  void* data;  // [tokens, count, head_dim], head_dim contiguous
  int64_t count, token_stride, head_stride;
};

struct RopeStoreKvArgs {
  Heads q, k, v;             // q and k are rotated in place
  const float* cos_sin;      // [positions, 2 * half]: cosines, then sines
  const int64_t* positions;  // [tokens], each a row of cos_sin; null if half is 0
  const int64_t* places;     // [tokens]: block * block_size + offset, each in the cache
  void* kv;  // of this layer: [blocks, 2, block_size, count, head_dim], head_dim contiguous
  int64_t tokens, head_dim, half, cos_sin_stride, block_size;
  int64_t kv_block_stride, kv_value_stride, kv_offset_stride, kv_head_stride;  // value: from k to v
  bool interleaved;
  DType dtype, kv_dtype;
};

}  // namespace lorax
