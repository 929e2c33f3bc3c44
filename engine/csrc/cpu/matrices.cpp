// Writes the matrices of an adapter's file into its image: rounded, checked, and transposed where
// the image stores columns as rows.
//
// Takes a block of rows at a time, small enough for the cache: rounds it (unless the types agree),
// looks for values that are not finite, then copies it. Transposing walks tiles of 8 x 8 elements,
// down the rows of the block.
#include "matrices.h"

#include <algorithm>

#include "vec.h"

namespace lorax::LORAX_ISA {
namespace {

constexpr int64_t kBlock = 8192;  // elements of a block, unless 8 rows are more
constexpr int64_t kTile = 8;

LORAX_INLINE float to_float(double value) { return float(value); }

LORAX_INLINE uint32_t bits_of(float value) { return float_to_bits(value); }
LORAX_INLINE uint16_t bits_of(BFloat16 value) { return value.bits; }
LORAX_INLINE uint16_t bits_of(Float16 value) { return value.bits; }

constexpr uint32_t exponent(float) { return 0x7f800000; }
constexpr uint16_t exponent(BFloat16) { return 0x7f80; }
constexpr uint16_t exponent(Float16) { return 0x7c00; }

template <class T>
bool all_finite(const T* values, int64_t count) {
  using Bits = decltype(bits_of(T{}));
  constexpr Bits mask = exponent(T{});
  Bits bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= Bits((bits_of(values[i]) & mask) == mask);
  return !bad;
}

template <class T>
LORAX_INLINE void transpose_tile(const T* in, int64_t columns, T* out, int64_t stride) {
  for (int64_t c = 0; c < kTile; ++c) {
    for (int64_t r = 0; r < kTile; ++r) out[c * stride + r] = in[r * columns + c];
  }
}

#if defined(__SSE2__)
LORAX_INLINE void transpose_tile_16(const void* in, int64_t columns, void* out, int64_t stride) {
  const auto* from = static_cast<const uint16_t*>(in);
  auto* to = static_cast<uint16_t*>(out);
  __m128i a[8], b[8];
  for (int r = 0; r < 8; ++r)
    a[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * columns));
  // Each round interleaves row r with row r + 4; three rounds of it turn rows into columns.
  for (int round = 0; round < 3; ++round) {
    for (int r = 0; r < 4; ++r) {
      b[2 * r] = _mm_unpacklo_epi16(a[r], a[r + 4]);
      b[2 * r + 1] = _mm_unpackhi_epi16(a[r], a[r + 4]);
    }
    std::copy(b, b + 8, a);
  }
  for (int c = 0; c < 8; ++c) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c * stride), a[c]);
}

template <>
LORAX_INLINE void transpose_tile(const BFloat16* in, int64_t columns, BFloat16* out,
                                 int64_t stride) {
  transpose_tile_16(in, columns, out, stride);
}
template <>
LORAX_INLINE void transpose_tile(const Float16* in, int64_t columns, Float16* out, int64_t stride) {
  transpose_tile_16(in, columns, out, stride);
}
#endif

template <class T>
void transpose(const T* in, int64_t rows, int64_t columns, T* out, int64_t stride) {
  for (int64_t column = 0; column < columns; column += kTile) {
    for (int64_t row = 0; row < rows; row += kTile) {
      const T* from = in + row * columns + column;
      T* to = out + column * stride + row;
      if (row + kTile <= rows && column + kTile <= columns) {
        transpose_tile(from, columns, to, stride);
        continue;
      }
      for (int64_t c = 0; c < std::min(kTile, columns - column); ++c) {
        for (int64_t r = 0; r < std::min(kTile, rows - row); ++r)
          to[c * stride + r] = from[r * columns + c];
      }
    }
  }
}

// The values in the type of the image.
template <class S, class T>
const T* rounded(const S* values, int64_t count) {
  T* out = static_cast<T*>(scratch(Scratch::inner, size_t(count) * sizeof(T)));
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(to_float(values[i]));
  return out;
}
template <>
const float* rounded(const float* values, int64_t) {
  return values;
}
template <>
const BFloat16* rounded(const BFloat16* values, int64_t) {
  return values;
}
template <>
const Float16* rounded(const Float16* values, int64_t) {
  return values;
}

// Returns whether every value is finite.
template <class S, class T>
bool write_piece(const WriteMatricesArgs& args, const MatrixPiece& piece) {
  const S* source = reinterpret_cast<const S*>(args.source + piece.source);
  T* target = reinterpret_cast<T*>(args.image + piece.target);
  const int64_t step = std::max<int64_t>(kTile, kBlock / piece.columns / kTile * kTile);
  for (int64_t row = 0; row < piece.rows; row += step) {
    const int64_t rows = std::min(step, piece.rows - row), count = rows * piece.columns;
    const T* block = rounded<S, T>(source + row * piece.columns, count);
    if (!all_finite(block, count)) return false;
    if (piece.transposed) {
      transpose(block, rows, piece.columns, target + row, piece.stride);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(target + (row + r) * piece.stride, block + r * piece.columns,
                  size_t(piece.columns) * sizeof(T));
    }
  }
  return true;
}

template <class T>
int64_t write_all(const WriteMatricesArgs& args) {
  for (int64_t i = 0; i < args.num_pieces; ++i) {
    const MatrixPiece& piece = args.pieces[i];
    bool finite = false;
    switch (piece.element) {
      case 0:
        finite = write_piece<float, T>(args, piece);
        break;
      case 1:
        finite = write_piece<BFloat16, T>(args, piece);
        break;
      case 2:
        finite = write_piece<Float16, T>(args, piece);
        break;
      default:
        finite = write_piece<double, T>(args, piece);
    }
    if (!finite) return i;
  }
  return -1;
}

}  // namespace

void write_matrices(const WriteMatricesArgs& args) {
  switch (args.dtype) {
    case DType::float32:
      *args.bad = write_all<float>(args);
      break;
    case DType::bfloat16:
      *args.bad = write_all<BFloat16>(args);
      break;
    case DType::float16:
      *args.bad = write_all<Float16>(args);
      break;
  }
}

}  // namespace lorax::LORAX_ISA
