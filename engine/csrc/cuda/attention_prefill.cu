// Prompts and mixed batches: FlashAttention-2 over the paged cache.
#include <type_traits>

#include "attention_mma.cuh"
#include "chain.cuh"

namespace lorax::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kRows = 64;   // query rows of a CTA, 16 a warp
constexpr int kStages = 2;  // tiles of keys and values in flight or in use

template <int kSize>
constexpr int kKeysOf = kSize <= 128 ? 64 : 32;  // positions of a tile

template <int kSize>
constexpr int prefill_shared() {  // bytes: queries, then the stages, keys and values
  return (kRows + kStages * 2 * kKeysOf<kSize>)*(kSize + 8) * 2;
}

// Of the sequence behind the decodes.
__host__ __device__ inline int first_tile(const AttentionArgs& args) {
  return int(int64_t(args.decodes) * (args.heads / args.groups) / kRows) + args.decodes;
}

// Grid (upper bound of the tiles, groups). The rows of a sequence are its tokens x the heads of
// the group, token by token; a tile is 64 of them. Sequence s has the tiles from
// starts[s] * repeats / 64 + s on: room for its last, partial one. The first tile of the grid is
// that of sequence `decodes`, ahead of which every sequence has one token. The CTA walks the tiles
// of 64 (or 32) positions that its rows see; tiles begin at multiples of their size, so that a row
// does not depend on how its prompt is cut into steps.
template <class T, int kSize>
__global__ void __launch_bounds__(kWarps * 32) prefill_kernel(const AttentionArgs args) {
  allow_next();
  wait_for_previous();
  extern __shared__ __align__(16) unsigned char memory[];
  constexpr int kKeys = kKeysOf<kSize>, kStride = kSize + 8, kTile = kKeys * kStride;
  constexpr int kShare = kKeys / kWarps;  // rows of a tile that a warp copies
  T* queries = reinterpret_cast<T*>(memory);
  T* stages = queries + kRows * kStride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = blockIdx.y, repeats = args.heads / args.groups;

  // later tiles see more keys: start with them
  const int index = first_tile(args) + gridDim.x - 1 - blockIdx.x;
  int s = args.decodes, above = args.sequences;  // first tile of s <= index < first tile of above
  while (above - s > 1) {
    const int middle = (s + above) / 2;
    (int64_t(args.starts[middle]) * repeats / kRows + middle <= index ? s : above) = middle;
  }
  const int first_token = args.starts[s], tokens = args.starts[s + 1] - first_token;
  const int64_t first_row = (index - (int64_t(first_token) * repeats / kRows + s)) * int64_t(kRows);
  const int64_t all_rows = int64_t(tokens) * repeats;
  if (first_row >= all_rows) return;
  const int rows = int(min(int64_t(kRows), all_rows - first_row));
  const int32_t* table = args.tables + s * args.table_stride;
  const int before = args.lengths[s] - tokens;  // positions ahead of the step

  // what the tile sees: from the window of its first token up to its last token
  const int first = before + int(first_row / repeats);
  const int tile_high = before + int((first_row + rows - 1) / repeats) + 1;
  const int tile_low = args.window > 0 ? max(first + 1 - args.window, 0) : 0;
  const int begin = tile_low / kKeys * kKeys;

  auto copy = [&](int at, int stage) {
    long long row = -1;
    if (lane < kShare)
      row = row_of(args, table, group, at + warp * kShare + lane, tile_low, tile_high);
    T* keys = stages + stage * 2 * kTile + warp * kShare * kStride;
    copy_rows<T, kSize, kShare>(args, keys, keys + kTile, row, lane);
  };
  copy(begin, 0);
  commit_async();

  const T* q = static_cast<const T*>(args.q);
  for (int i = threadIdx.x; i < kRows * kSize; i += blockDim.x) {  // over rows, then head size
    const int r = i / kSize, d = i % kSize;
    const int64_t row = first_row + r;
    queries[r * kStride + d] = r < rows && d < args.size
                                   ? q[(first_token + row / repeats) * args.q_stride +
                                       (group * repeats + row % repeats) * args.q_head_stride + d]
                                   : T(0.f);
  }
  __syncthreads();

  Rows<T, kSize> state;
  const T* mine = queries + warp * 16 * kStride;
  state.load_queries(mine, lane);
  state.clear();
  int low[2], high[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = warp * 16 + lane / 4 + i * 8;
    high[i] = r < rows ? before + int((first_row + r) / repeats) + 1 : 0;
    low[i] = args.window > 0 ? max(high[i] - args.window, 0) : 0;
  }
  int stage = 0;
  for (int at = begin; at < tile_high; at += kKeys) {  // over tiles of positions
    if (at + kKeys < tile_high) copy(at + kKeys, stage ^ 1);
    commit_async();
    wait_async<1>();
    __syncthreads();
    const T* keys = stages + stage * 2 * kTile;
    state.template attend<kKeys>(mine, keys, keys + kTile, at, low, high, args.scale, args.softcap,
                                 lane);
    __syncthreads();  // before the next copy into this stage
    stage ^= 1;
  }
  wait_async<0>();
  state.finish();

  T* out = static_cast<T*>(args.out);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = warp * 16 + lane / 4 + i * 8;
    if (r >= rows) continue;
    const int64_t row = first_row + r;
    T* to = out + ((first_token + row / repeats) * args.heads + group * repeats + row % repeats) *
                      args.size;
    const float inverse = 1.f / state.l[i];
#pragma unroll
    for (int j = 0; j < kSize / 8; ++j) {  // over the head size
      const int d = j * 8 + lane % 4 * 2;
      if (d < args.size)
        *reinterpret_cast<uint32_t*>(to + d) =
            Half2<T>::pack(state.o[j][2 * i] * inverse, state.o[j][2 * i + 1] * inverse);
    }
  }
}

}  // namespace

void attention_prefill(const AttentionArgs& args, cudaStream_t stream) {
  const int64_t rows = int64_t(args.tokens) * (args.heads / args.groups);
  const dim3 grid(unsigned(rows / kRows + args.sequences - first_tile(args)), args.groups);
  for_kernel(args, [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int kSize = decltype(size)::value, kShared = prefill_shared<kSize>();
    static_assert(kShared <= kSharedMemory);
    cudaFuncSetAttribute(prefill_kernel<T, kSize>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         kShared);
    launch_chained(prefill_kernel<T, kSize>, grid, kWarps * 32, kShared, stream, args);
  });
}

}  // namespace lorax::cuda
