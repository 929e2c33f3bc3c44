// Decode: one query token per sequence, its keys split into parts. The split depends on the length
// of the sequence alone, so a result does not depend on the batch; only which CTA computes a part
// does.
#include <algorithm>
#include <type_traits>

#include "attention_mma.cuh"
#include "chain.cuh"

namespace lorax::cuda {
namespace {

constexpr int kKeys = kDecodeKeys, kStages = kDecodeStages;
constexpr int kCombineHeads = 8;  // heads that a CTA puts together

// The positions that a token sees, low .. high - 1, in `count` parts of `share` positions.
struct Split {
  int low, high, begin, share, count;
};

__device__ inline Split split_of(const AttentionArgs& args, int sequence, int token) {
  Split split;
  split.high = args.lengths[sequence] - (args.starts[sequence + 1] - token) + 1;
  split.low = args.window > 0 ? max(split.high - args.window, 0) : 0;
  split.begin = split.low / kKeys * kKeys;
  const int range = split.high - split.begin, wide = decode_warps(args.size) * kKeys;
  const int most = min((range + kAttentionPartSize - 1) / kAttentionPartSize, kAttentionMaxParts);
  const int share = (range + most - 1) / most;
  split.share = (share + wide - 1) / wide * wide;
  split.count = (range + split.share - 1) / split.share;
  return split;
}

// An item of work: one part of what a token sees, for one of its `pairs`, a tile of heads that
// share a kv head.
struct Item {
  int token, pair, part;
};

// Item `extra` of the parts beyond the first: those of token 0, then those of token 1, and so on.
// Its token is -1 if there are not so many. Called by whole warps.
__device__ inline Item find_extra(const AttentionArgs& args, int pairs, int extra) {
  constexpr int kEach = 4;  // tokens of a lane, whose lengths are in flight at a time
  const int lane = threadIdx.x % 32;
  for (int token0 = 0; token0 < args.decodes; token0 += 32 * kEach) {
    int counts[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int token = token0 + j * 32 + lane;
      const int sequence =
          token < args.decodes ? sequence_of(args.starts, args.sequences, token) : -1;
      counts[j] = sequence < 0 ? 0 : (split_of(args, sequence, token).count - 1) * pairs;
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      int end = counts[j];  // of the token's items
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(kFullMask, end, d);
        if (lane >= d) end += other;
      }
      const unsigned behind = __ballot_sync(kFullMask, extra < end);
      if (behind) {
        const int owner = __ffs(behind) - 1;
        const int local = extra - __shfl_sync(kFullMask, end - counts[j], owner);
        return {token0 + j * 32 + owner, local % pairs, 1 + local / pairs};
      }
      extra -= __shfl_sync(kFullMask, end, 31);
    }
  }
  return {-1, 0, 0};
}

// Heads in a warp, kTiles times 8, as the columns of products whose rows are 16 keys or 16 elements
// of the head: a lane has two heads of each tile, lane % 4 * 2 and the next.
template <class T, int kSize, int kTiles>
struct Heads {
  static constexpr bool kKeepQ = keeps_queries(kSize);  // else they are read again for every chunk
  static constexpr int kStride = kSize + 8;
  float o[kTiles][kSize / 16][4];  // weighted values, elements lane / 4 and lane / 4 + 8 of each 16
  float m[kTiles][2], l[kTiles][2];  // maximum (times log2 e); the lane's share of the weights' sum
  uint32_t q[kTiles][kKeepQ ? kSize / 16 : 1][2];

  __device__ void clear() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < kSize / 16; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[t][j][i] = 0.f;
      m[t][0] = m[t][1] = -INFINITY;
      l[t][0] = l[t][1] = 0.f;
    }
  }

  // Elements 16 k .. 16 k + 15 of the queries of a tile; queries: [8 kTiles][kSize + 8].
  static __device__ void load_query(uint32_t (&b)[2], const T* queries, int t, int k, int lane) {
    const T* from = queries + (t * 8 + lane / 4) * kStride + k * 16 + lane % 4 * 2;
    b[0] = *reinterpret_cast<const uint32_t*>(from);
    b[1] = *reinterpret_cast<const uint32_t*>(from + 8);
  }

  __device__ void load_queries(const T* queries, int lane) {
    if constexpr (kKeepQ) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int k = 0; k < kSize / 16; ++k) load_query(q[t][k], queries, t, k, lane);
    }
  }

  // Takes in the 16 positions from `first` on, of which low .. high - 1 are seen, all of them if
  // kWhole. keys, values: [16][kSize + 8].
  template <bool kWhole>
  __device__ void attend(const T* queries, const T* keys, const T* values, int first, int low,
                         int high, float scale, float softcap, int lane) {
    float s[kTiles][4] = {};  // of keys lane / 4 and lane / 4 + 8
#pragma unroll
    for (int k = 0; k < kSize / 16; ++k) {
      uint32_t a[4];
      load_matrices(a, keys + (lane % 16) * kStride + k * 16 + lane / 16 * 8);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        uint32_t b[2];
        if constexpr (kKeepQ)
          b[0] = q[t][k][0], b[1] = q[t][k][1];
        else
          load_query(b, queries, t, k, lane);
        Half2<T>::mma(s[t], a, b[0], b[1]);
      }
    }
    uint32_t weights[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      weigh<kWhole>(s[t], t, weights[t], first, low, high, scale, softcap, lane);
#pragma unroll
    for (int j = 0; j < kSize / 16; ++j) {
      uint32_t a[4];
      load_matrices_transposed(
          a, values + (lane % 8 + lane / 16 * 8) * kStride + j * 16 + lane / 8 % 2 * 8);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) Half2<T>::mma(o[t][j], a, weights[t][0], weights[t][1]);
    }
  }

  // The weights of 16 keys from their products with the queries of tile t, as a right operand.
  template <bool kWhole>
  __device__ void weigh(float (&s)[4], int t, uint32_t (&weights)[2], int first, int low, int high,
                        float scale, float softcap, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x = s[i] * scale;
      // tanh(x) = 1 - 2 / (e^2x + 1)
      if (softcap > 0.f) x = softcap * (1.f - 2.f / (exp2f(x / softcap * (2.f * kLog2e)) + 1.f));
      const int position = first + lane / 4 + i / 2 * 8;
      s[i] = kWhole || (position >= low && position < high) ? x * kLog2e : -INFINITY;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = fmaxf(s[h], s[h + 2]);
#pragma unroll
      for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, d));
      top = fmaxf(top, m[t][h]);
      const float base = top == -INFINITY ? 0.f : top;
      const float shrink = exp2f(m[t][h] - base);
      m[t][h] = top;
      s[h] = exp2f(s[h] - base);
      s[h + 2] = exp2f(s[h + 2] - base);
      l[t][h] = l[t][h] * shrink + s[h] + s[h + 2];
#pragma unroll
      for (int j = 0; j < kSize / 16; ++j) {
        o[t][j][h] *= shrink;
        o[t][j][h + 2] *= shrink;
      }
    }
    weights[0] = transposed(Half2<T>::pack(s[0], s[1]));
    weights[1] = transposed(Half2<T>::pack(s[2], s[3]));
  }

  // Adds up the sums of all lanes of a head.
  __device__ void finish() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int d = 4; d < 32; d *= 2) l[t][h] += __shfl_xor_sync(kFullMask, l[t][h], d);
  }
};

// A warp's copies of its chunks of 16 positions, which lie in one block of the cache each.
template <class T, int kSize>
struct Chunks {
  const AttentionArgs& args;
  const int32_t* table;
  const T* kv;  // of the group
  int low, end;

  // Where the first key of a chunk lies, in elements from kv.
  __device__ long long offset_of(int at) const {
    if (at >= end) return 0;
    const int block = at / args.block;
    return (long long)table[block] * args.block_stride +
           (long long)(at - block * args.block) * args.position_stride;
  }

  // keys, values: [16][kSize + 8]; the pad of 16 bytes keeps ldmatrix free of bank conflicts.
  template <bool kWhole>
  __device__ void copy(T* keys, T* values, int at, long long offset, int lane) const {
    constexpr int kPieces = kSize / 8;  // of 16 bytes
    static_assert(kKeys * kPieces % 32 == 0);
#pragma unroll
    for (int i = 0; i < kKeys * kPieces / 32; ++i) {  // over positions, then the head size
      const int r = (i * 32 + lane) / kPieces, d = (i * 32 + lane) % kPieces * 8;
      const bool valid = (kWhole || (at + r >= low && at + r < end)) && d < args.size;
      const T* from = valid ? kv + offset + r * args.position_stride + d : kv;
      copy_async(keys + r * (kSize + 8) + d, from, valid);
      copy_async(values + r * (kSize + 8) + d, valid ? from + args.value_stride : kv, valid);
    }
  }

  __device__ bool whole(int at) const { return at >= low && at + kKeys <= end; }

  __device__ void fetch(T* keys, T* values, int at, long long offset, int lane) const {
    if (at >= end) return;
    if (whole(at))
      copy<true>(keys, values, at, offset, lane);
    else
      copy<false>(keys, values, at, offset, lane);
  }
};

// A CTA for the first part of each token and pair, so that the usual short ones need no search. The
// other parts are shared evenly by `ahead` CTAs before those, one to an SM, where the parts of a
// long row begin at once, and by those behind. In a part warp w walks the chunks of 16 positions
// w, w + kWarps, ... with its own copies in flight, and at the end the warps are put together.
template <class T, int kSize, int kTiles, int kWarps = decode_warps(kSize)>
__global__ void __launch_bounds__(kWarps * 32) decode_kernel(const AttentionArgs args, int ahead) {
  allow_next();
  extern __shared__ __align__(16) unsigned char memory[];
  constexpr int kHeads = 8 * kTiles, kMerged = kSize + 4;  // + 4 keeps the banks apart
  __shared__ float tops[kWarps][kHeads], sums[kWarps][kHeads];
  constexpr int kStride = kSize + 8, kTile = kKeys * kStride, kStep = kWarps * kKeys;
  T* stages = reinterpret_cast<T*>(memory);
  T* queries = stages + kWarps * kStages * 2 * kTile;
  float* merged = reinterpret_cast<float*>(stages);  // [kWarps][kHeads][kMerged], after the stages
  static_assert(kHeads * kMerged * 4 <= kStages * 2 * kTile * 2);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int repeats = args.heads / args.groups, tiles = (repeats + kHeads - 1) / kHeads;
  const int pairs = args.groups * tiles, firsts = args.decodes * pairs;
  const int extras = int(gridDim.x) - firsts;
  T* mine = stages + warp * kStages * 2 * kTile;
  Heads<T, kSize, kTiles> state;
  const int index = int(blockIdx.x) - ahead;  // 0 .. firsts - 1: of the first parts
  const bool is_first = index >= 0 && index < firsts;
  Item item{index / pairs, index % pairs, 0};
  for (int extra = index < 0 ? int(blockIdx.x) : int(blockIdx.x) - firsts;; extra += extras) {
    if (!is_first) item = find_extra(args, pairs, extra);
    if (item.token < 0) break;
    const int group = item.pair / tiles, first_head = item.pair % tiles * kHeads;
    const int rows = min(kHeads, repeats - first_head), head = group * repeats + first_head;
    const int64_t first_row = (int64_t)item.token * args.heads + head;
    T* out = static_cast<T*>(args.out) + first_row * args.size;
    const int sequence = sequence_of(args.starts, args.sequences, item.token);
    if (sequence < 0) {  // padding, which has no part but the first
      wait_for_previous();
      for (int i = threadIdx.x; i < rows * args.size; i += blockDim.x) out[i] = T(0.f);
      break;
    }
    const Split split = split_of(args, sequence, item.token);
    const int begin = split.begin + item.part * split.share + warp * kKeys;
    const Chunks<T, kSize> chunks{args, args.tables + sequence * args.table_stride,
                                  static_cast<const T*>(args.kv) + group * args.kv_head_stride,
                                  split.low,
                                  min(split.high, split.begin + (item.part + 1) * split.share)};
    state.clear();
    long long offset = chunks.offset_of(begin);
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      const int at = begin + stage * kStep;
      T* keys = mine + stage * 2 * kTile;
      // Only the last position is written by the previous kernel. All before it are complete: a
      // step has one token of each sequence here, or no earlier kernel that writes the cache.
      if (at + kKeys >= split.high) wait_for_previous();
      chunks.fetch(keys, keys + kTile, at, offset, lane);
      commit_async();
      offset = chunks.offset_of(at + kStep);
    }
    wait_for_previous();
    // while the first copies are in flight
    const T* q =
        static_cast<const T*>(args.q) + item.token * args.q_stride + head * args.q_head_stride;
    for (int i = threadIdx.x; i < kHeads * kSize;
         i += blockDim.x) {  // over heads, then the head size
      const int r = i / kSize, d = i % kSize;
      queries[r * kStride + d] = r < rows && d < args.size ? q[r * args.q_head_stride + d] : T(0.f);
    }
    __syncthreads();
    state.load_queries(queries, lane);
    int stage = 0;
    for (int at = begin; at < chunks.end; at += kStep) {  // over the chunks of the warp
      wait_async<kStages - 1>();
      __syncwarp();
      T* keys = mine + stage * 2 * kTile;
      if (chunks.whole(at))
        state.template attend<true>(queries, keys, keys + kTile, at, chunks.low, chunks.end,
                                    args.scale, args.softcap, lane);
      else
        state.template attend<false>(queries, keys, keys + kTile, at, chunks.low, chunks.end,
                                     args.scale, args.softcap, lane);
      __syncwarp();
      chunks.fetch(keys, keys + kTile, at + kStages * kStep, offset, lane);
      commit_async();
      offset = chunks.offset_of(at + (kStages + 1) * kStep);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    wait_async<0>();
    state.finish();
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = t * 8 + lane % 4 * 2 + h;
        if (lane < 4) {
          tops[warp][r] = state.m[t][h];
          sums[warp][r] = state.l[t][h];
        }
      }
    __syncthreads();  // the stages are free from here on
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = t * 8 + lane % 4 * 2 + i % 2;
        if (r >= rows) continue;
#pragma unroll
        for (int j = 0; j < kSize / 16; ++j)
          merged[(warp * kHeads + r) * kMerged + j * 16 + lane / 4 + i / 2 * 8] = state.o[t][j][i];
      }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * args.size;
         i += blockDim.x) {  // over heads, then the head size
      const int r = i / args.size, d = i % args.size;
      float top = tops[0][r];
      for (int w = 1; w < kWarps; ++w) top = fmaxf(top, tops[w][r]);
      const float base = top == -INFINITY ? 0.f : top;
      float sum = 0.f, value = 0.f;
      for (int w = 0; w < kWarps; ++w) {
        const float weight = exp2f(tops[w][r] - base);
        sum += weight * sums[w][r];
        value += weight * merged[(w * kHeads + r) * kMerged + d];
      }
      if (split.count == 1) {
        out[i] = T(value / sum);
      } else {
        float* part = args.workspace + ((first_row + r) * args.parts + item.part) * (args.size + 2);
        part[d] = value;
        if (d == 0) {
          part[args.size] = top;
          part[args.size + 1] = sum;
        }
      }
    }
    if (is_first) break;
    __syncthreads();  // before the next part fills the stages
  }
  if (blockIdx.x == 0) wait_for_previous();
}

// Grid (decodes, tiles of 8 heads), a warp each: puts the parts of a token together.
template <class T>
__global__ void __launch_bounds__(kCombineHeads * 32) combine_kernel(const AttentionArgs args) {
  static_assert(kAttentionMaxParts <= 32, "a lane for each part");
  allow_next();
  const int lane = threadIdx.x % 32, token = blockIdx.x;
  const int head = blockIdx.y * kCombineHeads + threadIdx.x / 32;
  const int sequence = sequence_of(args.starts, args.sequences, token);
  const int count = sequence < 0 ? 0 : split_of(args, sequence, token).count;
  if (count > 1 || (blockIdx.x == 0 && blockIdx.y == 0)) wait_for_previous();
  if (count <= 1 || head >= args.heads) return;
  const int64_t row = (int64_t)token * args.heads + head, width = args.size + 2;
  const float* parts = args.workspace + row * args.parts * width;
  const float* own = parts + lane * width + args.size;
  float top = lane < count ? own[0] : -INFINITY;
  const float share = lane < count ? own[1] : 0.f, mine = top;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, d));
  const float weight = top == -INFINITY ? 0.f : exp2f(mine - top);
  float sum = weight * share;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kFullMask, sum, d);
  for (int d0 = 0; d0 < args.size; d0 += 32) {  // over the head size
    const int d = d0 + lane;
    float value = 0.f;
#pragma unroll 8
    for (int p = 0; p < count; ++p) {
      const float of_part = __shfl_sync(kFullMask, weight, p);
      if (d < args.size) value += of_part * parts[p * width + d];
    }
    if (d < args.size) static_cast<T*>(args.out)[row * args.size + d] = T(value / sum);
  }
}

template <class T, int kSize, int kTiles>
void launch_decode(const AttentionArgs& args, cudaStream_t stream) {
  constexpr int kShared = decode_shared(kSize, kTiles);
  const int64_t tiles = ceil_div(args.heads / args.groups, 8 * kTiles);
  const int64_t firsts = args.decodes * args.groups * tiles;
  const int64_t extras =
      std::min<int64_t>(firsts * (args.parts - 1), decode_blocks(kSize) * multiprocessors());
  const int ahead = int(std::min<int64_t>(extras, multiprocessors()));
  const auto kernel = decode_kernel<T, kSize, kTiles>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  launch_chained(kernel, dim3(unsigned(firsts + extras)), decode_warps(kSize) * 32, kShared, stream,
                 args, ahead);
}

}  // namespace

void attention_decode(const AttentionArgs& args, cudaStream_t stream) {
  with_kernel_shape(args, [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int kSize = decltype(size)::value;
    if (args.heads / args.groups <= 8)
      launch_decode<T, kSize, 1>(args, stream);
    else
      launch_decode<T, kSize, 2>(args, stream);
    if (args.parts > 1)
      launch_chained(combine_kernel<T>, dim3(args.decodes, (args.heads - 1) / kCombineHeads + 1),
                     kCombineHeads * 32, 0, stream, args);
  });
}

}  // namespace lorax::cuda
