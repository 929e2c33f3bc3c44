// The largest logit of each row in two launches, and the edge of each row's top-p set in one.
// Neither depends on the batch nor on the order in which threads run.
#include "pack.h"
#include "sample.h"

namespace lorax::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kFullMask = 0xffffffffu;

// Bits that rise with the value; NaN above all, as torch.argmax has it, and -0 equal to 0.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x == 0.f ? 0.f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A logit and its column as one number: the larger logit wins, of equals the lower column.
__device__ __forceinline__ uint64_t candidate(float x, uint32_t column) {
  return uint64_t(ordered_bits(x)) << 32 | ~column;
}

// The largest of all threads, in thread 0.
__device__ __forceinline__ uint64_t largest(uint64_t best) {
  __shared__ uint64_t of_warps[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const uint64_t other = __shfl_xor_sync(kFullMask, best, step);
    best = other > best ? other : best;
  }
  if (lane == 0) of_warps[warp] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; ++w) best = of_warps[w] > best ? of_warps[w] : best;
  }
  return best;
}

// Grid (parts, rows). A CTA walks kGreedyColumns columns of a row in packs of N.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) candidates_kernel(const PickGreedyArgs args) {
  const int64_t begin = int64_t(blockIdx.x) * kGreedyColumns;
  const int64_t end = begin + kGreedyColumns < args.vocab ? begin + kGreedyColumns : args.vocab;
  const T* logits = static_cast<const T*>(args.logits) + blockIdx.y * args.logits_stride;
  uint64_t best = 0;
#pragma unroll 2
  for (int64_t at = begin + threadIdx.x * N; at < end; at += kThreads * N) {
    const Pack<T, N> pack = load_pack<N>(logits + at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint64_t one = candidate(widen(pack.v[i]), uint32_t(at + i));
      best = one > best ? one : best;
    }
  }
  best = largest(best);
  if (threadIdx.x == 0) args.candidates[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = best;
}

__device__ __forceinline__ int64_t index_at(const void* data, bool is_64, int i) {
  return is_64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
}

// Grid (rows). The threads walk the candidates of a row.
__global__ void __launch_bounds__(kThreads) pick_kernel(const PickGreedyArgs args, int parts) {
  const int row = blockIdx.x;
  uint64_t best = 0;
  for (int part = threadIdx.x; part < parts; part += kThreads) {
    const uint64_t one = args.candidates[int64_t(row) * parts + part];
    best = one > best ? one : best;
  }
  best = largest(best);
  if (threadIdx.x != 0) return;
  // A row whose largest logit is infinite or not a number has no token.
  const bool broken = uint32_t(best >> 32) >= ordered_bits(INFINITY);
  const uint32_t column = broken ? 0 : ~uint32_t(best);
  args.chosen[row] = broken ? -1 : int64_t(column);
  args.tokens[index_at(args.rows, args.rows_int64, row) * args.tokens_stride +
              index_at(args.lengths, args.lengths_int64, row)] = int32_t(column);
}

constexpr int kFloorThreads = 1024;
constexpr double kUnit = double(1ull << 44);  // masses are whole numbers of 2^-44, so adding them
                                              // up gives the same sum in every order

// Grid (rows). The least probability inside the smallest set of mass top_p or more: four digits of
// eight bits of its float, the highest first. Each pass walks the row, adds up the mass of every
// digit among the candidates, and takes the lowest digit that has less than top_p above it.
__global__ void __launch_bounds__(kFloorThreads) top_p_floor_kernel(const TopPFloorArgs args) {
  __shared__ unsigned long long mass[256];
  __shared__ unsigned present[256];
  __shared__ uint32_t prefix;
  __shared__ unsigned long long above;  // mass of what lies above the candidates
  const float* probs = args.probs + blockIdx.x * args.stride;
  const double wanted = double(args.top_p[blockIdx.x]) * kUnit;
  if (threadIdx.x == 0) {
    prefix = 0;
    above = 0;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < 256) {
      mass[threadIdx.x] = 0;
      present[threadIdx.x] = 0;
    }
    __syncthreads();
    const uint32_t higher = shift == 24 ? 0 : ~0u << (shift + 8), found = prefix;
    for (int64_t i = threadIdx.x; i < args.vocab; i += kFloorThreads) {
      const float p = probs[i];
      const uint32_t bits = __float_as_uint(p);
      if ((bits & higher) != found) continue;
      const unsigned long long share = __double2ull_rn(double(p) * kUnit);
      if (share) atomicAdd(&mass[bits >> shift & 255], share);
      present[bits >> shift & 255] = 1;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 255;
      while (digit > 0 && !present[digit]) --digit;
      unsigned long long total = above;  // above `digit`
      unsigned long long next = total;
      for (int d = digit; d >= 0; --d) {
        if (present[d]) {
          if (d != digit && double(next) >= wanted) break;
          digit = d;
          total = next;
        }
        next += mass[d];
      }
      prefix |= uint32_t(digit) << shift;
      above = total;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) args.floor[blockIdx.x] = __uint_as_float(prefix);
}

template <class T, int N>
void launch_candidates(const PickGreedyArgs& args, int parts, cudaStream_t stream) {
  candidates_kernel<T, N><<<dim3(parts, args.count), kThreads, 0, stream>>>(args);
}

}  // namespace

void pick_greedy(const PickGreedyArgs& args, cudaStream_t stream) {
  if (args.count == 0) return;
  const int parts = int(greedy_parts(args.vocab));
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int N = kPack<T>;
    if (fits_packs(args.logits, args.logits_stride, N) && args.vocab % N == 0)
      launch_candidates<T, N>(args, parts, stream);
    else
      launch_candidates<T, 1>(args, parts, stream);
  });
  pick_kernel<<<args.count, kThreads, 0, stream>>>(args, parts);
}

void top_p_floor(const TopPFloorArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  top_p_floor_kernel<<<args.rows, kFloorThreads, 0, stream>>>(args);
}

}  // namespace lorax::cuda
