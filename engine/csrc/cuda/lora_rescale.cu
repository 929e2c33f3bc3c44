// y = scale * y + shift by the extras of each token's adapter, in float32, rounded once.
#include "chain.cuh"
#include "lora_device.cuh"
#include "pack.h"

namespace lorax::cuda {
namespace {

constexpr int kRescaleThreads = 256;
constexpr int kRescaleTokens = 1024;  // CTAs that share the tokens, at most

// Grid: tiles of columns, tokens modulo its height. A thread has N columns side by side. The extras
// are read while the previous kernel still writes y.
template <class T, int N>
__global__ void __launch_bounds__(kRescaleThreads) rescale(const RescaleArgs args) {
  using Floats = Pack<float, N>;
  allow_next();
  const LoraSegments& segments = args.segments;
  const int64_t column = (int64_t(blockIdx.x) * kRescaleThreads + threadIdx.x) * N;
  const int row = int(row_bytes(args.columns, int(sizeof(float))) / int(sizeof(float)));
  if (blockIdx.x == 0 && blockIdx.y == 0) wait_for_previous();
  if (column >= args.columns) return;
  for (int64_t i = blockIdx.y; i < segments.tokens; i += gridDim.y) {  // over tokens
    const int32_t* words = record_of_token(segments, i);
    const int flags = words ? int(uint32_t(words[4]) >> 16) & kFlagsExtras : 0;
    if (!flags) continue;
    const float* scale =
        reinterpret_cast<const float*>(arena_at(segments, uint32_t(words[2]))) + column;
    const float* shift = flags & kFlagsScaled ? scale + row : scale;
    Floats factor, term;
#pragma unroll
    for (int c = 0; c < N; ++c) factor.v[c] = 1.0f, term.v[c] = 0.0f;
    if (flags & kFlagsScaled) factor = load_pack<N>(scale);
    if (flags & kFlagShift) term = load_pack<N>(shift);
    wait_for_previous();
    T* const y = static_cast<T*>(args.y) + i * args.y_stride + column;
    Pack<T, N> pack = load_pack<N>(y);
#pragma unroll
    for (int c = 0; c < N; ++c)
      pack.v[c] = narrow<T>(fmaf(factor.v[c], widen(pack.v[c]), term.v[c]));
    store_pack<N>(y, pack);
  }
}

template <class T, int N>
void launch_rescale(const RescaleArgs& args, cudaStream_t stream) {
  const int64_t tokens = args.segments.tokens;
  const dim3 grid(unsigned(ceil_div(args.columns, kRescaleThreads * N)),
                  unsigned(tokens < kRescaleTokens ? tokens : kRescaleTokens));
  launch_chained(rescale<T, N>, grid, kRescaleThreads, 0, stream, args);
}

}  // namespace

void lora_rescale(const RescaleArgs& args, cudaStream_t stream) {
  if (args.segments.count == 0 || args.segments.tokens == 0 || args.columns == 0) return;
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kN = kPack<T>;
    if (args.columns % kN == 0 && fits_packs(args.y, args.y_stride, kN)) {
      launch_rescale<T, kN>(args, stream);
    } else {
      launch_rescale<T, 1>(args, stream);
    }
  });
}

}  // namespace lorax::cuda
