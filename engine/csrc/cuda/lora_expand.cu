// y[i, columns of target] += scale * sum over parts(t)[i, ranks of target] @ B of the target; and
// the shrink of an embedding, which gathers rows of A.
//
// A CTA is 1024 columns of one target of one segment; a thread owns 8 of them. An element is summed
// over ranks in ascending order whatever the tile, so a token's y is the same in every batch.
#include "lora_device.cuh"

namespace lorax::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 8;  // of a thread
constexpr int kTile = kThreads * kColumns;
constexpr int kRankChunk = 256;  // ranks whose t lie in shared memory at a time
constexpr int kMaxTokens = 8;    // of a pass

// Eight columns of a row of B.
template <class T>
struct Row {
  static constexpr int kVectors = kColumns * int(sizeof(T)) / 16;
  static constexpr int kPerVector = kColumns / kVectors;
  uint4 v[kVectors];

  // The row at `p`, of which `left` columns exist; its padding reaches to 16 bytes.
  __device__ __forceinline__ void load(const char* p, int64_t left) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      v[i] = {0, 0, 0, 0};
      if (i * kPerVector < left) v[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
    }
  }

  __device__ __forceinline__ void unpack(float (&out)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const T* elements = reinterpret_cast<const T*>(&v[i]);
#pragma unroll
      for (int j = 0; j < kPerVector; ++j) out[i * kPerVector + j] = to_float(elements[j]);
    }
  }
};

// The piece of a target that a CTA works on.
struct Piece {
  const char* b;   // at the thread's first column
  int64_t stride;  // bytes from a row of B to the next
  int64_t left;    // columns of the target from the thread's first on; <= 0: none
  int64_t column;  // of y: the thread's first
  int rank, row;   // of the target: how many, and the first in t
  float scale;
};

// Adds the tokens [first, first + count) of at most kTokens. The loop walks the ranks, kUnroll rows
// of B at a time, with the next kUnroll in flight.
template <class T, int kTokens, int kUnroll>
__device__ __forceinline__ void expand_tokens(const ExpandArgs& args, const Piece& piece, int first,
                                              int count, float (*sums)[kMaxTokens]) {
  float out[kTokens][kColumns] = {};
  const int64_t part = args.segments.tokens * args.width;
  for (int rank0 = 0; rank0 < piece.rank; rank0 += kRankChunk) {  // over chunks of ranks
    const int ranks = piece.rank - rank0 < kRankChunk ? piece.rank - rank0 : kRankChunk;
    const int rounded = (ranks + kUnroll - 1) / kUnroll * kUnroll;
    const char* b = piece.b + rank0 * piece.stride;
    Row<T> next[kUnroll];
    const auto load = [&](int r0) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        next[u].load(b + (r0 + u) * piece.stride, r0 + u < ranks ? piece.left : 0);
      }
    };
    load(0);  // before t: its latency hides in this one's
    __syncthreads();
    for (int i = threadIdx.x; i < rounded * kTokens; i += kThreads) {
      const int token = i / rounded, r = i % rounded;
      float sum = 0.0f;
      if (token < count && r < ranks) {
        const float* t = args.t + (first + token) * args.width + piece.row + rank0 + r;
#pragma unroll 8
        for (int64_t p = 0; p < args.parts; ++p) sum += __ldg(t + p * part);  // over parts
      }
      sums[r][token] = sum;
    }
    __syncthreads();
    for (int r0 = 0; r0 < ranks; r0 += kUnroll) {  // over ranks
      Row<T> current[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) current[u] = next[u];
      if (r0 + kUnroll < ranks) load(r0 + kUnroll);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float row[kColumns];
        current[u].unpack(row);
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
          const float weight = sums[r0 + u][token];
#pragma unroll
          for (int c = 0; c < kColumns; ++c) out[token][c] = fmaf(weight, row[c], out[token][c]);
        }
      }
    }
  }
  if (piece.left <= 0) return;
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    if (token >= count) break;
    T* y = static_cast<T*>(args.y) + (first + token) * args.y_stride + piece.column;
    if (piece.left >= kColumns && reinterpret_cast<uintptr_t>(y) % 16 == 0) {
      Row<T> old;
#pragma unroll
      for (int i = 0; i < Row<T>::kVectors; ++i) old.v[i] = reinterpret_cast<const uint4*>(y)[i];
      float values[kColumns];
      old.unpack(values);
#pragma unroll
      for (int i = 0; i < Row<T>::kVectors; ++i) {
        T* elements = reinterpret_cast<T*>(&old.v[i]);
#pragma unroll
        for (int j = 0; j < Row<T>::kPerVector; ++j) {
          const int c = i * Row<T>::kPerVector + j;
          elements[j] = from_float<T>(fmaf(piece.scale, out[token][c], values[c]));
        }
        reinterpret_cast<uint4*>(y)[i] = old.v[i];
      }
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c < piece.left) {
          y[c] = from_float<T>(fmaf(piece.scale, out[token][c], to_float(y[c])));
        }
      }
    }
  }
}

// Grid: column tiles of all targets, segments. The loop walks the tokens, up to 8 at a time.
template <class T>
__global__ void __launch_bounds__(kThreads) expand(const ExpandArgs args) {
  __shared__ __align__(16) float sums[kRankChunk][kMaxTokens];
  Segment segment;
  if (!find_segment(args.segments, blockIdx.y, segment)) return;
  const char* b = arena_at(args.segments, segment.b);
  Piece piece{};
  int tile = blockIdx.x;
  int64_t column = 0;
  int row = 0;
#pragma unroll
  for (int target = 0; target < kLoraTargets; ++target) {
    const int64_t n = args.splits[target];
    const int tiles = int((n + kTile - 1) / kTile);
    const int64_t stride = row_bytes(n, int(sizeof(T)));
    if (tile >= 0 && tile < tiles) {
      const int64_t c = int64_t(tile) * kTile + threadIdx.x * kColumns;
      piece = {b + c * int(sizeof(T)), stride, n - c, column + c, segment.ranks[target], row,
               segment.scales[target]};
    }
    tile -= tiles;
    b += segment.ranks[target] * stride;
    column += n;
    row += segment.ranks[target];
  }
  if (piece.rank == 0 || piece.row + piece.rank > args.width) return;
  constexpr int kMore = sizeof(T) == 4 ? 2 : 1;  // a row of float32 takes twice the registers
  if (segment.count <= 2) {
    expand_tokens<T, 2, 8 / kMore>(args, piece, segment.first, segment.count, sums);
    return;
  }
  for (int token = 0; token < segment.count; token += kMaxTokens) {  // over tokens
    const int left = segment.count - token;
    expand_tokens<T, kMaxTokens, 4 / kMore>(args, piece, segment.first + token,
                                            left < kMaxTokens ? left : kMaxTokens, sums);
  }
}

template <class T>
void launch_expand(const ExpandArgs& args, cudaStream_t stream) {
  int64_t tiles = 0;
  for (int64_t n : args.splits) tiles += (n + kTile - 1) / kTile;
  if (tiles == 0) return;
  const dim3 grid(uint32_t(tiles), uint32_t(args.segments.count));
  expand<T><<<grid, kThreads, 0, stream>>>(args);
}

// Grid: tokens modulo its width, segments. Threads walk the ranks.
template <class T>
__global__ void __launch_bounds__(kThreads) gather(const GatherArgs args) {
  Segment segment;
  if (!find_segment(args.segments, blockIdx.y, segment)) return;
  const int rank = segment.ranks[0] < args.width ? segment.ranks[0] : int(args.width);
  const int64_t stride = row_bytes(segment.ranks[0], int(sizeof(T)));
  const int64_t begin = int64_t(segment.a) * kLoraAlign;
  for (int i = blockIdx.x; i < segment.count; i += gridDim.x) {  // over tokens
    const int64_t id = args.ids[segment.first + i];
    const bool inside = id >= 0 && id < (args.segments.arena_bytes - begin) / stride;
    const T* row = reinterpret_cast<const T*>(static_cast<const char*>(args.segments.arena) +
                                              begin + (inside ? id : 0) * stride);
    float* t = args.t + (segment.first + i) * args.width;
    for (int r = threadIdx.x; r < rank; r += kThreads) t[r] = inside ? to_float(row[r]) : 0.0f;
  }
}

}  // namespace

void lora_expand(const ExpandArgs& args, cudaStream_t stream) {
  if (args.segments.count == 0 || args.segments.tokens == 0 || args.width == 0) return;
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
      gather<float><<<grid, kThreads, 0, stream>>>(args);
      break;
    case DType::bfloat16:
      gather<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(args);
      break;
    case DType::float16:
      gather<__half><<<grid, kThreads, 0, stream>>>(args);
      break;
  }
}

}  // namespace lorax::cuda
