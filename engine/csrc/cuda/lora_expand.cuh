// How expand is cut: tiles of columns of the targets that an adapter has.
#pragma once

#include "lora_device.cuh"
#include "pack.h"

namespace lorax::cuda {

constexpr int kExpandThreads = 128;

// The columns of a target that a thread works on.
struct Piece {
  const char* b;   // at the first of them
  int stride;      // bytes from a row of B to the next
  int left;        // columns of the target from the first on; <= 0: none
  int64_t column;  // of y: the first
  int rank, row;   // of the target: how many, and the first in t
  float scale;
};

// Tiles of `tile` columns of every target that the segment's adapter has.
__device__ __forceinline__ int count_tiles(const ExpandArgs& args, const Segment& segment,
                                           int tile) {
  int64_t tiles = 0;
#pragma unroll
  for (int target = 0; target < kLoraTargets; ++target)
    if (segment.ranks[target]) tiles += (args.splits[target] + tile - 1) / tile;
  return int(tiles);
}

// Whether t has room for the segment's ranks.
__device__ __forceinline__ bool fits_width(const ExpandArgs& args, const Segment& segment) {
  return segment.ranks[0] + segment.ranks[1] + segment.ranks[2] <= args.width;
}

// The tile number `local` of them, from its column `offset` on.
template <class T>
__device__ __forceinline__ Piece piece_of(const ExpandArgs& args, const Segment& segment, int local,
                                          int tile, int offset) {
  const char* b = arena_at(args.segments, segment.b);
  Piece piece{};
  int64_t column = 0;
  int row = 0;
#pragma unroll
  for (int target = 0; target < kLoraTargets; ++target) {
    const int64_t n = args.splits[target];
    const int rank = segment.ranks[target], tiles = rank ? int((n + tile - 1) / tile) : 0;
    const int64_t stride = row_bytes(n, int(sizeof(T)));
    if (local >= 0 && local < tiles) {
      const int64_t c = int64_t(local) * tile + offset;
      piece = {b + c * int(sizeof(T)), int(stride), int(n - c), column + c, rank, row,
               segment.scales[target]};
    }
    local -= tiles;
    b += rank * stride;
    column += n;
    row += rank;
  }
  return piece;
}

template <class T, int N>
__device__ __forceinline__ void unpack(const Pack<T, N>& pack, float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = widen(pack.v[i]);
}

// Where it stands: the compiler would else widen all rows at once and run out of registers.
template <int N>
__device__ __forceinline__ void unpack(const Pack<__nv_bfloat16, N>& pack, float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const uint32_t two = *reinterpret_cast<const uint32_t*>(&pack.v[i]);
    asm volatile("shl.b32 %0, %1, 16;" : "=f"(out[i]) : "r"(two));
    asm volatile("and.b32 %0, %1, 0xffff0000;" : "=f"(out[i + 1]) : "r"(two));
  }
}
template <int N>
__device__ __forceinline__ void unpack(const Pack<__half, N>& pack, float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const uint32_t two = *reinterpret_cast<const uint32_t*>(&pack.v[i]);
    asm volatile(
        "{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, "
        "high; }"
        : "=f"(out[i]), "=f"(out[i + 1])
        : "r"(two));
  }
}

}  // namespace lorax::cuda
