// Decode: one query token per sequence, its keys cut into parts. The cut depends on the length of
// the sequence alone, so a result does not depend on the batch; only who computes a part does.
#include <type_traits>

#include "attention_mma.cuh"
#include "chain.cuh"

namespace lorax::cuda {
namespace {

constexpr int kKeys = kDecodeKeys, kStages = kDecodeStages;
constexpr int kCombineHeads = 8;  // heads that a CTA puts together

// What a token sees, low .. high - 1, and its cut into `count` parts of `share` positions.
struct Cut {
  int low, high, begin, share, count;
};

__device__ inline Cut cut_of(const AttentionArgs& args, int sequence, int token) {
  Cut cut;
  cut.high = args.lengths[sequence] - (args.starts[sequence + 1] - token) + 1;
  cut.low = args.window > 0 ? max(cut.high - args.window, 0) : 0;
  cut.begin = cut.low / kKeys * kKeys;
  const int range = cut.high - cut.begin, wide = decode_warps(args.size) * kKeys;
  const int share = (range + kAttentionMaxParts - 1) / kAttentionMaxParts;
  cut.share = max(kAttentionPartSize, (share + wide - 1) / wide * wide);
  cut.count = (range + cut.share - 1) / cut.share;
  return cut;
}

// Grid (decodes, groups x tiles of 16 heads, z). Rows are the heads that share a kv head. A CTA
// walks the parts z, z + gridDim.z, ...; in a part warp w walks the chunks of 16 positions
// w, w + kWarps, ... with its own copies in flight, and at the end the warps are put together.
template <class T, int kSize, int kWarps = decode_warps(kSize)>
__global__ void __launch_bounds__(kWarps * 32) decode_kernel(const AttentionArgs args) {
  allow_next();
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float tops[kWarps][16], sums[kWarps][16];
  constexpr int kStride = kSize + 8, kTile = kKeys * kStride;
  static_assert(kWarps * 16 * kSize * 4 <= kWarps * kStages * 2 * kTile * 2);
  T* queries = reinterpret_cast<T*>(memory);
  T* stages = queries + 16 * kStride;
  float* merged = reinterpret_cast<float*>(stages);  // [warps][16][kSize], after the stages

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token = blockIdx.x, repeats = args.heads / args.groups, tiles = (repeats + 15) / 16;
  const int group = blockIdx.y / tiles, first_head = blockIdx.y % tiles * 16;
  const int rows = min(16, repeats - first_head), head = group * repeats + first_head;
  T* out = static_cast<T*>(args.out) + ((int64_t)token * args.heads + head) * args.size;

  const int sequence = sequence_of(args.starts, args.sequences, token);
  if (sequence < 0) {  // padding
    wait_for_previous();
    if (blockIdx.z == 0)
      for (int i = threadIdx.x; i < rows * args.size; i += blockDim.x) out[i] = T(0.f);
    return;
  }
  const Cut cut = cut_of(args, sequence, token);
  if (int(blockIdx.z) >= cut.count) return;
  const int32_t* table = args.tables + sequence * args.table_stride;

  Rows<T, kSize> state;
  T* mine = stages + warp * kStages * 2 * kTile;
  for (int part = blockIdx.z; part < cut.count; part += gridDim.z) {
    const int begin = cut.begin + part * cut.share, end = min(cut.high, begin + cut.share);
    const int low[2] = {cut.low, cut.low}, high[2] = {end, end};
    state.clear();
    const int step = kWarps * kKeys, start = begin + warp * kKeys;
    long long row = row_of(args, table, group, start + lane, cut.low, end);
    if (lane >= kKeys) row = -1;
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      // only the last position is written by the kernel in front; all before it are there
      if (start + stage * step + kKeys >= cut.high) wait_for_previous();
      if (start + stage * step < end)
        copy_rows<T, kSize, kKeys>(args, mine + stage * 2 * kTile, mine + stage * 2 * kTile + kTile,
                                   row, lane);
      commit_async();
      row = row_of(args, table, group, start + (stage + 1) * step + lane, cut.low, end);
    }
    wait_for_previous();
    if (part == int(blockIdx.z)) {  // while the first copies are on their way
      const T* q =
          static_cast<const T*>(args.q) + token * args.q_stride + head * args.q_head_stride;
      for (int i = threadIdx.x; i < 16 * kSize;
           i += blockDim.x) {  // over heads, then the head size
        const int r = i / kSize, d = i % kSize;
        queries[r * kStride + d] =
            r < rows && d < args.size ? q[r * args.q_head_stride + d] : T(0.f);
      }
      __syncthreads();
      state.load_queries(queries, lane);
    }
    int stage = 0;
    for (int at = start; at < end; at += step) {  // over the chunks of the warp
      wait_async<kStages - 1>();
      __syncwarp();
      T* keys = mine + stage * 2 * kTile;
      state.template attend<kKeys>(queries, keys, keys + kTile, at, low, high, args.scale,
                                   args.softcap, lane);
      __syncwarp();
      if (at + kStages * step < end)
        copy_rows<T, kSize, kKeys>(args, keys, keys + kTile, row, lane);
      commit_async();
      row = row_of(args, table, group, at + (kStages + 1) * step + lane, cut.low, end);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    wait_async<0>();
    state.finish();
    if (lane % 4 == 0) {
      for (int i = 0; i < 2; ++i) {
        tops[warp][lane / 4 + i * 8] = state.m[i];
        sums[warp][lane / 4 + i * 8] = state.l[i];
      }
    }
    __syncthreads();  // the stages are free from here on
#pragma unroll
    for (int j = 0; j < kSize / 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<float2*>(merged + (warp * 16 + lane / 4 + i * 8) * kSize + j * 8 +
                                   lane % 4 * 2) =
            make_float2(state.o[j][2 * i], state.o[j][2 * i + 1]);
    __syncthreads();
    for (int i = threadIdx.x; i < rows * args.size; i += blockDim.x) {  // over heads, then size
      const int r = i / args.size, d = i % args.size;
      float top = tops[0][r];
      for (int w = 1; w < kWarps; ++w) top = fmaxf(top, tops[w][r]);
      const float base = top == -INFINITY ? 0.f : top;
      float sum = 0.f, value = 0.f;
      for (int w = 0; w < kWarps; ++w) {
        const float weight = exp2f(tops[w][r] - base);
        sum += weight * sums[w][r];
        value += weight * merged[(w * 16 + r) * kSize + d];
      }
      if (cut.count == 1) {
        out[i] = T(value / sum);
      } else {
        const int64_t at = ((int64_t)token * args.heads + head + r) * args.parts + part;
        args.workspace[at * (args.size + 2) + d] = value;
        if (d == 0) {
          args.workspace[at * (args.size + 2) + args.size] = top;
          args.workspace[at * (args.size + 2) + args.size + 1] = sum;
        }
      }
    }
    __syncthreads();  // before the next part fills the stages
  }
}

// Grid (decodes, tiles of 8 heads), a warp each: puts the parts together, in their order.
template <class T>
__global__ void __launch_bounds__(kCombineHeads * 32) combine_kernel(const AttentionArgs args) {
  allow_next();
  wait_for_previous();
  const int token = blockIdx.x, head = blockIdx.y * kCombineHeads + threadIdx.x / 32;
  const int sequence = sequence_of(args.starts, args.sequences, token);
  if (sequence < 0 || head >= args.heads) return;
  const Cut cut = cut_of(args, sequence, token);
  if (cut.count <= 1) return;
  const int64_t row = (int64_t)token * args.heads + head, width = args.size + 2;
  const float* parts = args.workspace + row * args.parts * width;
  float top = -INFINITY;
  for (int p = 0; p < cut.count; ++p) top = fmaxf(top, parts[p * width + args.size]);
  const float base = top == -INFINITY ? 0.f : top;
  for (int d = threadIdx.x % 32; d < args.size; d += 32) {  // over the head size
    float sum = 0.f, value = 0.f;
    for (int p = 0; p < cut.count; ++p) {
      const float weight = exp2f(parts[p * width + args.size] - base);
      sum += weight * parts[p * width + args.size + 1];
      value += weight * parts[p * width + d];
    }
    static_cast<T*>(args.out)[row * args.size + d] = T(value / sum);
  }
}

}  // namespace

void attention_decode(const AttentionArgs& args, cudaStream_t stream) {
  const int tiles = (args.heads / args.groups + 15) / 16;
  const int64_t pairs = int64_t(args.decodes) * args.groups * tiles;
  const int64_t wanted = (1024 + pairs - 1) / pairs;  // enough CTAs to fill the GPU
  const int z = int(wanted < args.parts ? wanted : args.parts);
  for_kernel(args, [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int kSize = decltype(size)::value, kShared = decode_shared(kSize);
    constexpr int kWarps = decode_warps(kSize);
    cudaFuncSetAttribute(decode_kernel<T, kSize>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         kShared);
    const dim3 grid(args.decodes, args.groups * tiles, z);
    launch_chained(decode_kernel<T, kSize>, grid, kWarps * 32, kShared, stream, args);
    if (args.parts > 1)
      launch_chained(combine_kernel<T>, dim3(args.decodes, (args.heads - 1) / kCombineHeads + 1),
                     kCombineHeads * 32, 0, stream, args);
  });
}

}  // namespace lorax::cuda
