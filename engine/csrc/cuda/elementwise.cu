// RMS norm and gated activations. Both round where the reference in ops/reference.py does.
#include "chain.cuh"
#include "elementwise.h"
#include "pack.h"

namespace lorax::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kActThreads = 256;

// The sum over the CTA, in every thread. The order of the additions depends on blockDim.x alone.
__device__ __forceinline__ float sum_over_cta(float value) {
  __shared__ float partial[kMaxThreads / kWarp];
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  const int warps = blockDim.x / kWarp;
  value = int(threadIdx.x % kWarp) < warps ? partial[threadIdx.x % kWarp] : 0.0f;
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
  return value;
}

// Loads N elements of the row at `column`, with the residual added and stored where there is one.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_and_add(const T* x, T* residual, int64_t column) {
  Pack<T, N> pack = load_pack<N>(x + column);
  if (residual) {
    const Pack<T, N> old = load_pack<N>(residual + column);
#pragma unroll
    for (int i = 0; i < N; ++i) pack.v[i] = narrow<T>(widen(old.v[i]) + widen(pack.v[i]));
    store_pack<N>(residual + column, pack);
  }
  return pack;
}

template <class T, int N>
__device__ __forceinline__ float add_squares(const Pack<T, N>& pack, float sum) {
#pragma unroll
  for (int i = 0; i < N; ++i) sum += widen(pack.v[i]) * widen(pack.v[i]);
  return sum;
}

template <class T, class W, int N>
__device__ __forceinline__ void store_normed(const Pack<T, N>& pack, float scale,
                                             const Pack<W, N>& weight, T* out) {
  Pack<T, N> normed;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    normed.v[i] = narrow<T>(widen(pack.v[i]) * scale * widen(weight.v[i]));
  }
  store_pack<N>(out, normed);
}

// Tile: one CTA per row of [rows, width]. Pack i of a thread is at column
// (i * blockDim.x + threadIdx.x) * N. kHeld packs a thread stay in registers between the two passes
// over the columns; with kHeld = 0, for rows too wide for that, the second pass reads them again.
template <class T, class W, int N, int kHeld>
__global__ void __launch_bounds__(kMaxThreads) add_rms_norm_kernel(const AddRmsNormArgs args) {
  allow_next();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  T* residual =
      args.residual ? static_cast<T*>(args.residual) + row * args.residual_stride : nullptr;
  const W* weight = static_cast<const W*>(args.weight);
  T* out = static_cast<T*>(args.out) + row * args.width;
  const int64_t first = int64_t(threadIdx.x) * N;
  const int64_t step = int64_t(blockDim.x) * N;
  float sum = 0.0f;
  if constexpr (kHeld > 0) {
    Pack<T, N> held[kHeld];
    Pack<W, N> ahead{};  // more of them would not fit into registers
    if (kHeld == 1 && first < args.width) ahead = load_pack<N>(weight + first);
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {  // columns
      if (first + i * step < args.width) {
        held[i] = load_and_add<T, N>(x, residual, first + i * step);
        sum = add_squares<T, N>(held[i], sum);
      }
    }
    const float scale = rsqrtf(sum_over_cta(sum) / float(args.width) + args.eps);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {  // columns
      if (first + i * step < args.width) {
        const int64_t column = first + i * step;
        const Pack<W, N> one = kHeld == 1 ? ahead : load_pack<N>(weight + column);
        store_normed<T, W, N>(held[i], scale, one, out + column);
      }
    }
  } else {
    wait_for_previous();
    for (int64_t column = first; column < args.width; column += step) {
      sum = add_squares<T, N>(load_and_add<T, N>(x, residual, column), sum);
    }
    const float scale = rsqrtf(sum_over_cta(sum) / float(args.width) + args.eps);
    const T* normed = residual ? residual : x;  // each thread reads back what it wrote itself
    for (int64_t column = first; column < args.width; column += step) {
      store_normed<T, W, N>(load_pack<N>(normed + column), scale, load_pack<N>(weight + column),
                            out + column);
    }
  }
}

template <class T, class W, int N, int kHeld>
void launch_add_rms_norm(const AddRmsNormArgs& args, cudaStream_t stream) {
  const int64_t packs = ceil_div(ceil_div(args.width, N), kHeld ? kHeld : 1);
  const int64_t warps = ceil_div(packs, kWarp);
  const int64_t threads = warps * kWarp < kMaxThreads ? warps * kWarp : kMaxThreads;
  launch_chained(add_rms_norm_kernel<T, W, N, kHeld>, dim3(unsigned(args.rows)),
                 dim3(unsigned(threads)), 0, stream, args);
}

template <class T>
__device__ __forceinline__ T activate(T gate, Activation act) {
  const float x = widen(gate);
  float y;
  if (act == Activation::silu) {
    y = x / (1.0f + expf(-x));
  } else if (act == Activation::gelu) {
    y = 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));  // sqrt(1 / 2)
  } else {
    const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);  // sqrt(2 / pi)
    y = 0.5f * x * (1.0f + tanhf(inner));
  }
  return narrow<T>(y);
}

// Tile: kActThreads * N columns of one row of [rows, width]; blockIdx.x walks the rows, blockIdx.y
// the tiles of columns. A thread has N columns side by side.
template <class T, int N, Activation kAct>
__global__ void __launch_bounds__(kActThreads) act_and_mul_kernel(const ActAndMulArgs args) {
  allow_next();
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const int64_t column = (int64_t(blockIdx.y) * kActThreads + threadIdx.x) * N;
  if (column >= args.width) return;
  const T* gates = static_cast<const T*>(args.x) + row * args.x_stride + column;
  const Pack<T, N> gate = load_pack<N>(gates);
  const Pack<T, N> up = load_pack<N>(gates + args.width);
  Pack<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) {  // columns
    out.v[i] = narrow<T>(widen(activate(gate.v[i], kAct)) * widen(up.v[i]));
  }
  store_pack<N>(static_cast<T*>(args.out) + row * args.width + column, out);
}

template <class T, int N>
void launch_act_and_mul(const ActAndMulArgs& args, cudaStream_t stream) {
  const dim3 grid(unsigned(args.rows), unsigned(ceil_div(args.width, kActThreads * N)));
  switch (args.act) {
    case Activation::silu:
      launch_chained(act_and_mul_kernel<T, N, Activation::silu>, grid, kActThreads, 0, stream,
                     args);
      return;
    case Activation::gelu:
      launch_chained(act_and_mul_kernel<T, N, Activation::gelu>, grid, kActThreads, 0, stream,
                     args);
      return;
    case Activation::gelu_tanh:
      launch_chained(act_and_mul_kernel<T, N, Activation::gelu_tanh>, grid, kActThreads, 0, stream,
                     args);
      return;
  }
}

}  // namespace

void add_rms_norm(const AddRmsNormArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.width == 0) return;
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kN = kPack<T>;
    const bool packs = args.width % kN == 0 && fits_packs(args.x, args.x_stride, kN) &&
                       fits_packs(args.residual, args.residual_stride, kN) &&
                       fits_packs(args.weight, 0, kN) && fits_packs(args.out, 0, kN);
    with_dtype(args.weight_dtype, [&](auto weight_tag) {
      using W = typename decltype(weight_tag)::type;
      if (packs && args.width <= 512 * kN) {
        launch_add_rms_norm<T, W, kN, 1>(args, stream);
      } else if (packs && args.width <= 4 * kMaxThreads * kN) {
        launch_add_rms_norm<T, W, kN, 4>(args, stream);
      } else if (args.width <= 8 * kMaxThreads) {
        launch_add_rms_norm<T, W, 1, 8>(args, stream);
      } else {
        launch_add_rms_norm<T, W, 1, 0>(args, stream);
      }
    });
  });
}

void act_and_mul(const ActAndMulArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.width == 0) return;
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kN = kPack<T>;
    if (args.width % kN == 0 && fits_packs(args.x, args.x_stride, kN) &&
        fits_packs(args.out, 0, kN)) {
      launch_act_and_mul<T, kN>(args, stream);
    } else {
      launch_act_and_mul<T, 1>(args, stream);
    }
  });
}

}  // namespace lorax::cuda
