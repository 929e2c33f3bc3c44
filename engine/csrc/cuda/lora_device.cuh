// What the LoRA kernels share on the device: the segment of a CTA, and 16-byte vectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "lora.h"

namespace lorax::cuda {

// The tokens of one slot and the record of its adapter.
struct Segment {
  int first;  // token
  int count;  // tokens
  uint32_t a, b;
  int ranks[kLoraTargets];
  float scales[kLoraTargets];
};

// The segment number s; false if there is nothing to do for it.
__device__ __forceinline__ bool find_segment(const LoraSegments& all, int s, Segment& segment) {
  const int slot = all.slots[s];
  const int first = all.starts[s], end = all.starts[s + 1];
  const int last = end < all.tokens ? end : int(all.tokens);
  if (slot <= 0 || slot >= all.num_slots || first < 0 || last <= first) return false;
  const int32_t* words = all.records + slot * all.record_stride;
  const uint4 low = *reinterpret_cast<const uint4*>(words);
  const uint4 high = *reinterpret_cast<const uint4*>(words + 4);
  segment.first = first;
  segment.count = last - first;
  segment.a = low.x;
  segment.b = low.y;
  segment.ranks[0] = low.w & 0xffff;
  segment.ranks[1] = low.w >> 16;
  segment.ranks[2] = high.x & 0xffff;
  segment.scales[0] = __uint_as_float(high.y);
  segment.scales[1] = __uint_as_float(high.z);
  segment.scales[2] = __uint_as_float(high.w);
  return (segment.ranks[0] | segment.ranks[1] | segment.ranks[2]) != 0;
}

// Bytes from one row of A or B to the next.
__host__ __device__ __forceinline__ int64_t row_bytes(int64_t length, int size) {
  return (length * size + kLoraAlign - 1) / kLoraAlign * kLoraAlign;
}

__device__ __forceinline__ const char* arena_at(const LoraSegments& all, uint32_t offset) {
  return static_cast<const char*>(all.arena) + int64_t(offset) * kLoraAlign;
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half(v);
}

}  // namespace lorax::cuda
