// y[T, N] = x[T, K] @ weight[N, K].T for T <= 256 on Hopper: the weights stream past few tokens.
//
// A cluster of 1, 2 or 3 CTAs owns a tile of 128 rows of the weight, each CTA a part of K and an SM
// (shared with small kernels only). One thread issues the loads of tiles of the weight and of x
// (bulk tensor copies), two warpgroups multiply them with 64 rows of the weight each; then the
// parts are added in the order of K, each CTA adding the rows that the others send it. How K is cut
// depends on N alone, so an element is one sum in one order, whatever the other tokens. Loads of
// weights start before the previous kernel has ended.
#include "chain.cuh"
#include "hopper.cuh"
#include "linear.h"
#include "mma.cuh"
#include "pack.h"

namespace lorax::cuda {
namespace {

constexpr int kRows = 128;  // of the weight: a tile
constexpr int kSlabs = kRows / 16;
constexpr int kStep = 64;        // of K: 128 bytes, the width of a swizzled tile
constexpr int kConsumers = 256;  // threads that multiply: two warpgroups, a warp for every 16 rows
constexpr int kThreads = kConsumers + 32;
constexpr int kSharedLimit = 200 * 1024;  // of an SM's 227 KiB

// What a CTA keeps in shared memory. What others send comes to where the tiles were.
template <int kTokens, int kSplit>
struct Shape {
  static constexpr int kOwnSlabs = (kSlabs + kSplit - 1) / kSplit;  // that it adds up, at most
  static constexpr int kSlabBytes = 16 * kTokens * 4;
  static constexpr int kWeightBytes = kRows * kStep * 2;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kStep * 2;
  static constexpr int kFit = (kSharedLimit - 256) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kBarriers = kStages * kStageBytes;
  static constexpr int kShared = kBarriers + kStages * 16 + 16;
  static_assert(kStages >= 2 && kShared <= kSharedLimit);
  static_assert((kSplit - 1) * kOwnSlabs * kSlabBytes <= kBarriers);
};

// Grid: tiles of 128 rows of the weight, clusters of kSplit CTAs that share one.
template <class T, int kTokens, int kSplit>
__global__ void __launch_bounds__(kThreads)
    linear_kernel(const __grid_constant__ CUtensorMap weight_map,
                  const __grid_constant__ CUtensorMap x_map, const LinearArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  using S = Shape<kTokens, kSplit>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t base = shared_address(memory);
  const uint32_t barriers = base + S::kBarriers;
  const auto full = [&](int stage) { return barriers + stage * 16; };
  const auto empty = [&](int stage) { return barriers + stage * 16 + 8; };
  const uint32_t arrived = barriers + S::kStages * 16;

  const int rank = kSplit > 1 ? int(cluster_rank()) : 0;
  const int row0 = blockIdx.x / kSplit * kRows;
  const int steps = int((args.columns + kStep - 1) / kStep);
  const int first = steps * rank / kSplit, count = steps * (rank + 1) / kSplit - first;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == kConsumers) {  // the producer
    prefetch_tensor_map(&weight_map);
    prefetch_tensor_map(&x_map);
    for (int stage = 0; stage < S::kStages; ++stage) {
      init_barrier(full(stage), 1);
      init_barrier(empty(stage), kConsumers / 32);
    }
    if (kSplit > 1) {
      init_barrier(arrived, 1);
      const int left = kSlabs - rank * S::kOwnSlabs;
      const int slabs = left < S::kOwnSlabs ? left : S::kOwnSlabs;
      arrive_expect_bytes(arrived, (kSplit - 1) * slabs * S::kSlabBytes);
    }
    fence_barrier_init();
  }
  if constexpr (kSplit > 1) {
    __syncwarp();
    cluster_arrive_relaxed();  // the fence publishes the barriers
    cluster_wait();
  } else {
    __syncthreads();
  }

  if (warp == kConsumers / 32) {
    if (lane == 0) {
      const auto load_weight = [&](int i) {
        const int stage = i % S::kStages;
        arrive_expect_bytes(full(stage), S::kStageBytes);
        load_tile_evict_first(base + stage * S::kStageBytes, &weight_map, (first + i) * kStep, row0,
                              full(stage));
      };
      const auto load_x = [&](int i) {
        const int stage = i % S::kStages;
        load_tile(base + stage * S::kStageBytes + S::kWeightBytes, &x_map, (first + i) * kStep, 0,
                  full(stage));
      };
      const int ahead = count < S::kStages ? count : S::kStages;
      for (int i = 0; i < ahead; ++i) load_weight(i);
      wait_for_previous();
      allow_next();  // after the wait: x is complete for whatever starts next
      for (int i = 0; i < ahead; ++i) load_x(i);
      for (int i = ahead; i < count; ++i) {
        wait_barrier(empty(i % S::kStages), (i / S::kStages - 1) & 1);
        load_weight(i);
        load_x(i);
      }
    }
    __syncwarp();
    if constexpr (kSplit > 1) {
      cluster_arrive();
      cluster_wait();
    }
  } else {
    constexpr int kTiles = kTokens / 8;                 // fragments of 8 tokens, 16 bytes a lane
    const uint32_t half = warp / 4 * (64 * kStep * 2);  // the warpgroup's rows of a tile
    float sums[kTokens / 2];
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.0f;
    for (int i = 0; i < count; ++i) {  // over this CTA's part of K
      const int stage = i % S::kStages;
      const uint32_t weight = base + stage * S::kStageBytes, x = weight + S::kWeightBytes;
      wait_barrier(full(stage), (i / S::kStages) & 1);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStep; k += 16)  // 32 bytes into the swizzled rows
        Wgmma<T, kTokens>::multiply_add(sums, tile_descriptor(weight + half + k * 2),
                                        tile_descriptor(x + k * 2));
      wgmma_commit();
      wgmma_wait<0>();
      if (lane == 0) arrive(empty(stage));
    }
    // Warp s has the sums of slab s, rows 16 s .. of the tile, and CTA s / kOwnSlabs adds them up.
    const int owner = warp / S::kOwnSlabs;
    const auto slab_address = [&](int sender) {  // of this warp's slab in its owner
      return base + (sender * S::kOwnSlabs + warp % S::kOwnSlabs) * S::kSlabBytes + lane * 16;
    };
    if constexpr (kSplit > 1) {
      __syncwarp();
      cluster_arrive();  // all have read the tiles
      cluster_wait();
      if (owner != rank) {
        const uint32_t to = remote_address(slab_address(rank < owner ? rank : rank - 1), owner);
        const uint32_t there = remote_address(arrived, owner);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) store_async_remote(to + j * 512, &sums[j * 4], there);
      }
    }
    if (owner == rank) {
      const int64_t row = row0 + warp * 16;
      float bias[2] = {0.0f, 0.0f};
      if (args.bias) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (row + lane / 4 + i * 8 < args.rows)
            bias[i] = widen(static_cast<const T*>(args.bias)[row + lane / 4 + i * 8]);
      }
      if (kSplit > 1) wait_barrier_cluster(arrived, 0);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float whole[4];
#pragma unroll
        for (int from = 0; from < kSplit; ++from) {  // in the order of K
          float v[4];
          if (from == rank) {
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = sums[j * 4 + i];
          } else {
            load_shared(v, slab_address(from < rank ? from : from - 1) + j * 512);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) whole[i] = from == 0 ? v[i] : whole[i] + v[i];
        }
        const int token = j * 8 + lane / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // rows 0 .. 7 of the slab, then 8 .. 15
          const uint32_t two =
              transposed(Half2<T>::pack(whole[2 * i] + bias[i], whole[2 * i + 1] + bias[i]));
          const int64_t column = row + i * 8 + lane % 4 * 2;
          if (token < args.tokens && column < args.rows)
            *reinterpret_cast<uint32_t*>(static_cast<T*>(args.y) + token * args.rows + column) =
                two;
        }
      }
    }
  }
  wait_for_previous();
  if constexpr (kSplit > 1) {
    __syncwarp();
    cluster_arrive_relaxed();  // no CTA exits while others may write to its memory
    cluster_wait();
  }
#else
  __trap();  // setup.py builds for 90a
#endif
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// The driver's function, looked up so that nothing links against the driver.
Encode tensor_map_encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
    return error == cudaSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

// Tiles of `tile_rows` rows by 64 columns of a matrix of 16-bit elements.
bool encode_tensor_map(CUtensorMap* map, const void* data, int64_t rows, int64_t columns,
                       int64_t stride, int tile_rows, bool bfloat16) {
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {kStep, cuuint32_t(tile_rows)}, ones[2] = {1, 1};
  return tensor_map_encoder()(
             map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(data), sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class T, int kTokens, int kSplit>
void launch(const LinearArgs& args, cudaStream_t stream) {
  using S = Shape<kTokens, kSplit>;
  const bool bfloat16 = args.dtype == DType::bfloat16;
  CUtensorMap weight, x;
  if (!encode_tensor_map(&weight, args.weight, args.rows, args.columns, args.weight_stride, kRows,
                         bfloat16) ||
      !encode_tensor_map(&x, args.x, args.tokens, args.columns, args.x_stride, kTokens, bfloat16))
    return;  // linear_supports refuses what cannot be encoded
  const auto kernel = linear_kernel<T, kTokens, kSplit>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kShared);
  const dim3 grid(unsigned(ceil_div(args.rows, kRows) * kSplit));
  launch_clusters(kSplit, kernel, grid, kThreads, S::kShared, stream, weight, x, args);
}

// Splits K into as many parts as let all CTAs run at once, so that all SMs read weights until the
// end. At most 3: fewer than 32 clusters of 4 would fit.
template <class T, int kTokens>
void launch_split(const LinearArgs& args, cudaStream_t stream) {
  const int64_t tiles = ceil_div(args.rows, kRows), num_sms = multiprocessors();
  if (tiles * 3 <= num_sms) return launch<T, kTokens, 3>(args, stream);
  if (tiles * 2 <= num_sms) return launch<T, kTokens, 2>(args, stream);
  launch<T, kTokens, 1>(args, stream);
}

template <class T>
void launch_tokens(const LinearArgs& args, cudaStream_t stream) {
  if (args.tokens <= 8) return launch_split<T, 8>(args, stream);
  if (args.tokens <= 16) return launch_split<T, 16>(args, stream);
  if (args.tokens <= 32) return launch_split<T, 32>(args, stream);
  if (args.tokens <= 64) return launch_split<T, 64>(args, stream);
  if (args.tokens <= 80) return launch_split<T, 80>(args, stream);
  if (args.tokens <= 96) return launch_split<T, 96>(args, stream);
  if (args.tokens <= 128) return launch_split<T, 128>(args, stream);
  if (args.tokens <= 160) return launch_split<T, 160>(args, stream);
  if (args.tokens <= 192) return launch_split<T, 192>(args, stream);
  if (args.tokens <= 224) return launch_split<T, 224>(args, stream);
  launch_split<T, 256>(args, stream);
}

}  // namespace

bool linear_supports(const LinearArgs& args) {
  const auto is_aligned = [](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
  };
  constexpr int64_t kMaxStride = int64_t(1) << 38;  // elements; a map's is below 2^40 bytes
  return args.dtype != DType::float32 && args.tokens > 0 && args.tokens <= kLinearFewTokens &&
         args.rows > 0 && args.rows % 8 == 0 && args.rows < (int64_t(1) << 31) &&
         args.columns >= kStep && args.columns < (int64_t(1) << 31) &&
         is_aligned(args.x, args.x_stride) && is_aligned(args.weight, args.weight_stride) &&
         args.x_stride >= args.columns && args.x_stride < kMaxStride &&
         args.weight_stride >= args.columns && args.weight_stride < kMaxStride &&
         compute_capability() == 90 && tensor_map_encoder();
}

void linear(const LinearArgs& args, cudaStream_t stream) {
  if (args.dtype == DType::bfloat16)
    launch_tokens<__nv_bfloat16>(args, stream);
  else
    launch_tokens<__half>(args, stream);
}

}  // namespace lorax::cuda
