// t[p, i, :r] = x[i, chunk p] @ A[:r, chunk p].T of the adapter of token i.
//
// An item of work is 8 tokens of a segment (32 in steps of many tokens), one chunk of 4096 of K and
// 16 ranks. Each part of t is stored and never added to, and how an element is summed depends on K
// alone, so a token's t is the same in every batch.
#include "chain.cuh"
#include "lora_device.cuh"
#include "mma.cuh"

namespace lorax::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpK = kLoraChunk / kWarps;  // 512
constexpr int kStepK = 32;                   // 16 bytes for each of 4 threads
constexpr int kRankTile = 16;                // M of the mma
constexpr int kTokenTile = 8;                // N of the mma

__device__ __forceinline__ uint4 load_cached(const void* p) {
  return __ldg(static_cast<const uint4*>(p));
}

// For an A that the CTA reads once: keep it out of L1.
__device__ __forceinline__ uint4 load_no_allocate(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// The first `count` of eight 16-bit elements, zero in place of the others.
__device__ __forceinline__ uint4 zero_tail(uint4 v, int count) {
  if (count >= 8) return v;
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = 2 * i + 1 < count ? words[i] : 2 * i < count ? words[i] & 0xffffu : 0u;
  }
  return {words[0], words[1], words[2], words[3]};
}

// Eight elements of x, of which the first `left` exist; from L2, since another kernel wrote them.
// kVector: all or none.
template <bool kVector>
__device__ __forceinline__ uint4 load_x(const uint16_t* x, int left) {
  uint4 v = {0, 0, 0, 0};
  if constexpr (kVector) {
    if (left > 0) v = __ldcg(reinterpret_cast<const uint4*>(x));
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = 2 * i < left ? __ldcg(x + 2 * i) : 0;
      const uint32_t high = 2 * i + 1 < left ? __ldcg(x + 2 * i + 1) : 0;
      words[i] = low | high << 16;
    }
    v = {words[0], words[1], words[2], words[3]};
  }
  return v;
}

// Stacked ranks of a segment, those that t has room for.
__device__ __forceinline__ int rank_of(const ShrinkArgs& args, const Segment& segment) {
  const int stacked = segment.ranks[0] + segment.ranks[1] + segment.ranks[2];
  return stacked < args.width ? stacked : int(args.width);
}

// 16 bits: tiles of 16 ranks by 8 tokens. Each of 8 warps sums its 512 of the chunk's 4096 of K,
// then the eight sums are added in order. The k of an mma are permuted alike for A and x: a
// thread's 16 contiguous bytes are its k of two consecutive mmas. The fewer the tokens of an item,
// the more steps of A may be in flight.
template <class T, bool kVectorX, int kTokens, int kSteps>
__global__ void __launch_bounds__(kThreads, kVectorX ? 2 : 1)
    shrink_mma(const ShrinkArgs args, int parts) {
  constexpr int kBatchK = kSteps * kStepK, kGroups = kTokens / kTokenTile;
  __shared__ float sums[kWarps][kTokens][kRankTile + 4];  // a row of 20 keeps the banks apart
  __shared__ WorkList list;
  allow_next();
  const int items = count_work(args.segments, list, [&](const Segment& segment) {
    return (rank_of(args, segment) + kRankTile - 1) / kRankTile * parts *
           num_passes<kTokens>(segment);
  });
  bool waited = args.overlap;
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  const int64_t stride = row_bytes(args.k, 2);
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int index = find_work(list, item), local = item - list.first[index];
    const Segment& segment = list.segments[index];
    const int tokens = num_passes<kTokens>(segment), token0 = local % tokens * kTokens;
    const int part = local / tokens % parts, rank0 = local / tokens / parts * kRankTile;
    const int rank = rank_of(args, segment);
    const int64_t k0 = int64_t(part) * kLoraChunk + warp * kWarpK + quad * 8;
    const int have = int(args.k - k0);  // of K, from the thread's first on
    const char* a = arena_at(args.segments, segment.a) + (rank0 + row) * stride + k0 * 2;
    const uint16_t* x =
        static_cast<const uint16_t*>(args.x) + (segment.first + token0 + row) * args.x_stride + k0;
    const int count = min(segment.count - token0, kTokens);
    float even[kGroups][4] = {}, odd[kGroups][4] = {};
#pragma unroll 1
    for (int batch = 0; batch < kWarpK / kBatchK; ++batch) {  // over the warp's part of K
      uint4 as[kSteps][2];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {  // two rows of each: so many loads in flight
        const int k = batch * kBatchK + step * kStepK;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          as[step][half] = {0, 0, 0, 0};
          if (rank0 + row + half * 8 < rank && k < have)
            as[step][half] = tokens > 1 ? load_cached(a + half * 8 * stride + k * 2)
                                        : load_no_allocate(a + half * 8 * stride + k * 2);
        }
      }
      if (!waited) wait_for_previous();
      waited = true;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {  // over tokens: 8 at a time
        if (group > 0 && group % 2 == 0) {
          if (group * kTokenTile >= count) break;
          asm volatile("" ::: "memory");  // loads of two groups in flight: the registers' limit
        }
#pragma unroll
        for (int step0 = 0; step0 < kSteps; step0 += 4) {
          uint4 xs[4];
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            const int k = batch * kBatchK + (step0 + step) * kStepK;
            const int left = group * kTokenTile + row < count ? have - k : 0;
            xs[step] = load_x<kVectorX>(x + group * kTokenTile * args.x_stride + k, left);
          }
#pragma unroll
          for (int step = 0; step < 4; ++step) {  // over k: 32 at a time
            const int left = have - batch * kBatchK - (step0 + step) * kStepK;
            uint4 p = as[step0 + step][0], q = as[step0 + step][1];
            if (!kVectorX) p = zero_tail(p, left), q = zero_tail(q, left);
            const uint4 v = xs[step];
            Half2<T>::mma(even[group], {p.x, q.x, p.y, q.y}, v.x, v.y);
            Half2<T>::mma(odd[group], {p.z, q.z, p.w, q.w}, v.z, v.w);
          }
        }
      }
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[warp][group * kTokenTile + quad * 2 + i % 2][row + i / 2 * 8] =
            even[group][i] + odd[group][i];
    __syncthreads();
    const int64_t first = int64_t(part) * args.segments.tokens + segment.first + token0;
    for (int i = threadIdx.x; i < count * kRankTile; i += kThreads) {
      const int token = i / kRankTile, r = i % kRankTile;
      float sum = sums[0][token][r];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum += sums[w][token][r];
      if (rank0 + r < rank) args.t[(first + token) * args.width + rank0 + r] = sum;
    }
    __syncthreads();
  }
  if (blockIdx.x == 0) wait_for_previous();
}

// Up to four floats at `p`, of which the first `left` exist.
__device__ __forceinline__ float4 load_floats(const float* p, int64_t left, bool vector) {
  if (left >= 4 && vector) return __ldg(reinterpret_cast<const float4*>(p));
  float4 v;
  v.x = left > 0 ? __ldg(p) : 0.0f;
  v.y = left > 1 ? __ldg(p + 1) : 0.0f;
  v.z = left > 2 ? __ldg(p + 2) : 0.0f;
  v.w = left > 3 ? __ldg(p + 3) : 0.0f;
  return v;
}

// float32: tiles of 16 ranks by 8 tokens. Each of 8 warps takes every eighth of the ranks and the
// whole chunk, four floats per lane and 128; its lanes are added by shuffles.
__global__ void __launch_bounds__(kThreads)
    shrink_fma(const ShrinkArgs args, int parts, bool vector_x) {
  __shared__ WorkList list;
  allow_next();
  const int items = count_work(args.segments, list, [&](const Segment& segment) {
    return (rank_of(args, segment) + kRankTile - 1) / kRankTile * parts *
           num_passes<kTokenTile>(segment);
  });
  wait_for_previous();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t stride = row_bytes(args.k, 4) / 4;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int index = find_work(list, item), local = item - list.first[index];
    const Segment& segment = list.segments[index];
    const int tokens = num_passes<kTokenTile>(segment), token0 = local % tokens * kTokenTile;
    const int part = local / tokens % parts, rank0 = local / tokens / parts * kRankTile;
    const int rank = min(rank_of(args, segment), rank0 + kRankTile);
    const int count = min(segment.count - token0, kTokenTile);
    const int64_t k0 = int64_t(part) * kLoraChunk + lane * 4;
    const int64_t end = min(args.k, int64_t(part + 1) * kLoraChunk);
    const float* a = reinterpret_cast<const float*>(arena_at(args.segments, segment.a));
    const int first = segment.first + token0;
    const float* x = static_cast<const float*>(args.x) + first * args.x_stride;
    float* t = args.t + (int64_t(part) * args.segments.tokens + first) * args.width;
    for (int r = rank0 + warp; r < rank; r += kWarps) {  // over ranks
      for (int token = 0; token < count; ++token) {      // over tokens
        float sum = 0.0f;
#pragma unroll 4
        for (int64_t k = k0; k < end; k += 128) {  // over the chunk
          const float4 u = load_floats(a + r * stride + k, args.k - k, true);
          const float4 v = load_floats(x + token * args.x_stride + k, args.k - k, vector_x);
          sum = fmaf(u.x, v.x, sum);
          sum = fmaf(u.y, v.y, sum);
          sum = fmaf(u.z, v.z, sum);
          sum = fmaf(u.w, v.w, sum);
        }
#pragma unroll
        for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        if (lane == 0) t[token * args.width + r] = sum;
      }
    }
  }
}

template <class T, bool kVectorX>
void launch_mma(const ShrinkArgs& args, dim3 grid, int parts, cudaStream_t stream) {
  if (args.segments.tokens <= kLoraFewTokens)
    launch_chained(shrink_mma<T, kVectorX, kTokenTile, 8>, grid, kThreads, 0, stream, args, parts);
  else
    launch_chained(shrink_mma<T, kVectorX, 32, 4>, grid, kThreads, 0, stream, args, parts);
}

template <class T>
void launch_mma(const ShrinkArgs& args, dim3 grid, int parts, bool vector_x, cudaStream_t stream) {
  if (vector_x)
    launch_mma<T, true>(args, grid, parts, stream);
  else
    launch_mma<T, false>(args, grid, parts, stream);
}

}  // namespace

void lora_shrink(const ShrinkArgs& args, cudaStream_t stream) {
  if (args.segments.count == 0 || args.segments.tokens == 0 || args.width == 0) return;
  const int parts = int(shrink_parts(args.k));
  const int64_t tiles = (args.width + kRankTile - 1) / kRankTile;
  const dim3 grid = work_grid(args.segments, max_passes(args.segments, kTokenTile) * tiles * parts,
                              2 * multiprocessors());
  const int size = args.dtype == DType::float32 ? 4 : 2;
  const bool vector_x = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
                        args.x_stride * size % 16 == 0 && args.k * size % 16 == 0;
  if (args.dtype == DType::float32)
    launch_chained(shrink_fma, grid, kThreads, 0, stream, args, parts, vector_x);
  else if (args.dtype == DType::bfloat16)
    launch_mma<__nv_bfloat16>(args, grid, parts, vector_x, stream);
  else
    launch_mma<__half>(args, grid, parts, vector_x, stream);
}

}  // namespace lorax::cuda
