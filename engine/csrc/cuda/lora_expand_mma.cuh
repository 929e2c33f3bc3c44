// Expand of segments of many tokens, on tensor cores; 16-bit elements.
//
// An item of work is 32 tokens of a segment by 256 columns of a target, 64 columns of a warp. B is
// the left operand, so that a thread's 16 contiguous bytes of a row of B are one row of four mmas,
// and its sums 8 contiguous columns of two tokens. The operands are tf32: B is exact in it, t is
// split into two halves of 11 bits each. How an element is summed depends on its ranks alone.
#pragma once

#include "chain.cuh"
#include "lora_expand.cuh"

namespace lorax::cuda {

constexpr int kMmaColumns = 8;  // of a thread
constexpr int kMmaTile = kExpandThreads / 32 * 64;
constexpr int kMmaTokens = 32;  // of an item
constexpr int kGroups = kMmaTokens / 8;
constexpr int kMmaRanks = 64;  // whose t lie in shared memory at a time
constexpr int kRows = 4;       // of B, that a thread has of 16
// t in halves; the stride keeps the banks of eight tokens of four ranks apart.
using Halves = uint2[kMmaRanks][kMmaTokens + 4];

// c[16, 8] += a[16, 8] @ b[8, 8], fragments as in PTX's mma.m16n8k8.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const float (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
  return out;
}

// The value in two: x = high + low but for 2^-22 of it.
__device__ __forceinline__ uint2 split_tf32(float x) {
  const uint32_t high = to_tf32(x);
  return {high, to_tf32(x - __uint_as_float(high))};
}

// t of the chunk's ranks and the item's tokens, scaled and in halves; zeros in place of others.
__device__ __forceinline__ void load_t(const ExpandArgs& args, const Piece& piece, int rank0,
                                       int ranks, int64_t first, int count, Halves& halves) {
  const int64_t part = args.segments.tokens * args.width;
  const int rounded = (ranks + kRows * 4 - 1) / (kRows * 4) * kRows * 4;
  for (int i = threadIdx.x; i < rounded * kMmaTokens;
       i += kExpandThreads) {  // over tokens, then ranks
    const int token = i / rounded, r = i % rounded;
    float sum = 0.0f;
    if (token < count && r < ranks) {
      const float* t = args.t + (first + token) * args.width + piece.row + rank0 + r;
#pragma unroll 4
      for (int64_t p = 0; p < args.parts; ++p) sum += __ldcg(t + p * part);  // over parts
    }
    halves[r][token] = split_tf32(piece.scale * sum);
  }
}

// A thread's sums: sums[j][i] are of tokens 8 j + 2 quad and the next, of its columns 2 i and the
// next, the tokens beside each other.
using Sums = float[kGroups][4][4];

__device__ __forceinline__ int token_of(int j, int h) { return j * 8 + threadIdx.x % 4 * 2 + h; }

template <class T>
__device__ __forceinline__ void load_y(const ExpandArgs& args, const T* y, int count, Sums& sums) {
  Pack<T, kMmaColumns> old[kGroups][2] = {};
#pragma unroll
  for (int j = 0; j < kGroups; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (token_of(j, h) < count)
        old[j][h] = load_pack<kMmaColumns>(y + token_of(j, h) * args.y_stride);
#pragma unroll
  for (int j = 0; j < kGroups; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float row[kMmaColumns];
      unpack(old[j][h], row);
#pragma unroll
      for (int c = 0; c < kMmaColumns; ++c) sums[j][c / 2][c % 2 * 2 + h] = row[c];
    }
}

template <class T>
__device__ __forceinline__ void store_y(const ExpandArgs& args, T* y, int count, const Sums& sums) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Pack<T, kMmaColumns> pack;
#pragma unroll
      for (int c = 0; c < kMmaColumns; ++c) pack.v[c] = narrow<T>(sums[j][c / 2][c % 2 * 2 + h]);
      if (token_of(j, h) < count) store_pack<kMmaColumns>(y + token_of(j, h) * args.y_stride, pack);
    }
}

// Adds `count` tokens from `first` on.
template <class T>
__device__ __forceinline__ void expand_item(const ExpandArgs& args, const Piece& piece,
                                            int64_t first, int count, Halves& halves) {
  const int lane = threadIdx.x % 32, here = piece.left > 0 ? count : 0;
  T* const y = static_cast<T*>(args.y) + first * args.y_stride + piece.column;
  Pack<T, kMmaColumns> rows[kRows];  // of B, every fourth
  const auto load = [&](int r0) {
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int r = r0 + lane % 4 + u * 4;
      rows[u] = {};
      if (r < piece.rank && here)
        rows[u] =
            load_pack<kMmaColumns>(reinterpret_cast<const T*>(piece.b + int64_t(r) * piece.stride));
    }
  };
  load(0);
  wait_for_previous();
  Sums out;
  load_y(args, y, here, out);
  for (int rank0 = 0; rank0 < piece.rank; rank0 += kMmaRanks) {  // over chunks of ranks
    const int ranks = min(piece.rank - rank0, kMmaRanks);
    __syncthreads();
    load_t(args, piece, rank0, ranks, first, count, halves);
    __syncthreads();
    for (int r0 = 0; r0 < ranks; r0 += kRows * 4) {  // over ranks
      if (rank0 + r0 > 0) load(rank0 + r0);
#pragma unroll
      for (int u = 0; u < kRows; u += 2) {  // eight of them
        const auto* t = halves + r0 + u * 4 + lane % 4;
        float b0[kMmaColumns], b1[kMmaColumns];
        unpack(rows[u], b0);
        unpack(rows[u + 1], b1);
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          if (j * 8 >= count) break;  // alike in a warp
          const uint2 t0 = t[0][j * 8 + lane / 4], t1 = t[4][j * 8 + lane / 4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            mma_tf32(out[j][i], {b0[2 * i], b0[2 * i + 1], b1[2 * i], b1[2 * i + 1]}, t0.x, t1.x);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            mma_tf32(out[j][i], {b0[2 * i], b0[2 * i + 1], b1[2 * i], b1[2 * i + 1]}, t0.y, t1.y);
        }
      }
    }
  }
  store_y(args, y, here, out);
}

// The number of items of a segment, and one of them.
template <class T>
struct MmaItems {
  static __device__ __forceinline__ int count(const ExpandArgs& args, const Segment& segment) {
    return num_passes<kMmaTokens>(segment) * count_tiles(args, segment, kMmaTile);
  }

  static __device__ __forceinline__ void add(const ExpandArgs& args, const Segment& segment,
                                             int item, Halves& halves) {
    const int tokens = num_passes<kMmaTokens>(segment), token = item % tokens * kMmaTokens;
    const int offset = threadIdx.x / 32 * 64 + threadIdx.x % 32 / 4 * kMmaColumns;
    const Piece piece = piece_of<T>(args, segment, item / tokens, kMmaTile, offset);
    expand_item<T>(args, piece, segment.first + token, min(segment.count - token, kMmaTokens),
                   halves);
  }
};

}  // namespace lorax::cuda
