// Expand of few tokens: a thread multiplies its columns of B by each token's t.
//
// A thread of a segment of one token has 16 bytes of every row of B, 8 columns of 16 bits or 4 of
// 32, and an item of work is those of all threads in one target; of a longer segment it is 4
// columns a thread and 8 tokens, so that few segments still fill the GPU. An element is summed over
// ranks in ascending order whatever the tile, so a token's y is the same in every batch.
#pragma once

#include "chain.cuh"
#include "lora_expand.cuh"

namespace lorax::cuda {

constexpr int kFmaRanks = 256;  // whose t lie in shared memory at a time
constexpr int kFmaTokens = 8;   // of an item, at most
using FmaSums = float[kFmaRanks][kFmaTokens];

// Adds the tokens [first, first + count) of at most kTokens. The loop walks the ranks, kUnroll rows
// of B in flight at a time. What no kernel writes comes first, then y and t.
template <class T, int kColumns, int kTokens, int kUnroll>
__device__ __forceinline__ void expand_tokens(const ExpandArgs& args, const Piece& piece, int first,
                                              int count, FmaSums& sums) {
  using Columns = Pack<T, kColumns>;
  static_assert(sizeof(Columns) <= kLoraAlign, "more than what a row of B is padded to");
  float out[kTokens][kColumns] = {};
  const int64_t part = args.segments.tokens * args.width;
  T* const y = static_cast<T*>(args.y) + first * args.y_stride + piece.column;
  const bool whole =
      piece.left >= kColumns && fits_packs(y, args.y_stride, kColumns, alignof(Columns));
  for (int rank0 = 0; rank0 < piece.rank; rank0 += kFmaRanks) {  // over chunks of ranks
    const int ranks = min(piece.rank - rank0, kFmaRanks);
    const int rounded = (ranks + kUnroll - 1) / kUnroll * kUnroll;
    const char* b = piece.b + int64_t(rank0) * piece.stride;
    Columns rows[kUnroll];
    const auto load = [&](int r0) {  // a row is padded to 16 bytes
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        rows[u] = {};
        if (r0 + u < ranks && piece.left > 0)
          rows[u] =
              load_pack<kColumns>(reinterpret_cast<const T*>(b + int64_t(r0 + u) * piece.stride));
      }
    };
    load(0);
    wait_for_previous();
    if (rank0 == 0) {
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        const T* from = y + token * args.y_stride;
        if (token >= count) continue;
        if (whole) {
          const Columns old = load_pack<kColumns>(from);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) out[token][c] = widen(old.v[c]);
        } else {
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            if (c < piece.left) out[token][c] = widen(from[c]);
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rounded * kTokens; i += kExpandThreads) {
      const int token = i / rounded, r = i % rounded;
      float sum = 0.0f;
      if (token < count && r < ranks) {
        const float* t = args.t + (first + token) * args.width + piece.row + rank0 + r;
#pragma unroll 4
        for (int64_t p = 0; p < args.parts; ++p) sum += __ldcg(t + p * part);  // over parts
      }
      sums[r][token] = piece.scale * sum;
    }
    __syncthreads();
    for (int r0 = 0; r0 < ranks; r0 += kUnroll) {  // over ranks
      if (r0 > 0) load(r0);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float row[kColumns];
        unpack(rows[u], row);
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
          const float weight = sums[r0 + u][token];
#pragma unroll
          for (int c = 0; c < kColumns; ++c) out[token][c] = fmaf(weight, row[c], out[token][c]);
        }
      }
    }
  }
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    if (token >= count || piece.left <= 0) break;
    T* const to = y + token * args.y_stride;
    Columns sum;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum.v[c] = narrow<T>(out[token][c]);
    if (whole) {
      store_pack<kColumns>(to, sum);
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (c < piece.left) to[c] = sum.v[c];
    }
  }
}

// The number of items of a segment, and one of them.
template <class T>
struct FmaItems {
  static constexpr int kUnroll = 32 / int(sizeof(T));         // rows of B in flight
  static constexpr int kAlone = kLoraAlign / int(sizeof(T));  // columns of a thread, of one token

  static __device__ __forceinline__ int count(const ExpandArgs& args, const Segment& segment) {
    return num_passes<kFmaTokens>(segment) *
           count_tiles(args, segment, kExpandThreads * (segment.count == 1 ? kAlone : 4));
  }

  static __device__ __forceinline__ void add(const ExpandArgs& args, const Segment& segment,
                                             int item, FmaSums& sums) {
    if (segment.count == 1) {
      const Piece piece =
          piece_of<T>(args, segment, item, kExpandThreads * kAlone, threadIdx.x * kAlone);
      return expand_tokens<T, kAlone, 1, kUnroll>(args, piece, segment.first, 1, sums);
    }
    const int tokens = num_passes<kFmaTokens>(segment), token = item % tokens * kFmaTokens;
    const Piece piece =
        piece_of<T>(args, segment, item / tokens, kExpandThreads * 4, threadIdx.x * 4);
    expand_tokens<T, 4, kFmaTokens, kUnroll>(args, piece, segment.first + token,
                                             min(segment.count - token, kFmaTokens), sums);
  }
};

}  // namespace lorax::cuda
