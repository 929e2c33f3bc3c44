// Own rows of an adapter: rows of an embedding by token id, and logits of rows of a head.
#include "chain.cuh"
#include "lora_device.cuh"
#include "pack.h"

namespace lorax::cuda {
namespace {

constexpr int kOwnThreads = 256;
constexpr int kWarps = kOwnThreads / 32;
constexpr int kRows = 4;    // of a warp at a time
constexpr int kTokens = 8;  // of a pass over the rows

// The own rows of an adapter.
struct Own {
  int count;  // rows
  int vocab;  // the adapter's
  const int32_t* ids;
  const char* rows;
};

// Those of a record; false if it has none.
__device__ __forceinline__ bool find_own(const LoraSegments& segments, const int32_t* words,
                                         Own& own) {
  if (!words || !(uint32_t(words[4]) >> 16 & kFlagOwnRows)) return false;
  const char* header = arena_at(segments, uint32_t(words[kWordOwn]));
  own.count = reinterpret_cast<const int32_t*>(header)[0];
  own.vocab = reinterpret_cast<const int32_t*>(header)[1];
  own.ids = reinterpret_cast<const int32_t*>(header + kLoraAlign);
  own.rows = header + kLoraAlign + row_bytes(own.count, int(sizeof(int32_t)));
  return true;
}

// The first of the rising ids that is not below `id`.
__device__ __forceinline__ int lower_bound(const int32_t* ids, int count, int64_t id) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ids[middle] < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Grid: tokens modulo its width. Threads walk the columns of a row.
template <class T, int N>
__global__ void __launch_bounds__(kOwnThreads) own_rows(const OwnRowsArgs args) {
  allow_next();
  if (blockIdx.x == 0) wait_for_previous();
  for (int64_t i = blockIdx.x; i < args.segments.tokens; i += gridDim.x) {  // over tokens
    Own own;
    if (!find_own(args.segments, record_of_token(args.segments, i), own)) continue;
    wait_for_previous();
    const int at = lower_bound(own.ids, own.count, args.ids[i]);
    if (at == own.count || own.ids[at] != args.ids[i]) continue;
    const T* row = reinterpret_cast<const T*>(own.rows + at * row_bytes(args.hidden, sizeof(T)));
    T* y = static_cast<T*>(args.y) + i * args.y_stride;
    for (int64_t c = threadIdx.x * N; c < args.hidden; c += kOwnThreads * N)
      store_pack<N>(y + c, load_pack<N>(row + c));
  }
}

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
  return value;
}

// The logits of kRows rows for the tokens of a pass. A sum is that of a lane's packs in rising
// order, then over lanes, whatever the pass holds.
template <class T, int N>
__device__ __forceinline__ void logits_of(const OwnLogitsArgs& args, const Own& own, int row,
                                          int64_t token, int tokens) {
  const int lane = threadIdx.x % 32, rows = min(kRows, own.count - row);
  const int64_t stride = row_bytes(args.hidden, int(sizeof(T)));
  const T* x = static_cast<const T*>(args.x) + token * args.x_stride;
  float sums[kRows][kTokens] = {};
  for (int64_t k = lane * N; k < args.hidden; k += 32 * N) {
    Pack<T, N> weights[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const char* at = own.rows + (row + min(r, rows - 1)) * stride;
      weights[r] = load_pack<N>(reinterpret_cast<const T*>(at) + k);
    }
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (m >= tokens) break;
      const Pack<T, N> values = load_pack<N>(x + m * args.x_stride + k);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < N; ++c)
          sums[r][m] = fmaf(widen(values.v[c]), widen(weights[r].v[c]), sums[r][m]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      const float sum = sum_over_warp(sums[r][m]);
      const int id = own.ids[row + min(r, rows - 1)];
      if (lane == 0 && r < rows && m < tokens && id >= 0 && id < args.columns)
        static_cast<T*>(args.y)[(token + m) * args.y_stride + id] = narrow<T>(sum);
    }
  }
}

// The logits of the tokens [first, end), which use one adapter; CTAs share the rows.
template <class T, int N>
__device__ __forceinline__ void logits_of_segment(const OwnLogitsArgs& args, const Own& own,
                                                  int64_t first, int64_t end) {
  const int warp = threadIdx.x / 32;
  for (int64_t token = first; token < end; token += kTokens) {  // over passes
    const int tokens = int(min(int64_t(kTokens), end - token));
    for (int row = (blockIdx.x * kWarps + warp) * kRows; row < own.count;
         row += gridDim.x * kWarps * kRows)
      logits_of<T, N>(args, own, row, token, tokens);
  }
  const int64_t columns = args.columns - own.vocab;
  for (int64_t i = first + blockIdx.x; i < end; i += gridDim.x) {  // over tokens
    T* y = static_cast<T*>(args.y) + i * args.y_stride + own.vocab;
    for (int64_t c = threadIdx.x; c < columns; c += kOwnThreads) y[c] = narrow<T>(-INFINITY);
  }
}

// Grid: tiles of kWarps * kRows rows modulo its width. A page of kOwnThreads segments is searched at
// a time, a segment a thread.
template <class T, int N>
__global__ void __launch_bounds__(kOwnThreads) own_logits(const OwnLogitsArgs args) {
  __shared__ int found[kOwnThreads];
  __shared__ int count;
  allow_next();
  if (blockIdx.x == 0) wait_for_previous();
  const LoraSegments& segments = args.segments;
  for (int page = 0; page < segments.count; page += kOwnThreads) {
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    const int s = page + threadIdx.x;
    Own own;
    if (s < segments.count && segments.starts[s] < segments.starts[s + 1] &&
        find_own(segments, record_of_token(segments, segments.starts[s]), own))
      found[atomicAdd(&count, 1)] = s;
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const int64_t first = segments.starts[found[i]];
      const int64_t end = min(int64_t(segments.starts[found[i] + 1]), segments.tokens);
      find_own(segments, record_of_token(segments, first), own);
      wait_for_previous();
      logits_of_segment<T, N>(args, own, first, end);
    }
    __syncthreads();
  }
}

}  // namespace

void lora_own_rows(const OwnRowsArgs& args, cudaStream_t stream) {
  if (args.segments.count == 0 || args.segments.tokens == 0 || args.hidden == 0) return;
  const int64_t tokens = args.segments.tokens;
  const dim3 grid(unsigned(tokens < 1024 ? tokens : 1024));
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kN = kPack<T>;
    if (args.hidden % kN == 0 && fits_packs(args.y, args.y_stride, kN)) {
      launch_chained(own_rows<T, kN>, grid, kOwnThreads, 0, stream, args);
    } else {
      launch_chained(own_rows<T, 1>, grid, kOwnThreads, 0, stream, args);
    }
  });
}

void lora_own_logits(const OwnLogitsArgs& args, cudaStream_t stream) {
  if (args.segments.count == 0 || args.segments.tokens == 0) return;
  const dim3 grid(unsigned(4 * multiprocessors()));
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kN = kPack<T>;
    if (args.hidden % kN == 0 && fits_packs(args.x, args.x_stride, kN)) {
      launch_chained(own_logits<T, kN>, grid, kOwnThreads, 0, stream, args);
    } else {
      launch_chained(own_logits<T, 1>, grid, kOwnThreads, 0, stream, args);
    }
  });
}

}  // namespace lorax::cuda
