// RMS norm and gated activations: one pass over rows, arithmetic in float32.
#include "elementwise.h"

#include "vec.h"

namespace lorax::LORAX_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth waking a thread for

int64_t row_grain(int64_t width) { return width >= kGrain ? 1 : kGrain / (width > 0 ? width : 1); }

// residual + x, rounded to the element type, is what is normalised: as if the addition were an op
// of its own.
template <class T>
LORAX_INLINE Vec add_residual(const T* x, T* residual, int64_t count) {
  T lanes[kLanes];
  if (count == kLanes) {
    store(lanes, load(x) + load(residual));
    std::memcpy(residual, lanes, sizeof lanes);
  } else {
    store(lanes, load_partial(x, count) + load_partial(residual, count));
    std::memcpy(residual, lanes, size_t(count) * sizeof(T));
  }
  return load(lanes);
}

template <class T, class W>
void norm_rows(const AddRmsNormArgs& args, int64_t begin, int64_t end) {
  const W* weight = static_cast<const W*>(args.weight);
  const int64_t whole = args.width / kLanes * kLanes, rest = args.width - whole;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    T* out = static_cast<T*>(args.out) + row * args.width;
    Vec squares = splat(0.0f);
    if (args.residual) {
      T* residual = static_cast<T*>(args.residual) + row * args.residual_stride;
      for (int64_t i = 0; i < whole; i += kLanes) {
        const Vec v = add_residual(x + i, residual + i, kLanes);
        squares = fma(v, v, squares);
      }
      if (rest) {
        const Vec v = add_residual(x + whole, residual + whole, rest);
        squares = fma(v, v, squares);
      }
      x = residual;
    } else {
      for (int64_t i = 0; i < whole; i += kLanes) {
        const Vec v = load(x + i);
        squares = fma(v, v, squares);
      }
      if (rest) {
        const Vec v = load_partial(x + whole, rest);
        squares = fma(v, v, squares);
      }
    }
    const Vec scale = splat(1.0f / std::sqrt(reduce_add(squares) / float(args.width) + args.eps));
    for (int64_t i = 0; i < whole; i += kLanes)
      store(out + i, load(x + i) * scale * load(weight + i));
    if (rest) {
      store_partial(out + whole,
                    load_partial(x + whole, rest) * scale * load_partial(weight + whole, rest),
                    rest);
    }
  }
}

// 1 + erf(x). Abramowitz and Stegun 7.1.26; absolute error below 2e-7, without cancellation for
// negative x.
LORAX_INLINE Vec one_plus_erf(Vec x) {
  const Vec magnitude = max(x, -x);
  const Vec t = splat(1.0f) / fma(magnitude, splat(0.3275911f), splat(1.0f));
  Vec p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const Vec tail = p * t * exp(-magnitude * magnitude);
  return x < splat(0.0f) ? tail : splat(2.0f) - tail;
}

// x * sigmoid(z)
LORAX_INLINE Vec times_sigmoid(Vec x, Vec z) { return x / (splat(1.0f) + exp(-z)); }

template <Activation act>
LORAX_INLINE Vec activate(Vec x) {
  if constexpr (act == Activation::silu) return times_sigmoid(x, x);
  if constexpr (act == Activation::gelu)
    return splat(0.5f) * x * one_plus_erf(x * splat(0.70710678f));
  // (1 + tanh(z)) / 2 = sigmoid(2 z)
  return times_sigmoid(x, splat(1.59576912f) * fma(splat(0.044715f) * x * x, x, x));
}

// As in the reference, the activation is rounded to the element type before the product.
template <Activation act, class T>
LORAX_INLINE Vec gated(Vec gate, Vec up) {
  T lanes[kLanes];
  store(lanes, activate<act>(gate));
  return load(lanes) * up;
}

template <Activation act, class T>
void act_rows(const ActAndMulArgs& args, int64_t begin, int64_t end) {
  const int64_t whole = args.width / kLanes * kLanes, rest = args.width - whole;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(args.x) + row * args.x_stride;
    const T* up = gate + args.width;
    T* out = static_cast<T*>(args.out) + row * args.width;
    for (int64_t i = 0; i < whole; i += kLanes)
      store(out + i, gated<act, T>(load(gate + i), load(up + i)));
    if (rest) {
      const Vec v = gated<act, T>(load_partial(gate + whole, rest), load_partial(up + whole, rest));
      store_partial(out + whole, v, rest);
    }
  }
}

template <class T>
void act_rows(const ActAndMulArgs& args, int64_t begin, int64_t end) {
  switch (args.act) {
    case Activation::silu:
      return act_rows<Activation::silu, T>(args, begin, end);
    case Activation::gelu:
      return act_rows<Activation::gelu, T>(args, begin, end);
    case Activation::gelu_tanh:
      return act_rows<Activation::gelu_tanh, T>(args, begin, end);
  }
}

}  // namespace

void add_rms_norm(const AddRmsNormArgs& args) {
  parallel_for(args.rows, row_grain(args.width), [&](int64_t begin, int64_t end) {
    with_dtype(args.dtype, [&](auto x) {
      with_dtype(args.weight_dtype,
                 [&](auto weight) { norm_rows<decltype(x), decltype(weight)>(args, begin, end); });
    });
  });
}

void act_and_mul(const ActAndMulArgs& args) {
  parallel_for(args.rows, row_grain(args.width), [&](int64_t begin, int64_t end) {
    with_dtype(args.dtype, [&](auto x) { act_rows<decltype(x)>(args, begin, end); });
  });
}

}  // namespace lorax::LORAX_ISA
