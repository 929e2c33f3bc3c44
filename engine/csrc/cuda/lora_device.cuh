// What the LoRA kernels share on the device: segments, and how their work is shared by the CTAs.
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
__device__ __forceinline__ bool find_segment(const LoraSegments& segments, int s,
                                             Segment& segment) {
  const int slot = segments.slots[s];
  const int first = segments.starts[s], end = segments.starts[s + 1];
  const int last = end < segments.tokens ? end : int(segments.tokens);
  if (slot <= 0 || slot >= segments.num_slots || first < 0 || last <= first) return false;
  const int32_t* words = segments.records + slot * segments.record_stride;
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

// The record of token i's adapter; null for the base model and for padding.
__device__ __forceinline__ const int32_t* record_of_token(const LoraSegments& segments, int64_t i) {
  int low = 0, high = int(segments.count);  // starts[low] <= i < starts[high]
  if (i < segments.starts[low] || i >= segments.starts[high]) return nullptr;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (segments.starts[middle] <= i ? low : high) = middle;
  }
  const int slot = segments.slots[low];
  if (slot <= 0 || slot >= segments.num_slots) return nullptr;
  return segments.records + slot * segments.record_stride;
}

// The work of a launch, counted on the device: items of segment 0, then of segment 1, and so on. A
// grid then has as many CTAs as the GPU runs at a time, whatever the segments hold. blockIdx.y is a
// page of kPage segments; first[i] is the first item of the page's segment i.
constexpr int kPage = 128;

struct WorkList {
  // Aligned: its load must not take in a word that another thread writes.
  alignas(16) int warp_sums[kPage / 32];
  Segment segments[kPage];
  int first[kPage + 1];
};

// Every thread gets the number of items; `items_of(segment)` counts those of one. Reads only what
// no kernel of a step writes. Takes at least kPage threads.
template <class ItemsOf>
__device__ __forceinline__ int count_work(const LoraSegments& segments, WorkList& list,
                                          const ItemsOf& items_of) {
  const int thread = threadIdx.x, lane = thread % 32, page = blockIdx.y * kPage;
  int items = 0, before = 0;
  if (thread < kPage) {
    if (page + thread < segments.count &&
        find_segment(segments, page + thread, list.segments[thread]))
      items = items_of(list.segments[thread]);
    before = items;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, before, d);
      if (lane >= d) before += other;
    }
    if (lane == 31) list.warp_sums[thread / 32] = before;
  }
  __syncthreads();
  int total = 0;
  for (int w = 0; w < kPage / 32; ++w) {
    if (w < thread / 32) before += list.warp_sums[w];
    total += list.warp_sums[w];
  }
  if (thread < kPage) list.first[thread] = before - items;
  if (thread == 0) list.first[kPage] = total;
  __syncthreads();
  return total;
}

// The segment that has the item, as its index in the page.
__device__ __forceinline__ int find_work(const WorkList& list, int item) {
  int low = 0, high = kPage;
  while (high - low > 1) {  // first[low] <= item < first[high]
    const int middle = (low + high) / 2;
    (list.first[middle] <= item ? low : high) = middle;
  }
  return low;
}

// Passes of at most kTokens tokens over a segment's tokens, and over those of all segments.
template <int kTokens>
__device__ __forceinline__ int num_passes(const Segment& segment) {
  return (segment.count + kTokens - 1) / kTokens;
}

inline int64_t max_passes(const LoraSegments& segments, int64_t tokens) {
  return segments.count + segments.tokens / tokens;
}

inline int64_t num_pages(const LoraSegments& segments) {
  return (segments.count + kPage - 1) / kPage;
}

// The grid of a launch of at most `most` items, of which `room` CTAs run at a time.
inline dim3 work_grid(const LoraSegments& segments, int64_t max_items, int64_t max_ctas) {
  return dim3(uint32_t(max_items < max_ctas ? max_items : max_ctas), uint32_t(num_pages(segments)));
}

// Bytes from one row of A or B to the next.
__host__ __device__ __forceinline__ int64_t row_bytes(int64_t length, int size) {
  return (length * size + kLoraAlign - 1) / kLoraAlign * kLoraAlign;
}

__device__ __forceinline__ const char* arena_at(const LoraSegments& segments, uint32_t offset) {
  return static_cast<const char*>(segments.arena) + int64_t(offset) * kLoraAlign;
}

}  // namespace lorax::cuda
