// Splits the work of a call evenly over threads, at any unit.
//
// A call has pieces of different sizes; a piece has equal units. Pieces carry `work` (where they
// begin in the work of the call) and `unit_work` (that of one unit), which are filled in here.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace lorax::LORAX_ISA {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(piece, first unit, units), in parallel; no thread gets less than `least` work. Walks
// pieces, then units.
template <class Piece, class Units, class UnitWork, class F>
void split_work(Piece* pieces, int64_t num_pieces, int64_t least, const Units& units,
                const UnitWork& unit_work, const F& f) {
  int64_t total = 0;
  for (int64_t i = 0; i < num_pieces; ++i) {
    pieces[i].work = total;
    pieces[i].unit_work = unit_work(pieces[i]);
    total += pieces[i].unit_work * units(pieces[i]);
  }
  parallel_for(total, least, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < num_pieces && pieces[i].work < end; ++i) {
      const Piece& piece = pieces[i];
      const int64_t first = ceil_div(std::max<int64_t>(begin - piece.work, 0), piece.unit_work);
      const int64_t last =
          std::min<int64_t>(units(piece), ceil_div(end - piece.work, piece.unit_work));
      if (first < last) f(piece, first, last - first);
    }
  });
}

}  // namespace
}  // namespace lorax::LORAX_ISA
