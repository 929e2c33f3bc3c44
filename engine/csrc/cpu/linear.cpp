// out[T, N] = x[T, K] @ weight[N, K].T + bias, for weights as they lie in a checkpoint.
//
// A tile is 4 rows of x by kColumns rows of weight. Its accumulators are vectors along K, one per
// (row, column); their lanes are summed at the end of a block of K. So both operands are read as
// they lie, in whole cache lines, and every output is the same sequence of additions whatever the
// tile, the batch or the number of threads: over the steps of a block by lanes, over the lanes by
// reduce_add4, over the blocks in order.
//
// Loops, from the outside: thread and block of T (`multiply_block`), span of K (as many blocks as
// let the rows of x stay in L2), panel of kColumns rows of weight (stays in L1), block of K, tile
// of 4 rows of x, step of kLanes along K.
#include "linear.h"

#include "vec.h"

namespace lorax::LORAX_ISA {
namespace {

constexpr int kRows = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kColumns = 6;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kColumns = 3;  // 12 of 16
#else
constexpr int kColumns = 2;  // 8 of 16: without fma a product needs one too
#endif
// Most of a row of x between two sums over lanes, so that a panel and a tile of x fit in L1.
constexpr int64_t kBlockBytes = 2560;
constexpr int64_t kSpan = 4;           // blocks of K for which a block of x stays in L2
constexpr int64_t kResident = 131072;  // elements of x that stay in L2 beside the weights
constexpr int64_t kTokens = 64;        // rows of x in a block of T
constexpr int64_t kGrain = 32768;      // multiply-adds that are worth waking a thread for

// Elements of K in a step. Pairs of bfloat16 are multiplied two to a lane where the machine can;
// otherwise x is float32.
template <class X>
constexpr int kStep = sizeof(X) == 4 ? kLanes : 2 * kLanes;

LORAX_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Weights that the next panels will read, fetched into L2 in the order of memory while this one is
// computed: rows are too short for the hardware's prefetcher, which starts anew at each.
struct Prefetch {
  const char* at = nullptr;
  const char* end = nullptr;
  int lines = 0;  // cache lines for each step of K
};
constexpr int64_t kPrefetchPanels = 2;
constexpr int64_t kLine = 64;

// sums[c, r] (+)= x[r, :depth] . w[c, :depth] for `rows` <= 4 rows of x and `columns` rows of
// weight.
template <int rows, int columns, class W>
void multiply_tile(const float* x, int64_t x_stride, const W* w, int64_t w_stride, int64_t depth,
                   bool first, float* sums, Prefetch& prefetch) {
  Vec acc[kRows][columns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) acc[r][c] = splat(0.0f);
  }
  const auto step = [&](int64_t k, auto get) LORAX_LAMBDA {
    Vec column[columns];
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) column[c] = get(w + c * w_stride + k);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec row = get(x + r * x_stride + k);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) acc[r][c] = fma(row, column[c], acc[r][c]);
    }
  };
  const int64_t whole = depth / kLanes * kLanes, rest = depth - whole;
  const char* at = prefetch.at;
  const int lines = at < prefetch.end ? prefetch.lines : 0;
  for (int64_t k = 0; k < whole; k += kLanes) {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(at + i * kLine, 0, 2);
    at += lines * kLine;
    step(k, [](const auto* p) LORAX_LAMBDA { return load(p); });
  }
  prefetch.at = at;
  if (rest) step(whole, [&](const auto* p) LORAX_LAMBDA { return load_partial(p, rest); });
#pragma GCC unroll 8
  for (int c = 0; c < columns; ++c) {
    reduce_add4(acc[0][c], acc[1][c], acc[2][c], acc[3][c], first ? nullptr : sums + c * kRows,
                sums + c * kRows);
  }
}

#if defined(__AVX512F__)
// The same for bfloat16, by instructions that multiply pairs and add in float32.
template <int rows, int columns>
__attribute__((target("avx512bf16"))) void multiply_tile(const BFloat16* x, int64_t x_stride,
                                                         const BFloat16* w, int64_t w_stride,
                                                         int64_t depth, bool first, float* sums,
                                                         Prefetch& prefetch) {
  Vec acc[kRows][columns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) acc[r][c] = splat(0.0f);
  }
  const char* at = prefetch.at;
  const int lines = at < prefetch.end ? prefetch.lines : 0;
  constexpr int step = kStep<BFloat16>;
  int64_t k = 0;
  for (; k + step <= depth; k += step) {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(at + i * kLine, 0, 2);
    at += lines * kLine;
    __m512bh column[columns];
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c)
      column[c] = (__m512bh)_mm512_loadu_si512(w + c * w_stride + k);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const __m512bh row = (__m512bh)_mm512_loadu_si512(x + r * x_stride + k);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], row, column[c]);
    }
  }
  if (k < depth) {
    const __mmask32 valid = (__mmask32(1) << (depth - k)) - 1;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(valid, x + r * x_stride + k);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) {
        const __m512bh column = (__m512bh)_mm512_maskz_loadu_epi16(valid, w + c * w_stride + k);
        acc[r][c] = _mm512_dpbf16_ps(acc[r][c], row, column);
      }
    }
  }
  prefetch.at = at;
#pragma GCC unroll 8
  for (int c = 0; c < columns; ++c) {
    reduce_add4(acc[0][c], acc[1][c], acc[2][c], acc[3][c], first ? nullptr : sums + c * kRows,
                sums + c * kRows);
  }
}
#endif

// One panel over one block of K: the tiles of `tokens` rows of x.
template <int columns, class X, class W>
void multiply_panel(const X* x, int64_t x_stride, int64_t tokens, const W* w, int64_t w_stride,
                    int64_t depth, bool first, float* sums, Prefetch& prefetch) {
  for (; tokens >= kRows; tokens -= kRows, x += kRows * x_stride, sums += kRows * kColumns) {
    multiply_tile<kRows, columns>(x, x_stride, w, w_stride, depth, first, sums, prefetch);
  }
  if (tokens == 3)
    multiply_tile<3, columns>(x, x_stride, w, w_stride, depth, first, sums, prefetch);
  if (tokens == 2)
    multiply_tile<2, columns>(x, x_stride, w, w_stride, depth, first, sums, prefetch);
  if (tokens == 1)
    multiply_tile<1, columns>(x, x_stride, w, w_stride, depth, first, sums, prefetch);
}

template <class X, class W, int columns = kColumns>
void multiply_panel(int width, const X* x, int64_t x_stride, int64_t tokens, const W* w,
                    int64_t w_stride, int64_t depth, bool first, float* sums, Prefetch& prefetch) {
  if (width == columns)
    return multiply_panel<columns>(x, x_stride, tokens, w, w_stride, depth, first, sums, prefetch);
  if constexpr (columns > 1) {
    multiply_panel<X, W, columns - 1>(width, x, x_stride, tokens, w, w_stride, depth, first, sums,
                                      prefetch);
  }
}

// Rows [begin, begin + tokens) of x by panels [first, last) of weight.
template <class T, class X>
void multiply_block(const LinearArgs& args, const X* x, int64_t x_stride, int64_t begin,
                    int64_t tokens, int64_t first, int64_t last) {
  const int64_t blocks = ceil_div(args.inputs, kBlockBytes / int64_t(sizeof(X)));
  const int64_t depth = ceil_div(ceil_div(args.inputs, blocks), kStep<X>) * kStep<X>;
  const int64_t tiles = ceil_div(tokens, kRows), sums_size = tiles * kRows * kColumns;
  // The order of the sums is the same with one span as with several.
  const bool one_span = blocks <= kSpan || tokens * args.inputs <= kResident;
  const int64_t span_depth = one_span ? args.inputs : kSpan * depth;
  float* all_sums = static_cast<float*>(
      scratch(Scratch::inner, size_t((one_span ? 1 : last - first) * sums_size) * 4));
  const T* weight = static_cast<const T*>(args.weight);
  const T* bias = static_cast<const T*>(args.bias);
  T* out = static_cast<T*>(args.out);
  x += begin * x_stride;
  for (int64_t span = 0; span < args.inputs; span += span_depth) {
    const int64_t span_end = span + span_depth < args.inputs ? span + span_depth : args.inputs;
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t n = panel * kColumns;
      const int width = int(args.outputs - n < kColumns ? args.outputs - n : kColumns);
      float* sums = all_sums + (one_span ? 0 : (panel - first) * sums_size);
      Prefetch prefetch;
      if (one_span && args.weight_stride == args.inputs && panel + kPrefetchPanels < last) {
        prefetch.at =
            reinterpret_cast<const char*>(weight + (n + kPrefetchPanels * kColumns) * args.inputs);
        prefetch.end = prefetch.at + kColumns * args.inputs * int64_t(sizeof(T));
        prefetch.lines = int(ceil_div(kColumns * kStep<X> * int64_t(sizeof(T)), kLine * tiles));
      }
      for (int64_t k = span; k < span_end; k += depth) {
        const int64_t steps = k + depth < span_end ? depth : span_end - k;
        multiply_panel<X, T>(width, x + k, x_stride, tokens, weight + n * args.weight_stride + k,
                             args.weight_stride, steps, k == 0, sums, prefetch);
      }
      if (span_end < args.inputs) continue;
      for (int64_t t = 0; t < tokens; ++t) {
        T* to = out + (begin + t) * args.outputs + n;
        const float* from = sums + t / kRows * kRows * kColumns + t % kRows;
        for (int c = 0; c < width; ++c) {
          to[c] = from_float<T>(bias ? from[c * kRows] + to_float(bias[n + c]) : from[c * kRows]);
        }
      }
    }
  }
}

// x in float32: itself, or converted into scratch memory.
template <class T>
const float* as_float(const LinearArgs& args, int64_t* stride) {
  *stride = args.inputs;
  float* wide = static_cast<float*>(scratch(Scratch::outer, size_t(args.tokens * args.inputs) * 4));
  parallel_for(args.tokens, ceil_div(kGrain, args.inputs + 1), [&](int64_t begin, int64_t end) {
    const int64_t whole = args.inputs / kLanes * kLanes;
    for (int64_t t = begin; t < end; ++t) {
      const T* from = static_cast<const T*>(args.x) + t * args.x_stride;
      float* to = wide + t * args.inputs;
      for (int64_t k = 0; k < whole; k += kLanes) store(to + k, load(from + k));
      for (int64_t k = whole; k < args.inputs; ++k) to[k] = to_float(from[k]);
    }
  });
  return wide;
}

template <>
const float* as_float<float>(const LinearArgs& args, int64_t* stride) {
  *stride = args.x_stride;
  return static_cast<const float*>(args.x);
}

template <class T, class X>
void multiply(const LinearArgs& args, const X* x, int64_t x_stride) {
  const int64_t panels = ceil_div(args.outputs, kColumns), blocks = ceil_div(args.tokens, kTokens);
  const int64_t rows = args.tokens < kTokens ? args.tokens : kTokens;
  const int64_t work = rows * kColumns * args.inputs;  // multiply-adds of one panel
  parallel_for(blocks * panels, ceil_div(kGrain, work + 1), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t token = begin / panels * kTokens, first = begin % panels;
      const int64_t last = first + (end - begin) < panels ? first + (end - begin) : panels;
      const int64_t tokens = args.tokens - token < kTokens ? args.tokens - token : kTokens;
      multiply_block<T>(args, x, x_stride, token, tokens, first, last);
      begin += last - first;
    }
  });
}

}  // namespace

void linear(const LinearArgs& args) {
#if defined(__AVX512F__)
  if (args.dtype == DType::bfloat16 && isa() == Isa::avx512_bf16) {
    return multiply<BFloat16>(args, static_cast<const BFloat16*>(args.x), args.x_stride);
  }
#endif
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    int64_t x_stride;
    const float* x = as_float<T>(args, &x_stride);
    multiply<T>(args, x, x_stride);
  });
}

}  // namespace lorax::LORAX_ISA
