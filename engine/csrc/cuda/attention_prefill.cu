// Prompts and mixed batches: FlashAttention-2 over the paged cache.
#include <type_traits>

#include "attention_rows.cuh"
#include "chain.cuh"

namespace lorax::cuda {
namespace {

constexpr int kWarps = kPrefillWarps, kRows = kPrefillRows;
static_assert(kRows == kWarps * 16 && kPrefillStages == 2);

// Index of the first tile of the first sequence after the decodes.
__host__ __device__ inline int first_tile(const AttentionArgs& args) {
  return prefill_tile(args.decodes, args.decodes, args.heads / args.groups);
}

// The rows of a CTA, and the positions low .. high - 1 that any of them sees.
struct Tile {
  int sequence, first_token, first_row, rows;
  int before;  // positions of the sequence ahead of the step
  int low, high;
};

// The thread that has the sequence of tile `index` tells the others, through 16 bytes at `found`.
__device__ inline Tile find_tile(const AttentionArgs& args, int index, int repeats, int4* found) {
#pragma unroll 1
  for (int s = args.decodes + threadIdx.x; s < args.sequences; s += kWarps * 32) {
    const int start = args.starts[s], end = args.starts[s + 1], length = args.lengths[s];
    const bool after = index >= prefill_tile(start, s, repeats);
    const bool before = index < prefill_tile(end, s + 1, repeats) || s + 1 == args.sequences;
    if (after & before & (length >= 0)) *found = make_int4(s, start, end - start, length);
  }
  __syncthreads();
  const auto [s, start, tokens, length] = *found;
  Tile tile;
  tile.sequence = s;
  tile.first_token = start;
  tile.first_row = (index - prefill_tile(start, s, repeats)) * kRows;
  tile.rows = min(kRows, tokens * repeats - tile.first_row);
  tile.before = length - tokens;
  // from the window of the first token up to the last token
  const int first = tile.before + unsigned(tile.first_row) / unsigned(repeats);
  tile.low = args.window > 0 ? max(first + 1 - args.window, 0) : 0;
  tile.high = tile.before + unsigned(tile.first_row + tile.rows - 1) / unsigned(repeats) + 1;
  return tile;
}

// What lies behind row r of the tile, in the pad of row r of the stages: the positions up to its
// own one, and which of the tokens x heads it is in `out`, -1 if there is no such row.
struct RowEnd {
  int high, out;
};
template <int kSize, class T>
__device__ __forceinline__ RowEnd& row_end(T* stages, int r) {
  return *reinterpret_cast<RowEnd*>(stages + r * (kSize + 8) + kSize);
}

// The least and the greatest `high` of the rows of a warp; both are 0 if it has no rows.
struct VisibleRange {
  int first, last;

  __device__ explicit VisibleRange(int high)
      : first(__reduce_min_sync(kFullMask, high)), last(__reduce_max_sync(kFullMask, high)) {}
  // Whether a row sees one of the positions at .. at + keys - 1; every row each of them.
  __device__ bool any(int at, int keys, int window) const {
    return at < last && (window == 0 || at + keys > first - window);
  }
  __device__ bool all(int at, int keys, int window) const {
    return at + keys <= first && (window == 0 || at >= last - window);
  }
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Scales scores, times log2 e. A row's bits must not depend on the others, nor on whether a mask
// follows: no product here is contracted with what comes behind it.
template <int kKeys>
__device__ __forceinline__ void scale_scores(float (&s)[kKeys / 8][4], float scale, float softcap) {
  if (softcap > 0.f) {  // tanh(x) = 1 - 2 / (e^2x + 1)
    const float inner = scale / softcap * (2.f * kLog2e), outer = softcap * kLog2e;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float e = exp2_fast(__fmul_rn(s[j][i], inner));
        s[j][i] = __fmul_rn(outer, __fsub_rn(1.f, __fdividef(2.f, __fadd_rn(e, 1.f))));
      }
  } else {
    const float factor = scale * kLog2e;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = __fmul_rn(s[j][i], factor);
  }
}

// Of the positions from `at` on, those that the lane's rows do not see.
template <int kKeys>
__device__ __forceinline__ void mask_scores(float (&s)[kKeys / 8][4], int at, const int (&highs)[2],
                                            int window, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int high = highs[i / 2] - at - lane % 4 * 2 - i % 2;
    const int low = window > 0 ? high - window : 0;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)  // over positions, 8 at a time
      if (j * 8 < low || j * 8 >= high) s[j][i] = -INFINITY;
  }
}

// Scores to weights; the state takes in their maximum and sum, and shrinks to match.
template <int kKeys, class T, int kSize>
__device__ __forceinline__ void weigh_scores(Rows<T, kSize>& state, float (&s)[kKeys / 8][4]) {
  float shrink[2], base[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = state.m[i];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) top = fmaxf(top, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
    top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
    base[i] = top == -INFINITY ? 0.f : top;
    shrink[i] = exp2_fast(__fsub_rn(state.m[i], base[i]));
    state.m[i] = top;
  }
  // a factor of 1 changes no bit
  if (__any_sync(kFullMask, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) state.l[i] = __fmul_rn(state.l[i], shrink[i]);
#pragma unroll
    for (int j = 0; j < kSize / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) state.o[j][i] *= shrink[i / 2];
  }
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[j][i] = exp2_fast(__fsub_rn(s[j][i], base[i / 2]));
      state.l[i / 2] += s[j][i];
    }
}

// The 16 rows of a warp to shared memory, 16 bytes at a time where q's layout allows it. Lane i
// knows where row i lies in q; -1 for none.
template <class T, int kSize>
__device__ __forceinline__ void copy_queries(const AttentionArgs& args, T* to, long long row,
                                             int lane) {
  const T* q = static_cast<const T*>(args.q);
  if (fits_packs(q, args.q_stride, 8) && args.q_head_stride % 8 == 0)
    return copy_tile<T, kSize, 16>(q, to, row, args.size, lane);
#pragma unroll 1
  for (int r = 0; r < 16; ++r) {
    const long long at = __shfl_sync(kFullMask, row, r);
    for (int d = lane; d < kSize; d += 32)  // over the head size
      to[r * (kSize + 8) + d] = at >= 0 && d < args.size ? q[at + d] : T(0.f);
  }
}

// The 16 rows of a warp from `first` on to `out`, through shared memory that is its own.
template <class T, int kSize>
__device__ __forceinline__ void store_rows(const AttentionArgs& args, const Rows<T, kSize>& state,
                                           T* stages, T* staged, int first, int lane) {
  constexpr int kChunks = kSize / 8, kStride = kSize + 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float inverse = 1.f / state.l[i];
    T* to = staged + (lane / 4 + i * 8) * kStride + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kSize / 8; ++j)  // over the head size
      *reinterpret_cast<uint32_t*>(to + j * 8) =
          Half2<T>::pack(state.o[j][2 * i] * inverse, state.o[j][2 * i + 1] * inverse);
  }
  __syncwarp();
  T* out = static_cast<T*>(args.out);
#pragma unroll
  for (int i = 0; i < 16 * kChunks / 32; ++i) {  // over rows, then chunks of the head size
    const int r = (i * 32 + lane) / kChunks, d = (i * 32 + lane) % kChunks * 8;
    const int at = row_end<kSize>(stages, first + r).out;
    if (at >= 0 && d < args.size)
      store_pack(out + int64_t(at) * args.size + d, load_pack<8>(staged + r * kStride + d));
  }
}

// Grid (upper bound of the tiles, groups). The rows of a sequence are its tokens x the heads of
// the group, token by token; a tile is 64 of them. Sequence s has the tiles from
// starts[s] * repeats / 64 + s on: room for its last, partial one. The first tile of the grid is
// that of sequence `decodes`, ahead of which every sequence has one token. The CTA walks the tiles
// of 64 (or 32) positions that its rows see; tiles begin at multiples of their size, so that a row
// does not depend on how its prompt is cut into steps.
template <class T, int kSize>
__global__ void __launch_bounds__(kWarps * 32, prefill_blocks(kSize))
    prefill_kernel(const AttentionArgs args) {
  allow_next();
  extern __shared__ __align__(16) unsigned char memory[];
  constexpr int kKeys = prefill_keys(kSize), kStride = kSize + 8, kHalf = kKeys * kStride;
  constexpr int kShare = kKeys / kWarps;  // rows of a tile that a warp copies
  constexpr bool kKeepQ = keeps_queries(kSize);
  static_assert(!kKeepQ || kKeys == kRows);
  T* stages = reinterpret_cast<T*>(memory);  // [2][keys, values][kKeys][kStride]
  T* queries = stages + (kKeepQ ? 2 : 4) * kHalf;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = blockIdx.y, repeats = args.heads / args.groups;
  T* mine = queries + warp * 16 * kStride;

  // later tiles see more keys: start with them
  const int index = first_tile(args) + gridDim.x - 1 - blockIdx.x;
  const Tile tile =
      find_tile(args, index, repeats, reinterpret_cast<int4*>(&row_end<kSize>(stages, kRows)));
  if (tile.rows <= 0) {
    if (blockIdx.x == 0) wait_for_previous();
    return;
  }
  auto find_row = [&](int at, int low) {
    return key_offset(args, args.tables + tile.sequence * args.table_stride, group,
                      at + warp * kShare + lane, low, tile.high);
  };
  const int begin = tile.low / kKeys * kKeys;
  const long long first_row = find_row(begin, tile.low);
  long long next_row = find_row(begin + kKeys, 0);

  // Lane i has row i % 16 of the warp. Rows behind the last one see what that sees.
  const int r = warp * 16 + lane % 16, row = tile.first_row + min(r, tile.rows - 1);
  const int token = unsigned(row) / unsigned(repeats), batch_token = tile.first_token + token;
  const int head = group * repeats + row - token * repeats;
  const int high = tile.before + token + 1;
  const long long query =
      r < tile.rows ? batch_token * args.q_stride + head * args.q_head_stride : -1;
  row_end<kSize>(stages, r) = {high, r < tile.rows ? batch_token * args.heads + head : -1};
  const VisibleRange visible(warp * 16 < tile.rows ? high : 0);

  wait_for_previous();
  const T* kv = static_cast<const T*>(args.kv);
  T* share = stages + warp * kShare * kStride;
  copy_queries<T, kSize>(args, mine, query, lane);
  copy_tile<T, kSize, kShare>(kv, share, first_row, args.size, lane);
  commit_async();
  copy_tile<T, kSize, kShare>(kv + args.value_stride, share + kHalf, first_row, args.size, lane);
  commit_async();

  Rows<T, kSize> state;
  state.clear();
  wait_async<1>();
  __syncwarp();
  state.load_queries(mine, lane);
  int stage = 0;
  for (int at = begin; at < tile.high; at += kKeys) {  // over tiles of positions
    if (at != begin) wait_async<0>();
    __syncthreads();  // the tile is there, and nobody reads the other stage
    if (at + kKeys < tile.high) {
      T* to = share + (stage ^ 1) * 2 * kHalf;
      copy_rows<T, kSize, kShare>(args, to, to + kHalf, next_row, lane);
      next_row = find_row(at + 2 * kKeys, 0);
    }
    commit_async();
    const T* keys = stages + stage * 2 * kHalf;
    const bool seen = visible.any(at, kKeys, args.window);
    float s[kKeys / 8][4];
    if (seen) state.template multiply<kKeys>(s, mine, keys, lane);
    if (at == begin) {  // the first values come behind the keys
      wait_async<1>();
      __syncthreads();
    }
    if (seen) {
      scale_scores<kKeys>(s, args.scale, args.softcap);
      if (!visible.all(at, kKeys, args.window)) {
        const int own = warp * 16 + lane / 4;
        const int highs[2] = {row_end<kSize>(stages, own).high,
                              row_end<kSize>(stages, own + 8).high};
        mask_scores<kKeys>(s, at, highs, args.window, lane);
      }
      weigh_scores<kKeys>(state, s);
      state.template add_values<kKeys>(s, keys + kHalf, lane);
    }
    stage ^= 1;
  }
  if (visible.last == 0) return;
  state.finish();
  // The stage that the last tile did not have is free.
  T* staged = kKeepQ ? stages + stage * 2 * kHalf + warp * 16 * kStride : mine;
  store_rows(args, state, stages, staged, warp * 16, lane);
}

}  // namespace

void attention_prefill(const AttentionArgs& args, cudaStream_t stream) {
  const int64_t rows = int64_t(args.tokens) * (args.heads / args.groups);
  const dim3 grid(unsigned(rows / kRows + args.sequences - first_tile(args)), args.groups);
  with_kernel_shape(args, [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int kSize = decltype(size)::value, kShared = prefill_shared(kSize);
    cudaFuncSetAttribute(prefill_kernel<T, kSize>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         kShared);
    launch_chained(prefill_kernel<T, kSize>, grid, kWarps * 32, kShared, stream, args);
  });
}

}  // namespace lorax::cuda
