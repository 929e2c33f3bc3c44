// y = scale * y + shift by the extras of each token's adapter, in float32, rounded once.
#include "lora.h"
#include "vec.h"

namespace lorax::LORAX_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // columns of all tokens per thread: waking one up for less does not pay

template <class T>
void rescale_row(const RescalePiece& piece, T* y, int64_t columns) {
  int64_t n = 0;
  for (; n + kLanes <= columns; n += kLanes) {
    const Vec scale = piece.scale ? load(piece.scale + n) : splat(1.0f);
    const Vec shift = piece.shift ? load(piece.shift + n) : splat(0.0f);
    store(y + n, fma(scale, load(y + n), shift));
  }
  for (; n < columns; ++n) {
    const float scale = piece.scale ? piece.scale[n] : 1.0f;
    const float shift = piece.shift ? piece.shift[n] : 0.0f;
    y[n] = from_float<T>(std::fma(scale, to_float(y[n]), shift));
  }
}

}  // namespace

void lora_rescale(const RescaleArgs& args) {
  with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t grain = kGrain / args.columns + 1;
    for (int64_t i = 0; i < args.num_pieces; ++i) {
      const RescalePiece& piece = args.pieces[i];
      parallel_for(piece.tokens, grain, [&](int64_t begin, int64_t end) {
        T* y = static_cast<T*>(args.y) + (piece.first + begin) * args.y_stride;
        for (int64_t m = begin; m < end; ++m, y += args.y_stride)
          rescale_row(piece, y, args.columns);
      });
    }
  });
}

}  // namespace lorax::LORAX_ISA
