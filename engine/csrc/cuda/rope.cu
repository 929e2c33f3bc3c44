// Rotary embedding of q and k in place, and the store of k and v in the paged cache.
#include "chain.cuh"
#include "pack.h"
#include "rope.h"

namespace lorax::cuda {
namespace {

constexpr int kThreads = 128;

// The work on one token, cut into tasks of one thread each, in this order: every q head, every k
// head, every v head. A task rotates the features of one or two packs, or copies one pack.
struct Tasks {
  uint32_t rotations;  // of one q or k head
  uint32_t copies;     // of one k head: packs behind the rotated features
  uint32_t packs;      // of one v head
  uint32_t end_q, end_k, end_v;
};

template <class KV, int N, class T>
__device__ __forceinline__ void store_kv(KV* to, const Pack<T, N>& pack) {
  Pack<KV, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.v[i] = narrow<KV>(widen(pack.v[i]));
  store_pack<N>(to, out);
}

// Rotates (a, b); products and sum are rounded one by one, as the reference does.
template <class T>
__device__ __forceinline__ void rotate(T& a, T& b, float cos, float sin) {
  const float x = widen(a), y = widen(b);
  a = narrow<T>(__fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin)));
  b = narrow<T>(__fadd_rn(__fmul_rn(y, cos), __fmul_rn(x, sin)));
}

// Rotation `index` of a head at `head`; the rotated features also go to `cached` unless it is null.
// Not interleaved: feature j turns with half + j, N pairs a task. Interleaved: 2 j turns with
// 2 j + 1, N / 2 pairs of one pack a task, or one pair where N = 1.
template <class T, class KV, int N, bool kInterleaved>
__device__ __forceinline__ void rotate_task(T* head, KV* cached, const float* cos, uint32_t half,
                                            uint32_t index) {
  const float* sin = cos + half;
  if constexpr (kInterleaved && N > 1) {
    const uint32_t at = index * N;
    Pack<T, N> pack = load_pack<N>(head + at);
    const Pack<float, N / 2> c = load_pack<N / 2>(cos + at / 2);
    const Pack<float, N / 2> s = load_pack<N / 2>(sin + at / 2);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) rotate(pack.v[2 * i], pack.v[2 * i + 1], c.v[i], s.v[i]);
    store_pack<N>(head + at, pack);
    if (cached) store_kv<KV, N>(cached + at, pack);
  } else {
    const uint32_t pair = index * N;
    const uint32_t at_a = kInterleaved ? 2 * pair : pair;
    const uint32_t at_b = kInterleaved ? 2 * pair + 1 : half + pair;
    Pack<T, N> a = load_pack<N>(head + at_a), b = load_pack<N>(head + at_b);
    const Pack<float, N> c = load_pack<N>(cos + pair), s = load_pack<N>(sin + pair);
#pragma unroll
    for (int i = 0; i < N; ++i) rotate(a.v[i], b.v[i], c.v[i], s.v[i]);
    store_pack<N>(head + at_a, a);
    store_pack<N>(head + at_b, b);
    if (cached) {
      store_kv<KV, N>(cached + at_a, a);
      store_kv<KV, N>(cached + at_b, b);
    }
  }
}

// Tile: kThreads tasks of one token; blockIdx.x walks the tokens, blockIdx.y the tiles of tasks.
template <class T, class KV, int N, bool kInterleaved>
__global__ void __launch_bounds__(kThreads)
    rope_store_kv_kernel(const RopeStoreKvArgs args, const Tasks tasks) {
  allow_next();
  wait_for_previous();
  const int64_t token = blockIdx.x;
  uint32_t task = blockIdx.y * kThreads + threadIdx.x;
  if (task >= tasks.end_v) return;
  const uint32_t half = uint32_t(args.half);
  const float* cos = half ? args.cos_sin + args.positions[token] * args.cos_sin_stride : nullptr;
  if (task < tasks.end_q) {
    T* head = static_cast<T*>(args.q.data) + token * args.q.token_stride +
              int64_t(task / tasks.rotations) * args.q.head_stride;
    rotate_task<T, KV, N, kInterleaved>(head, static_cast<KV*>(nullptr), cos, half,
                                        task % tasks.rotations);
    return;
  }
  const int64_t place = args.places[token];
  KV* cached = static_cast<KV*>(args.kv) + place / args.block_size * args.kv_block_stride +
               place % args.block_size * args.kv_offset_stride;
  if (task < tasks.end_k) {
    task -= tasks.end_q;
    const uint32_t of_head = tasks.rotations + tasks.copies;
    const int64_t index = task / of_head;
    task %= of_head;
    T* head =
        static_cast<T*>(args.k.data) + token * args.k.token_stride + index * args.k.head_stride;
    cached += index * args.kv_head_stride;
    if (task < tasks.rotations) {
      rotate_task<T, KV, N, kInterleaved>(head, cached, cos, half, task);
    } else {
      const uint32_t at = 2 * half + (task - tasks.rotations) * N;
      store_kv<KV, N>(cached + at, load_pack<N>(head + at));
    }
    return;
  }
  task -= tasks.end_k;
  const int64_t index = task / tasks.packs;
  const uint32_t at = task % tasks.packs * N;
  const T* head =
      static_cast<const T*>(args.v.data) + token * args.v.token_stride + index * args.v.head_stride;
  store_kv<KV, N>(cached + args.kv_value_stride + index * args.kv_head_stride + at,
                  load_pack<N>(head + at));
}

template <class T, class KV, int N>
void launch(const RopeStoreKvArgs& args, cudaStream_t stream) {
  Tasks tasks{};
  tasks.rotations = uint32_t(args.interleaved && N > 1 ? 2 * args.half / N : args.half / N);
  tasks.copies = uint32_t((args.head_dim - 2 * args.half) / N);
  tasks.packs = uint32_t(args.head_dim / N);
  tasks.end_q = uint32_t(args.q.count) * tasks.rotations;
  tasks.end_k = tasks.end_q + uint32_t(args.k.count) * (tasks.rotations + tasks.copies);
  tasks.end_v = tasks.end_k + uint32_t(args.v.count) * tasks.packs;
  if (tasks.end_v == 0) return;
  const dim3 grid(unsigned(args.tokens), unsigned(ceil_div(tasks.end_v, kThreads)));
  if (args.interleaved) {
    launch_chained(rope_store_kv_kernel<T, KV, N, true>, grid, kThreads, 0, stream, args, tasks);
  } else {
    launch_chained(rope_store_kv_kernel<T, KV, N, false>, grid, kThreads, 0, stream, args, tasks);
  }
}

bool heads_fit(const Heads& heads, int n) {
  return fits_packs(heads.data, heads.token_stride, n) && heads.head_stride % n == 0;
}

bool all_fit(const RopeStoreKvArgs& args, int n) {
  const bool cos_sin = args.half == 0 || fits_packs(args.cos_sin, args.cos_sin_stride, 4);
  return cos_sin && heads_fit(args.q, n) && heads_fit(args.k, n) && heads_fit(args.v, n) &&
         fits_packs(args.kv, args.kv_block_stride, n) && args.kv_value_stride % n == 0 &&
         args.kv_offset_stride % n == 0 && args.kv_head_stride % n == 0 && args.head_dim % n == 0 &&
         (args.interleaved ? 2 * args.half : args.half) % n == 0;
}

}  // namespace

void rope_store_kv(const RopeStoreKvArgs& args, cudaStream_t stream) {
  if (args.tokens == 0 || args.head_dim == 0) return;
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_dtype(args.kv_dtype, [&](auto kv_tag) {
      using KV = typename decltype(kv_tag)::type;
      if (all_fit(args, kPack<T>)) {
        launch<T, KV, kPack<T>>(args, stream);
      } else {
        launch<T, KV, 1>(args, stream);
      }
    });
  });
}

}  // namespace lorax::cuda
