// y = scale * y + shift by the extras of each token's adapter, in float32, rounded once.
#include "chain.cuh"
#include "lora_device.cuh"
#include "pack.h"

namespace lorax::cuda {
namespace {

constexpr int kRescaleThreads = 256;
constexpr int kRescaleTokens = 64;  // CTAs that share the tokens of a segment, at most

// Grid: tiles of columns, segments, tokens modulo its depth. A thread has N columns side by side.
template <class T, int N>
__global__ void __launch_bounds__(kRescaleThreads) rescale(const RescaleArgs args) {
  allow_next();
  wait_for_previous();
  const LoraSegments& segments = args.segments;
  const int slot = segments.slots[blockIdx.y];
  const int first = segments.starts[blockIdx.y];
  const int64_t end = min(int64_t(segments.starts[blockIdx.y + 1]), segments.tokens);
  if (slot <= 0 || slot >= segments.num_slots || first < 0) return;
  const int32_t* words = segments.records + slot * segments.record_stride;
  const int flags = uint32_t(words[4]) >> 16;
  const int64_t column = (int64_t(blockIdx.x) * kRescaleThreads + threadIdx.x) * N;
  if (!(flags & kFlagsExtras) || column >= args.columns) return;
  const char* row = arena_at(segments, uint32_t(words[2])) + column * int(sizeof(float));
  float scale[N], shift[N];
#pragma unroll
  for (int c = 0; c < N; ++c) scale[c] = 1.0f, shift[c] = 0.0f;
  const auto load = [&](float (&out)[N]) {
    const Pack<float, N> pack = load_pack<N>(reinterpret_cast<const float*>(row));
#pragma unroll
    for (int c = 0; c < N; ++c) out[c] = pack.v[c];
    row += row_bytes(args.columns, int(sizeof(float)));
  };
  if (flags & kFlagsScaled) load(scale);
  if (flags & kFlagShift) load(shift);
  for (int64_t i = first + blockIdx.z; i < end; i += gridDim.z) {  // over tokens
    T* const y = static_cast<T*>(args.y) + i * args.y_stride + column;
    Pack<T, N> pack = load_pack<N>(y);
#pragma unroll
    for (int c = 0; c < N; ++c) pack.v[c] = narrow<T>(fmaf(scale[c], widen(pack.v[c]), shift[c]));
    store_pack<N>(y, pack);
  }
}

template <class T, int N>
void launch_rescale(const RescaleArgs& args, cudaStream_t stream) {
  const int64_t tokens = args.segments.tokens;
  const dim3 grid(unsigned(ceil_div(args.columns, kRescaleThreads * N)),
                  unsigned(args.segments.count),
                  unsigned(tokens < kRescaleTokens ? tokens : kRescaleTokens));
  launch_chained(rescale<T, N>, grid, kRescaleThreads, 0, stream, args);
}

}  // namespace

void lora_rescale(const RescaleArgs& args, cudaStream_t stream) {
  if (args.segments.count == 0 || args.segments.tokens == 0 || args.columns == 0) return;
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kN = 4;
    if (args.columns % kN == 0 && fits_packs(args.y, args.y_stride, kN, kN * sizeof(T))) {
      launch_rescale<T, kN>(args, stream);
    } else {
      launch_rescale<T, 1>(args, stream);
    }
  });
}

}  // namespace lorax::cuda
