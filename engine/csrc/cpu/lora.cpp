// LoRA of a batch in one pass over the adapters' bytes.
//
// Work is measured in (weights x (tokens + kReadCost)) and cut evenly over threads wherever the cut
// falls: between segments, between ranks (shrink) or columns (expand) of a segment, and between
// chunks of its tokens. Every element of t and of y is one sum in one fixed order, so that no cut
// and no tile shape can change a bit of it.
#include "lora.h"

#include <algorithm>
#include <type_traits>

#include "reduce.h"
#include "split_work.h"
#include "vec.h"

namespace lorax::LORAX_ISA {
namespace {

constexpr int64_t kReadCost = 8;          // a weight costs as much to read as to use for 8 tokens
constexpr int64_t kLeastWeights = 16384;  // per thread: waking one up for less does not pay
constexpr int kStreams = kLanes == 16 ? 16 : 8;  // rows at once where memory is the bound
constexpr int kRanks = 4;                        // unit of shrink, and rows of A in a register tile
constexpr int64_t kColumns = 64;                 // unit of expand
constexpr int kTokens = kLanes == 16 ? 4 : 2;    // tokens of a register tile
constexpr int kVectors = 4;                      // vectors of columns of a register tile
static_assert(kVectors * kLanes <= kColumns);

// Calls f(piece, first token, tokens, first unit, units) for chunks of at most `chunk` tokens, in
// parallel. A piece has units(piece) units per chunk, of weights(piece) weights each. Walks pieces,
// then chunks, then units.
template <class Piece, class Units, class Weights, class F>
void split_chunks(Piece* pieces, int64_t num_pieces, int64_t chunk, const Units& units,
                  const Weights& weights, const F& f) {
  split_work(
      pieces, num_pieces, kLeastWeights * (kReadCost + 1),
      [&](const Piece& piece) { return units(piece) * ceil_div(piece.tokens, chunk); },
      [&](const Piece& piece) {
        return weights(piece) * (kReadCost + std::min(chunk, piece.tokens));
      },
      [&](const Piece& piece, int64_t unit, int64_t count) {
        const int64_t per_chunk = units(piece), last = unit + count;
        while (unit < last) {
          const int64_t token = unit / per_chunk * chunk, first = unit % per_chunk;
          const int64_t some = std::min(per_chunk - first, last - unit);
          f(piece, token, std::min(chunk, piece.tokens - token), first, some);
          unit += some;
        }
      });
}

// t[tokens, rows] = x @ A.T for `tokens` tokens by `rows` rows of A, walking k by kLanes. A sum is
// kLanes partial sums, lane i over k = i, i + kLanes, ..., added up as in reduce.h. Rows at and
// beyond `valid` repeat the last one and are dropped.
template <int tokens, int rows, class T>
LORAX_INLINE void shrink_tile(const T* x, int64_t x_stride, const T* a, int64_t a_stride,
                              int64_t valid, int64_t k, float* t, int64_t t_stride) {
  const T* row[rows];
  for (int r = 0; r < rows; ++r) row[r] = a + std::min<int64_t>(r, valid - 1) * a_stride;
  Vec sum[tokens][rows] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    Vec v[tokens];
    for (int m = 0; m < tokens; ++m) v[m] = load(x + m * x_stride + i);
    for (int r = 0; r < rows; ++r) {
      const Vec w = load(row[r] + i);
      for (int m = 0; m < tokens; ++m) sum[m][r] = fma(v[m], w, sum[m][r]);
    }
  }
  if (i < k) {
    for (int m = 0; m < tokens; ++m) {
      const Vec v = load_partial(x + m * x_stride + i, k - i);
      for (int r = 0; r < rows; ++r) sum[m][r] = fma(v, load_partial(row[r] + i, k - i), sum[m][r]);
    }
  }
  for (int m = 0; m < tokens; ++m) {
    float sums[rows];
    for (int r = 0; r < rows; r += 4)
      store_sums(sums + r, sum[m][r], sum[m][r + 1], sum[m][r + 2], sum[m][r + 3]);
    for (int64_t r = 0; r < std::min<int64_t>(rows, valid); ++r) t[m * t_stride + r] = sums[r];
  }
}

// Tile: a few rows of A by the tokens of the chunk. Walks ranks, then tokens, so that the rows stay
// in cache. For fewer than kTokens tokens memory is the bound, and it is fastest with kStreams rows
// in flight.
template <class T>
void shrink_chunk(const ShrinkArgs& args, const ShrinkPiece& piece, int64_t token, int64_t tokens,
                  int64_t rank, int64_t ranks) {
  const T* x = static_cast<const T*>(args.x) + (piece.first + token) * args.x_stride;
  const T* a = static_cast<const T*>(piece.a) + rank * args.a_stride;
  float* t = args.t + (piece.first + token) * args.t_stride + rank;
  const int64_t xs = args.x_stride, as = args.a_stride, ts = args.t_stride;
  int64_t r = 0;
  if (tokens < kTokens) {
    for (; r + kStreams <= ranks; r += kStreams) {
      for (int64_t m = 0; m < tokens; ++m) {
        shrink_tile<1, kStreams>(x + m * xs, xs, a + r * as, as, kStreams, args.k, t + m * ts + r,
                                 ts);
      }
    }
  }
  for (; r < ranks; r += kRanks) {
    int64_t m = 0;
    for (; m + kTokens <= tokens; m += kTokens) {
      shrink_tile<kTokens, kRanks>(x + m * xs, xs, a + r * as, as, ranks - r, args.k,
                                   t + m * ts + r, ts);
    }
    for (; m < tokens; ++m) {
      shrink_tile<1, kRanks>(x + m * xs, xs, a + r * as, as, ranks - r, args.k, t + m * ts + r, ts);
    }
  }
}

// y += scale * t @ B for `tokens` tokens by `vectors` vectors of columns, walking ranks in order.
template <int tokens, int vectors, class T>
LORAX_INLINE void expand_tile(const float* t, int64_t t_stride, const T* b, int64_t b_stride,
                              int64_t rank, float scale, T* y, int64_t y_stride) {
  Vec sum[tokens][vectors] = {};
  for (int64_t r = 0; r < rank; ++r) {
    Vec w[vectors];
    for (int v = 0; v < vectors; ++v) w[v] = load(b + r * b_stride + v * kLanes);
    for (int m = 0; m < tokens; ++m) {
      const Vec s = splat(t[m * t_stride + r]);
      for (int v = 0; v < vectors; ++v) sum[m][v] = fma(s, w[v], sum[m][v]);
    }
  }
  for (int m = 0; m < tokens; ++m) {
    for (int v = 0; v < vectors; ++v) {
      T* out = y + m * y_stride + v * kLanes;
      store(out, fma(splat(scale), sum[m][v], load(out)));
    }
  }
}

// The same for one token by `columns` < kLanes columns.
template <class T>
LORAX_INLINE void expand_tail(const float* t, const T* b, int64_t b_stride, int64_t rank,
                              float scale, T* y, int64_t columns) {
  Vec sum = splat(0.0f);
  for (int64_t r = 0; r < rank; ++r)
    sum = fma(splat(t[r]), load_partial(b + r * b_stride, columns), sum);
  store_partial(y, fma(splat(scale), sum, load_partial(y, columns)), columns);
}

// One token: `rows` ranks in flight, each a stream over all columns (a multiple of kLanes). Walks
// columns by kLanes; the sums of earlier ranks come from and those for later ranks go to `sums`.
template <int rows, class T>
LORAX_INLINE void expand_streams(const float* t, const T* b, int64_t b_stride, float scale,
                                 bool first, bool last, float* sums, T* y, int64_t columns) {
  Vec s[rows];
  for (int r = 0; r < rows; ++r) s[r] = splat(t[r]);
  for (int64_t n = 0; n < columns; n += kLanes) {
    Vec sum = first ? splat(0.0f) : load(sums + n);
    for (int r = 0; r < rows; ++r) sum = fma(s[r], load(b + r * b_stride + n), sum);
    if (last) {
      store(y + n, fma(splat(scale), sum, load(y + n)));
    } else {
      store(sums + n, sum);
    }
  }
}

// One token by `columns` columns. Walks ranks by kStreams, and the last ones by 4 and 1.
template <class T>
void expand_token(const float* t, const T* b, int64_t b_stride, int64_t rank, float scale, T* y,
                  int64_t columns) {
  const int64_t whole = columns / kLanes * kLanes;
  float* sums = static_cast<float*>(scratch(Scratch::inner, size_t(columns) * sizeof(float)));
  int64_t r = 0;
  const auto pass = [&](auto rows) {
    constexpr int count = decltype(rows)::value;
    expand_streams<count>(t + r, b + r * b_stride, b_stride, scale, r == 0, r + count == rank, sums,
                          y, whole);
    r += count;
  };
  while (r + kStreams <= rank) pass(std::integral_constant<int, kStreams>{});
  while (r + 4 <= rank) pass(std::integral_constant<int, 4>{});
  while (r < rank) pass(std::integral_constant<int, 1>{});
  if (whole < columns) expand_tail(t, b + whole, b_stride, rank, scale, y + whole, columns - whole);
}

// kTokens tokens by `columns` columns of one target. Walks columns.
template <class T>
LORAX_INLINE void expand_tokens(const float* t, int64_t t_stride, const T* b, int64_t b_stride,
                                int64_t rank, float scale, T* y, int64_t y_stride,
                                int64_t columns) {
  int64_t n = 0;
  for (; n + kVectors * kLanes <= columns; n += kVectors * kLanes) {
    expand_tile<kTokens, kVectors>(t, t_stride, b + n, b_stride, rank, scale, y + n, y_stride);
  }
  for (; n + kLanes <= columns; n += kLanes) {
    expand_tile<kTokens, 1>(t, t_stride, b + n, b_stride, rank, scale, y + n, y_stride);
  }
  if (n < columns) {
    for (int m = 0; m < kTokens; ++m) {
      expand_tail(t + m * t_stride, b + n, b_stride, rank, scale, y + m * y_stride + n,
                  columns - n);
    }
  }
}

// Tile: all ranks by kColumns columns of B, which stay in cache, by the tokens of the chunk; walks
// columns, then tokens. Fewer than kTokens tokens go one by one, as streams over all columns.
template <class T>
void expand_chunk(const ExpandArgs& args, const ExpandPiece& piece, int64_t token, int64_t tokens,
                  int64_t column, int64_t columns) {
  const int64_t bs = piece.b_stride, ts = args.t_stride, ys = args.y_stride;
  const float* t = args.t + (piece.first + token) * ts + piece.row;
  const T* b = static_cast<const T*>(piece.b) + column;
  T* y = static_cast<T*>(args.y) + (piece.first + token) * ys + piece.column + column;
  const int64_t step = tokens < kTokens ? columns : kColumns;
  for (int64_t n = 0; n < columns; n += step) {
    const int64_t width = std::min(step, columns - n);
    int64_t m = 0;
    for (; m + kTokens <= tokens; m += kTokens) {
      expand_tokens(t + m * ts, ts, b + n, bs, piece.rank, piece.scale, y + m * ys + n, ys, width);
    }
    for (; m < tokens; ++m)
      expand_token(t + m * ts, b + n, bs, piece.rank, piece.scale, y + m * ys + n, width);
  }
}

}  // namespace

void lora_shrink(const ShrinkArgs& args) {
  // a chunk of x stays in the second-level cache while the ranks go by
  const int64_t chunk = std::clamp<int64_t>(65536 / std::max<int64_t>(args.k, 1), 8, 64);
  with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    split_chunks(
        args.pieces, args.num_pieces, chunk,
        [](const ShrinkPiece& piece) { return ceil_div(piece.rank, kRanks); },
        [&](const ShrinkPiece&) { return kRanks * std::max<int64_t>(args.k, 1); },
        [&](const ShrinkPiece& piece, int64_t token, int64_t tokens, int64_t unit, int64_t units) {
          const int64_t rank = unit * kRanks;
          shrink_chunk<T>(args, piece, token, tokens, rank,
                          std::min(units * kRanks, piece.rank - rank));
        });
  });
}

void lora_gather(const GatherArgs& args) {
  with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < args.num_pieces; ++i) {
      const ShrinkPiece& piece = args.pieces[i];
      const int64_t stride = (piece.rank * int64_t(sizeof(T)) + 15) / 16 * 16 / int64_t(sizeof(T));
      for (int64_t m = piece.first; m < piece.first + piece.tokens; ++m) {
        const T* row = static_cast<const T*>(piece.a) + args.ids[m] * stride;
        for (int64_t r = 0; r < piece.rank; ++r) args.t[m * args.t_stride + r] = to_float(row[r]);
      }
    }
  });
}

void lora_expand(const ExpandArgs& args) {
  with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    split_chunks(
        args.pieces, args.num_pieces, 64,
        [](const ExpandPiece& piece) { return ceil_div(piece.columns, kColumns); },
        [](const ExpandPiece& piece) { return kColumns * piece.rank; },
        [&](const ExpandPiece& piece, int64_t token, int64_t tokens, int64_t unit, int64_t units) {
          const int64_t column = unit * kColumns;
          expand_chunk<T>(args, piece, token, tokens, column,
                          std::min(units * kColumns, piece.columns - column));
        });
  });
}

}  // namespace lorax::LORAX_ISA
