// Query rows of prompts on tensor cores: a warp owns 16 of them, a lane rows lane / 4 and
// lane / 4 + 8; and copies of many rows into its tiles.
#pragma once

#include "attention_mma.cuh"

namespace lorax::cuda {

// A warp starts the copies of kRows keys and values (lane i knows `row` of the i-th) into two
// tiles [kRows][kSize + 8]. The pad of 16 bytes keeps ldmatrix free of bank conflicts.
template <class T, int kSize, int kRows>
__device__ inline void copy_rows(const AttentionArgs& args, T* keys, T* values, long long row,
                                 int lane) {
  constexpr int kChunks = kSize / 8;  // 16 bytes each
  static_assert(kRows <= 32 && kRows * kChunks % 32 == 0);
  const T* kv = static_cast<const T*>(args.kv);
#pragma unroll 4
  for (int i = 0; i < kRows * kChunks / 32; ++i) {  // over rows, then chunks of the head size
    const int r = (i * 32 + lane) / kChunks, d = (i * 32 + lane) % kChunks * 8;
    const long long at = __shfl_sync(kFullMask, row, r);
    const bool valid = at >= 0 && d < args.size;
    const T* from = valid ? kv + at + d : kv;
    copy_async(keys + r * (kSize + 8) + d, from, valid);
    copy_async(values + r * (kSize + 8) + d, valid ? from + args.value_stride : kv, valid);
  }
}

// The same for one tile [kRows][kSize + 8] and rows of any tensor; `size` elements of a row are
// there.
template <class T, int kSize, int kRows>
__device__ inline void copy_tile(const T* tensor, T* to, long long row, int size, int lane) {
  constexpr int kChunks = kSize / 8;  // 16 bytes each
  static_assert(kRows <= 32 && kRows * kChunks % 32 == 0);
#pragma unroll 4
  for (int i = 0; i < kRows * kChunks / 32; ++i) {  // over rows, then chunks of the head size
    const int r = (i * 32 + lane) / kChunks, d = (i * 32 + lane) % kChunks * 8;
    const long long at = __shfl_sync(kFullMask, row, r);
    const bool valid = at >= 0 && d < size;
    copy_async(to + r * (kSize + 8) + d, valid ? tensor + at + d : tensor, valid);
  }
}

// State of 16 query rows in a warp: weighted values, maximum (times log2 e) and sum of weights.
// The sum is the lane's own share until finish().
template <class T, int kSize>
struct Rows {
  static constexpr bool kKeepQ = keeps_queries(kSize);  // else they are read again for every tile
  float o[kSize / 8][4];
  float m[2], l[2];
  uint32_t q[kKeepQ ? kSize / 16 : 1][4];

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < kSize / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[j][i] = 0.f;
    m[0] = m[1] = -INFINITY;
    l[0] = l[1] = 0.f;
  }

  // queries: this warp's tile [16][kSize + 8] in shared memory.
  __device__ void load_queries(const T* queries, int lane) {
    if constexpr (kKeepQ) {
#pragma unroll
      for (int k = 0; k < kSize / 16; ++k)
        load_matrices(q[k], queries + (lane % 16) * (kSize + 8) + k * 16 + lane / 16 * 8);
    }
  }

  // s = queries @ keys, unscaled. queries: as above; keys: a tile [kKeys][kSize + 8].
  template <int kKeys>
  __device__ void multiply(float (&s)[kKeys / 8][4], const T* queries, const T* keys, int lane) {
    constexpr int kStride = kSize + 8;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = 0.f;
#pragma unroll
    for (int k = 0; k < kSize / 16; ++k) {  // over the head size, 16 at a time
      uint32_t a[4];
      if constexpr (kKeepQ) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = q[k][i];
      } else {
        load_matrices(a, queries + (lane % 16) * kStride + k * 16 + lane / 16 * 8);
      }
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {  // over positions, 16 at a time
        uint32_t b[4];
        load_matrices(
            b, keys + (j * 16 + lane / 16 * 8 + lane % 8) * kStride + k * 16 + lane / 8 % 2 * 8);
        Half2<T>::mma(s[2 * j], a, b[0], b[1]);
        Half2<T>::mma(s[2 * j + 1], a, b[2], b[3]);
      }
    }
  }

  // o += s @ values, a tile [kKeys][kSize + 8].
  template <int kKeys>
  __device__ void add_values(const float (&s)[kKeys / 8][4], const T* values, int lane) {
    constexpr int kStride = kSize + 8;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {  // over positions, 16 at a time
      const uint32_t a[4] = {Half2<T>::pack(s[2 * k][0], s[2 * k][1]),
                             Half2<T>::pack(s[2 * k][2], s[2 * k][3]),
                             Half2<T>::pack(s[2 * k + 1][0], s[2 * k + 1][1]),
                             Half2<T>::pack(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
      for (int j = 0; j < kSize / 16; ++j) {  // over the head size, 16 at a time
        uint32_t b[4];
        load_matrices_transposed(b,
                                 values + (k * 16 + lane % 16) * kStride + j * 16 + lane / 16 * 8);
        Half2<T>::mma(o[2 * j], a, b[0], b[1]);
        Half2<T>::mma(o[2 * j + 1], a, b[2], b[3]);
      }
    }
  }

  // Adds up the sums of the four lanes of a row.
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += __shfl_xor_sync(kFullMask, l[i], 1);
      l[i] += __shfl_xor_sync(kFullMask, l[i], 2);
    }
  }
};

}  // namespace lorax::cuda
