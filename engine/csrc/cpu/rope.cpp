// Rotary position embedding of q and k in place, then k and v into the KV cache.
//
// Threads split the tokens; within a token the loops walk the heads, then the features by lanes.
#include "rope.h"

#include "vec.h"

namespace lorax::LORAX_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth waking a thread for

// (a, b) -> (a cos - b sin, b cos + a sin), with a = x[i], b = x[i + half].
template <class T>
LORAX_INLINE void rotate_halves(T* x, const float* cos, const float* sin, int64_t half) {
  const int64_t whole = half / kLanes * kLanes, rest = half - whole;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  if (rest) {
    const Vec a = load_partial(x + whole, rest), b = load_partial(x + half + whole, rest);
    const Vec c = load_partial(cos + whole, rest), s = load_partial(sin + whole, rest);
    store_partial(x + whole, a * c - b * s, rest);
    store_partial(x + half + whole, b * c + a * s, rest);
  }
}

// The same with a = x[2i], b = x[2i + 1].
template <class T>
LORAX_INLINE void rotate_pairs(T* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
    x[2 * i] = from_float<T>(a * cos[i] - b * sin[i]);
    x[2 * i + 1] = from_float<T>(b * cos[i] + a * sin[i]);
  }
}

template <class T>
void rotate_heads(const RopeStoreKvArgs& args, const Heads& heads, int64_t token) {
  const float* cos = args.cos_sin + args.positions[token] * args.cos_sin_stride;
  const float* sin = cos + args.half;
  for (int64_t h = 0; h < heads.count; ++h) {
    T* x = static_cast<T*>(heads.data) + token * heads.token_stride + h * heads.head_stride;
    if (args.interleaved) {
      rotate_pairs(x, cos, sin, args.half);
    } else {
      rotate_halves(x, cos, sin, args.half);
    }
  }
}

template <class T, class Cache>
void store_heads(const RopeStoreKvArgs& args, const Heads& heads, int64_t token, int64_t which) {
  const int64_t place = args.places[token];
  Cache* to = static_cast<Cache*>(args.kv) + place / args.block_size * args.kv_block_stride +
              which * args.kv_value_stride + place % args.block_size * args.kv_offset_stride;
  const int64_t whole = args.head_dim / kLanes * kLanes, rest = args.head_dim - whole;
  for (int64_t h = 0; h < heads.count; ++h, to += args.kv_head_stride) {
    const T* x =
        static_cast<const T*>(heads.data) + token * heads.token_stride + h * heads.head_stride;
    for (int64_t i = 0; i < whole; i += kLanes) store(to + i, load(x + i));
    if (rest) store_partial(to + whole, load_partial(x + whole, rest), rest);
  }
}

}  // namespace

void rope_store_kv(const RopeStoreKvArgs& args) {
  const int64_t work = (args.q.count + 2 * args.k.count) * args.head_dim + 1;
  parallel_for(args.tokens, (kGrain + work - 1) / work, [&](int64_t begin, int64_t end) {
    with_dtype(args.dtype, [&](auto element) {
      with_dtype(args.kv_dtype, [&](auto cached) {
        using T = decltype(element);
        using Cache = decltype(cached);
        for (int64_t token = begin; token < end; ++token) {
          if (args.half) {
            rotate_heads<T>(args, args.q, token);
            rotate_heads<T>(args, args.k, token);
          }
          store_heads<T, Cache>(args, args.k, token, 0);
          store_heads<T, Cache>(args, args.v, token, 1);
        }
      });
    });
  });
}

}  // namespace lorax::LORAX_ISA
