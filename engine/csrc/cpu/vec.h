// A vector of float32 as wide as the instruction set allows, and conversions from and to bfloat16
// and float16.
//
// Only for kernel sources (see kernels.h). Vec is a GCC/Clang vector type, so + - * / work on it
// lane by lane. Multiply-add is always spelled `fma`: the build forbids the compiler to contract,
// so equal code gives equal bits in every tile shape.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LORAX_INLINE inline __attribute__((always_inline))
#define LORAX_LAMBDA __attribute__((always_inline))

namespace lorax::LORAX_ISA {
namespace {

// ---- scalar conversions ----

LORAX_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

LORAX_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

LORAX_INLINE float to_float(float value) { return value; }
LORAX_INLINE float to_float(BFloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x0400) return bits_to_float(sign | ((rest << 13) + 0x38000000));
  const float tiny = float(rest) * 0x1p-24f;  // subnormal: exact in float32
  return sign ? -tiny : tiny;
}

template <class T>
T from_float(float value);

template <>
LORAX_INLINE float from_float<float>(float value) {
  return value;
}

template <>
LORAX_INLINE BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}

template <>
inline Float16 from_float<Float16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t(bits >> 16) & 0x8000;
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more round to infinity
  if (rest < 0x38800000) {                                   // below 2^-14: a multiple of 2^-24
    const float shifted =
        bits_to_float(rest) + 0.5f;  // the float32 addition rounds to that multiple
    return {uint16_t(sign | (float_to_bits(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13))};
}

// ---- vectors: load, store, fma, min, max, sqrt-free arithmetic ----

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kLanes = 16;

LORAX_INLINE Vec splat(float value) { return _mm512_set1_ps(value); }
LORAX_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
LORAX_INLINE Vec load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
LORAX_INLINE Vec load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LORAX_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
LORAX_INLINE void store(BFloat16* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
LORAX_INLINE void store(Float16* p, Vec v) {
  const __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
LORAX_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
LORAX_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
LORAX_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int kLanes = 8;

LORAX_INLINE Vec splat(float value) { return _mm256_set1_ps(value); }
LORAX_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
LORAX_INLINE Vec load(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
LORAX_INLINE Vec load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LORAX_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
LORAX_INLINE void store(BFloat16* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
LORAX_INLINE void store(Float16* p, Vec v) {
  const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
LORAX_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
LORAX_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
LORAX_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }

#else  // 4 lanes: SSE2, NEON, or whatever the compiler makes of it

typedef float Vec __attribute__((vector_size(16)));
constexpr int kLanes = 4;

LORAX_INLINE Vec splat(float value) { return Vec{value, value, value, value}; }
LORAX_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
LORAX_INLINE Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
LORAX_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
template <class T>
LORAX_INLINE void store(T* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(v[i]);
}
#if defined(__aarch64__)
LORAX_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
LORAX_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
LORAX_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
LORAX_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }

#endif

// The first `count` < kLanes elements; the other lanes are 0.
#if defined(__AVX512F__)
LORAX_INLINE Vec load_partial(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
#endif
template <class T>
LORAX_INLINE Vec load_partial(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, size_t(count) * sizeof(T));
  return load(lanes);
}

template <class T>
LORAX_INLINE void store_partial(T* p, Vec v, int64_t count) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, size_t(count) * sizeof(T));
}

// Lane sums and maxima, always in the same (pairwise) order.
LORAX_INLINE float reduce_add(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

LORAX_INLINE float reduce_max(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i)
      lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return lanes[0];
}

// out[0..3] = the lane sums of four vectors, plus onto[0..3] unless it is null; each sum is taken
// in the same order whatever the other three hold.
LORAX_INLINE void reduce_add4(Vec a, Vec b, Vec c, Vec d, const float* onto, float* out) {
  typedef float Four __attribute__((vector_size(16)));
  Four sums, before;
#if defined(__AVX512F__)
  const Vec ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const Vec cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const Vec abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  const __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
  sums = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#elif defined(__AVX2__)
  const Vec ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  const Vec cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  const Vec abcd = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
  sums = _mm256_castps256_ps128(abcd) + _mm256_extractf128_ps(abcd, 1);
#else
  sums = Four{(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]),
              (c[0] + c[2]) + (c[1] + c[3]), (d[0] + d[2]) + (d[1] + d[3])};
#endif
  if (onto) {
    std::memcpy(&before, onto, sizeof before);
    sums = before + sums;
  }
  std::memcpy(out, &sums, sizeof sums);
}

// ---- functions ----

// e^x: 2^n * p(r), |r| <= ln(2) / 2, Cephes' polynomial of degree 6; within 2 ulp. Below -87.3 the
// result is that of -87.3 (1.2e-38), except that -infinity gives 0; above 88.3 it is that of 88.3.
LORAX_INLINE Vec exp(Vec x) {
  typedef int32_t Ints __attribute__((vector_size(sizeof(Vec))));
  const Vec clamped = min(max(x, splat(-87.3f)), splat(88.3f));
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = fma(clamped, splat(1.44269504f), magic);
  const Vec n = shifted - magic;
  Vec r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  Ints exponent, bits, dead;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;
  const Vec infinity = splat(-INFINITY);
  dead = (Ints)(x == infinity);
  bits &= ~dead;
  Vec result;
  std::memcpy(&result, &bits, sizeof result);
  return x != x ? x : result;
}

// tanh(x) = 1 - 2 / (e^2x + 1); absolute error below 2e-7.
LORAX_INLINE Vec tanh(Vec x) { return splat(1.0f) - splat(2.0f) / (exp(x + x) + splat(1.0f)); }

// Calls f with a value of the element type that `dtype` names.
template <class F>
LORAX_INLINE void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::bfloat16:
      return f(BFloat16{});
    case DType::float16:
      return f(Float16{});
  }
}

}  // namespace
}  // namespace lorax::LORAX_ISA
