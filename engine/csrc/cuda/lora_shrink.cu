// t[p, i, :r] = x[i, chunk p] @ A[:r, chunk p].T of the adapter of token i.
//
// A CTA is one chunk of 512 of K of one segment. Each part of t is stored and never added to, and
// how an element is summed depends on K alone, so a token's delta is the same in every batch.
#include "lora_device.cuh"

namespace lorax::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpK = kLoraChunk / kWarps;  // 128
constexpr int kSteps = kWarpK / 32;          // of 32 of K: 16 bytes for each of 4 threads
constexpr int kRankTile = 16;                // M of the mma
constexpr int kTokenTile = 8;                // N of the mma

// A is read once by a CTA: keep it out of L1.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// The first `count` of eight 16-bit elements, zero in place of the others.
__device__ __forceinline__ uint4 keep(uint4 v, int64_t count) {
  if (count >= 8) return v;
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = 2 * i + 1 < count ? words[i] : 2 * i < count ? words[i] & 0xffffu : 0u;
  }
  return {words[0], words[1], words[2], words[3]};
}

// Eight elements of x, of which the first `left` exist.
template <bool kVector>
__device__ __forceinline__ uint4 load_x(const uint16_t* x, int64_t left) {
  if (kVector && left >= 8) return __ldg(reinterpret_cast<const uint4*>(x));
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < left ? __ldg(x + 2 * i) : 0;
    const uint32_t high = 2 * i + 1 < left ? __ldg(x + 2 * i + 1) : 0;
    words[i] = low | high << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1);

#define LORAX_MMA(T, NAME)                                                                     \
  template <>                                                                                  \
  __device__ __forceinline__ void mma<T>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, \
                                         uint32_t a3, uint32_t b0, uint32_t b1) {              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                        \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                              \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                      \
  }
LORAX_MMA(__nv_bfloat16, "bf16")
LORAX_MMA(__half, "f16")
#undef LORAX_MMA

// 16 bits: tiles of 16 ranks by 8 tokens; each of 4 warps sums its 128 of the chunk's 512 of K,
// then the four sums are added in order. The k of an mma are permuted alike for A and x: a thread's
// 16 contiguous bytes are its k of two consecutive mmas.
template <class T, bool kVectorX>
__global__ void __launch_bounds__(kThreads) shrink_mma(const ShrinkArgs args) {
  // Twice, so that one barrier per tile is enough; a row of 20 keeps the banks apart.
  __shared__ float sums[2][kWarps][kTokenTile][kRankTile + 4];
  Segment segment;
  if (!find_segment(args.segments, blockIdx.y, segment)) return;
  const int stacked = segment.ranks[0] + segment.ranks[1] + segment.ranks[2];
  const int rank = stacked < args.width ? stacked : int(args.width);
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  const int64_t k0 = int64_t(blockIdx.x) * kLoraChunk + warp * kWarpK + quad * 8;
  const int64_t stride = row_bytes(args.k, 2);
  const char* a = arena_at(args.segments, segment.a) + k0 * 2;
  const uint16_t* x = static_cast<const uint16_t*>(args.x) + segment.first * args.x_stride + k0;
  float* t = args.t + (int64_t(blockIdx.x) * args.segments.tokens + segment.first) * args.width;

  uint4 current[kSteps][2], next[kSteps][2], xs[kSteps];
  const auto load_a = [&](int rank0) {  // two rows of four steps: 8 loads in flight
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = rank0 + row + half * 8;
        next[step][half] = {0, 0, 0, 0};
        if (r < rank && k0 + step * 32 < args.k) {
          next[step][half] = load_once(a + r * stride + step * 64);
        }
      }
    }
  };

  load_a(0);
  int buffer = 0;
  for (int rank0 = 0; rank0 < rank; rank0 += kRankTile) {  // over ranks
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      current[step][0] = keep(next[step][0], args.k - k0 - step * 32);
      current[step][1] = keep(next[step][1], args.k - k0 - step * 32);
    }
    if (rank0 + kRankTile < rank) load_a(rank0 + kRankTile);
    for (int token0 = 0; token0 < segment.count; token0 += kTokenTile) {  // over tokens
      if (rank0 == 0 || segment.count > kTokenTile) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int64_t left = token0 + row < segment.count ? args.k - k0 - step * 32 : 0;
          xs[step] = load_x<kVectorX>(x + (token0 + row) * args.x_stride + step * 32, left);
        }
      }
      float even[4] = {}, odd[4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {  // over k: 32 at a time
        const uint4 p = current[step][0], q = current[step][1], v = xs[step];
        mma<T>(even, p.x, q.x, p.y, q.y, v.x, v.y);
        mma<T>(odd, p.z, q.z, p.w, q.w, v.z, v.w);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[buffer][warp][quad * 2 + i % 2][row + i / 2 * 8] = even[i] + odd[i];
      }
      __syncthreads();
      const int token = threadIdx.x / kRankTile, r = threadIdx.x % kRankTile;
      if (token0 + token < segment.count && rank0 + r < rank) {
        float sum = sums[buffer][0][token][r];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) sum += sums[buffer][w][token][r];
        t[(token0 + token) * args.width + rank0 + r] = sum;
      }
      buffer ^= 1;
    }
  }
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

// float32: a warp takes every fourth rank and all 512 of K, four floats per lane and 128; its lanes
// are added by shuffles.
__global__ void __launch_bounds__(kThreads) shrink_fma(const ShrinkArgs args, bool vector_x) {
  Segment segment;
  if (!find_segment(args.segments, blockIdx.y, segment)) return;
  const int stacked = segment.ranks[0] + segment.ranks[1] + segment.ranks[2];
  const int rank = stacked < args.width ? stacked : int(args.width);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t k0 = int64_t(blockIdx.x) * kLoraChunk + lane * 4;
  const int64_t stride = row_bytes(args.k, 4) / 4;
  const float* a = reinterpret_cast<const float*>(arena_at(args.segments, segment.a)) + k0;
  const float* x = static_cast<const float*>(args.x) + segment.first * args.x_stride + k0;
  float* t = args.t + (int64_t(blockIdx.x) * args.segments.tokens + segment.first) * args.width;
  for (int r = warp; r < rank; r += kWarps) {  // over ranks
    float4 as[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      as[j] = load_floats(a + r * stride + j * 128, args.k - k0 - j * 128, true);
    }
    for (int token = 0; token < segment.count; ++token) {  // over tokens
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // over k: 128 at a time
        const float4 v =
            load_floats(x + token * args.x_stride + j * 128, args.k - k0 - j * 128, vector_x);
        sum = fmaf(as[j].x, v.x, sum);
        sum = fmaf(as[j].y, v.y, sum);
        sum = fmaf(as[j].z, v.z, sum);
        sum = fmaf(as[j].w, v.w, sum);
      }
#pragma unroll
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
      if (lane == 0) t[token * args.width + r] = sum;
    }
  }
}

}  // namespace

void lora_shrink(const ShrinkArgs& args, cudaStream_t stream) {
  if (args.segments.count == 0 || args.segments.tokens == 0 || args.width == 0) return;
  const dim3 grid(uint32_t(shrink_parts(args.k)), uint32_t(args.segments.count));
  const int size = args.dtype == DType::float32 ? 4 : 2;
  const bool vector_x =
      reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.x_stride * size % 16 == 0;
  if (args.dtype == DType::float32) {
    shrink_fma<<<grid, kThreads, 0, stream>>>(args, vector_x);
  } else if (args.dtype == DType::bfloat16) {
    const auto kernel =
        vector_x ? shrink_mma<__nv_bfloat16, true> : shrink_mma<__nv_bfloat16, false>;
    kernel<<<grid, kThreads, 0, stream>>>(args);
  } else {
    const auto kernel = vector_x ? shrink_mma<__half, true> : shrink_mma<__half, false>;
    kernel<<<grid, kThreads, 0, stream>>>(args);
  }
}

}  // namespace lorax::cuda
