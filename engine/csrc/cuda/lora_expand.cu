// y[i, columns of target] += scale * sum over parts(t)[i, ranks of target] @ B of the target; and
// the shrink of an embedding, which gathers rows of A.
//
// An item of work is 1024 columns of one target of a segment of one token, 8 of a thread; or half
// of that and 8 tokens of a longer one, so that few segments still fill the GPU. An element is
// summed over ranks in ascending order whatever the tile, so a token's y is the same in every
// batch.
#include "chain.cuh"
#include "lora_expand.cuh"
#include "pack.h"

namespace lorax::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRankChunk = 256;  // ranks whose t lie in shared memory at a time
constexpr int kMaxTokens = 8;    // of a pass

// Adds the tokens [first, first + count) of at most kTokens. The loop walks the ranks, kUnroll rows
// of B in flight at a time. What no kernel writes comes first, then y and t.
template <class T, int kColumns, int kTokens, int kUnroll>
__device__ __forceinline__ void expand_tokens(const ExpandArgs& args, const Piece& piece, int first,
                                              int count, float (*sums)[kMaxTokens]) {
  using Columns = Pack<T, kColumns>;
  float out[kTokens][kColumns] = {};
  const int64_t part = args.segments.tokens * args.width;
  T* const y = static_cast<T*>(args.y) + first * args.y_stride + piece.column;
  const bool whole =
      piece.left >= kColumns && fits_packs(y, args.y_stride, kColumns, alignof(Columns));
  for (int rank0 = 0; rank0 < piece.rank; rank0 += kRankChunk) {  // over chunks of ranks
    const int ranks = min(piece.rank - rank0, kRankChunk);
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
    for (int i = threadIdx.x; i < rounded * kTokens; i += kThreads) {
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

template <class T>
__global__ void __launch_bounds__(kThreads, 4) expand(const ExpandArgs args) {
  __shared__ __align__(16) float sums[kRankChunk][kMaxTokens];
  __shared__ WorkList list;
  allow_next();
  const int items = count_work(args.segments, list, [&](const Segment& segment) {
    return passes<kMaxTokens>(segment) *
           count_tiles(args, segment, kThreads * (segment.count == 1 ? 8 : 4));
  });
  constexpr int kUnroll = 32 / int(sizeof(T));  // rows of B in flight
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int index = find_work(list, item), local = item - list.first[index];
    const Segment& segment = list.segments[index];
    if (!fits_width(args, segment)) continue;
    if (segment.count == 1) {
      const Piece piece = piece_of<T>(args, segment, local, kThreads * 8, threadIdx.x * 8);
      expand_tokens<T, 8, 1, kUnroll>(args, piece, segment.first, segment.count, sums);
      continue;
    }
    const int tokens = passes<kMaxTokens>(segment), token = local % tokens * kMaxTokens;
    const Piece piece = piece_of<T>(args, segment, local / tokens, kThreads * 4, threadIdx.x * 4);
    expand_tokens<T, 4, kMaxTokens, kUnroll>(args, piece, segment.first + token,
                                             min(segment.count - token, kMaxTokens), sums);
  }
  if (blockIdx.x == 0) wait_for_previous();
}

template <class T>
void launch_expand(const ExpandArgs& args, cudaStream_t stream) {
  int64_t tiles = 0;
  for (int64_t n : args.splits) tiles += ceil_div(n, kThreads * 4);
  if (tiles == 0) return;
  const dim3 grid = work_grid(args.segments, tiles * most_passes(args.segments, kMaxTokens),
                              4 * multiprocessors());
  launch_chained(expand<T>, grid, kThreads, 0, stream, args);
}

// Grid: tokens modulo its width, segments. Threads walk the ranks.
template <class T>
__global__ void __launch_bounds__(kThreads) gather(const GatherArgs args) {
  allow_next();
  Segment segment;
  if (!find_segment(args.segments, blockIdx.y, segment)) return wait_for_previous();
  wait_for_previous();
  const int rank = segment.ranks[0] < args.width ? segment.ranks[0] : int(args.width);
  const int64_t stride = row_bytes(segment.ranks[0], int(sizeof(T)));
  const int64_t begin = int64_t(segment.a) * kLoraAlign;
  for (int i = blockIdx.x; i < segment.count; i += gridDim.x) {  // over tokens
    const int64_t id = args.ids[segment.first + i];
    const bool inside = id >= 0 && id < (args.segments.arena_bytes - begin) / stride;
    const T* row = reinterpret_cast<const T*>(static_cast<const char*>(args.segments.arena) +
                                              begin + (inside ? id : 0) * stride);
    float* t = args.t + (segment.first + i) * args.width;
    for (int r = threadIdx.x; r < rank; r += kThreads) t[r] = inside ? widen(row[r]) : 0.0f;
  }
}

}  // namespace

void lora_expand(const ExpandArgs& args, cudaStream_t stream) {
  if (args.segments.count == 0 || args.segments.tokens == 0 || args.width == 0) return;
  if (expand_mma_takes(args)) return lora_expand_mma(args, stream);
  switch (args.dtype) {
    case DType::float32:
      return launch_expand<float>(args, stream);
    case DType::bfloat16:
      return launch_expand<__nv_bfloat16>(args, stream);
    case DType::float16:
      return launch_expand<__half>(args, stream);
  }
}

void lora_gather(const GatherArgs& args, cudaStream_t stream) {
  if (args.segments.count == 0 || args.segments.tokens == 0 || args.width == 0) return;
  const int64_t columns = args.segments.tokens < 64 ? args.segments.tokens : 64;
  const dim3 grid(uint32_t(columns), uint32_t(args.segments.count));
  switch (args.dtype) {
    case DType::float32:
      launch_chained(gather<float>, grid, kThreads, 0, stream, args);
      break;
    case DType::bfloat16:
      launch_chained(gather<__nv_bfloat16>, grid, kThreads, 0, stream, args);
      break;
    case DType::float16:
      launch_chained(gather<__half>, grid, kThreads, 0, stream, args);
      break;
  }
}

}  // namespace lorax::cuda
