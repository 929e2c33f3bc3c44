// Attention with an online softmax in float32 (Dao et al. 2022, FlashAttention; split over keys as
// in Flash-Decoding).
//
// A *row* is one query of one head. A piece of work is a tile of queries of one sequence against a
// range of keys, once per key-value head. Keys are taken kTile at a time, from position 0 on, and
// the softmax starts anew every kSplit keys; the splits are put together in order. So a row is
// computed by the same operations whatever shares its batch, its chunk or its thread.
#include "attention.h"

#include <algorithm>
#include <limits>

#include "reduce.h"
#include "split_work.h"
#include "vec.h"

namespace lorax::LORAX_ISA {
namespace {

constexpr int64_t kTile = 32;          // keys per step of the softmax
constexpr int64_t kSplit = 512;        // keys per softmax; a multiple of kTile
constexpr int64_t kRun = 16;           // keys that lie in one block, wherever they begin
constexpr int64_t kRows = 64;          // rows of a tile of queries, about
constexpr int64_t kRowsTogether = 16;  // rows of several heads that go through the keys together
constexpr int64_t kRowsInPlace = 8;  // rows for which it does not pay to copy keys and values first
constexpr int kBlock = 4;            // rows of a register tile
constexpr int64_t kLeastWork = 32768;  // keys x rows per thread, about
constexpr float kNone = -std::numeric_limits<float>::infinity();
static_assert(kSplit % kTile == 0 && kTile % kRun == 0 && kRun % kLanes == 0);

// A tile of queries of one sequence against the keys of splits [split, last_split).
struct Piece {
  int64_t sequence;
  int64_t first, queries;  // of the sequence's queries in this step
  int64_t split, last_split;
  float* parts;  // the softmax of one split, [groups][rows] of states, if other pieces do the other
                 // splits; or null
  int64_t work, unit_work;
};

// What is fixed for the call.
struct Plan {
  const AttentionArgs& args;
  int64_t repeats;  // query heads per key-value head
  int64_t padded;   // head size rounded up to whole vectors
  int64_t state;    // floats of a row's state: maximum, sum, padded outputs
};

// Position of the first of a piece's queries, and the keys that any of them sees.
struct Span {
  int64_t position, first_key, last_key;

  Span(const AttentionArgs& args, int64_t sequence, int64_t first, int64_t queries) {
    const int64_t count = args.starts[sequence + 1] - args.starts[sequence];
    position = args.lengths[sequence] - count + first;
    first_key = args.window ? std::max<int64_t>(position - args.window + 1, 0) : 0;
    last_key = position + queries;
  }
};

// A tile of keys and values in float32: rows of `stride` floats, kRun rows from each base on; a
// key's value lies `to_value` floats after it. Rows outside [first, last) are readable but not
// defined: no query sees them. What is to come next is at `ahead`.
struct Tile {
  int64_t first, last;
  int64_t stride, to_value;
  const float* keys[kTile / kRun];
  const float* ahead[kTile / kRun];
};

template <class T>
LORAX_INLINE const T* key_at(const AttentionArgs& args, int64_t sequence, int64_t group,
                             int64_t key) {
  const int64_t block = args.tables[sequence * args.table_stride + key / args.block];
  return static_cast<const T*>(args.kv) + block * args.block_stride +
         key % args.block * args.position_stride + group * args.kv_head_stride;
}

// The tile of keys [key, last) where it lies: for float32, whole vectors and blocks of whole runs.
// In place of a run that is not there stands the nearest one that is.
Tile in_place(const AttentionArgs& args, int64_t sequence, int64_t group, int64_t key, int64_t last,
              const Span& span) {
  const auto run_of = [&](int64_t at) {
    const int64_t seen = std::clamp(at, span.first_key, span.last_key - 1);
    return key_at<float>(args, sequence, group, seen / kRun * kRun);
  };
  const int64_t first = std::max<int64_t>(span.first_key - key, 0);
  Tile tile{first, std::min(last - key, kTile), args.position_stride, args.value_stride, {}, {}};
  for (int64_t i = 0; i < kTile / kRun; ++i) {
    tile.keys[i] = run_of(key + i * kRun);
    tile.ahead[i] = run_of(key + kTile + i * kRun);
  }
  return tile;
}

// The tile of keys [key, last) copied to `out`: [kTile, padded] keys and as many values, zero
// beyond the head size. Walks positions, and asks for those of the next tile meanwhile.
template <class T>
Tile unpacked(const Plan& plan, int64_t sequence, int64_t group, int64_t key, int64_t last,
              const Span& span, float* out) {
  const AttentionArgs& args = plan.args;
  const int64_t whole = args.size / kLanes * kLanes, rest = args.size - whole;
  const int64_t first = std::max<int64_t>(span.first_key - key, 0);
  Tile tile{first, std::min(last - key, kTile), plan.padded, kTile * plan.padded, {}, {}};
  for (int64_t i = 0; i < kTile / kRun; ++i) tile.keys[i] = out + i * kRun * plan.padded;
  const T *from = nullptr, *ahead = nullptr;
  for (int64_t j = tile.first; j < tile.last; ++j) {
    const int64_t at = key + j, next = std::min(at + kTile, span.last_key - 1);
    const bool turn = j == tile.first || at % args.block == 0;
    from = turn ? key_at<T>(args, sequence, group, at) : from + args.position_stride;
    ahead = turn || next % args.block == 0 ? key_at<T>(args, sequence, group, next)
                                           : ahead + args.position_stride;
    float* keys = out + j * plan.padded;
    float* values = keys + tile.to_value;
    for (int64_t d = 0; d < whole; d += kLanes) {
      store(keys + d, load(from + d));
      store(values + d, load(from + args.value_stride + d));
      __builtin_prefetch(ahead + d, 0, 2);
      __builtin_prefetch(ahead + args.value_stride + d, 0, 2);
    }
    if (rest) {
      store(keys + whole, load_partial(from + whole, rest));
      store(values + whole, load_partial(from + args.value_stride + whole, rest));
    }
  }
  return tile;
}

// q[repeats * queries, padded] of one key-value head in float32, times the scale. Row: query *
// repeats + head.
template <class T>
void load_queries(const Plan& plan, int64_t token, int64_t queries, int64_t group, float* out) {
  const AttentionArgs& args = plan.args;
  const int64_t whole = args.size / kLanes * kLanes, rest = args.size - whole;
  const Vec scale = splat(args.scale);
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t h = 0; h < plan.repeats; ++h, out += plan.padded) {
      const T* q = static_cast<const T*>(args.q) + (token + i) * args.q_stride +
                   (group * plan.repeats + h) * args.q_head_stride;
      for (int64_t d = 0; d < whole; d += kLanes) store(out + d, load(q + d) * scale);
      if (rest) store(out + whole, load_partial(q + whole, rest) * scale);
    }
  }
}

// out = outputs / sum for the rows of one key-value head.
template <class T>
void store_outputs(const Plan& plan, int64_t token, int64_t queries, int64_t group,
                   const float* states) {
  const AttentionArgs& args = plan.args;
  const int64_t whole = args.size / kLanes * kLanes, rest = args.size - whole;
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t h = 0; h < plan.repeats; ++h, states += plan.state) {
      T* out = static_cast<T*>(args.out) +
               ((token + i) * args.heads + group * plan.repeats + h) * args.size;
      const Vec inverse = splat(1.0f / states[1]);
      const float* outputs = states + kLanes;
      for (int64_t d = 0; d < whole; d += kLanes) store(out + d, load(outputs + d) * inverse);
      if (rest) store_partial(out + whole, load(outputs + whole) * inverse, rest);
    }
  }
}

// A state is [maximum, sum, unused up to kLanes, outputs padded].
void clear(const Plan& plan, float* states, int64_t rows) {
  std::memset(states, 0, size_t(rows * plan.state) * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) states[r * plan.state] = kNone;
}

// Adds the softmax of a further split to that of the splits before it.
void merge(const Plan& plan, float* states, const float* parts, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r, states += plan.state, parts += plan.state) {
    if (parts[0] == kNone) continue;  // the row sees nothing of it
    const float maximum = std::max(states[0], parts[0]);
    const Vec old_weight = exp(splat(states[0] - maximum)),
              new_weight = exp(splat(parts[0] - maximum));
    states[0] = maximum;
    float weights[kLanes];
    store(weights, fma(splat(parts[1]), new_weight, splat(states[1]) * old_weight));
    states[1] = weights[0];
    for (int64_t d = kLanes; d < plan.state; d += kLanes) {
      store(states + d, fma(load(parts + d), new_weight, load(states + d) * old_weight));
    }
  }
}

// scores[rows, kTile] = q @ keys.T. Tile: one row by kLanes keys; walks keys, rows, then the head
// size by kLanes, with sums as in reduce.h. With `prefetch`, the first rows ask for the keys and
// values of the next tile to the second-level cache, a line at every multiplication: requests in a
// burst are dropped.
template <int rows, bool prefetch>
LORAX_INLINE void score_tile(const float* q, const Tile& tile, int64_t padded, float* scores) {
  constexpr int value_row = rows > 1 ? 1 : 0;  // the row that asks for values
  for (int64_t j = 0; j < kTile; j += kLanes) {
    const float* keys = tile.keys[j / kRun] + j % kRun * tile.stride;
    const float* ahead = prefetch ? tile.ahead[j / kRun] + j % kRun * tile.stride : nullptr;
    for (int r = 0; r < rows; ++r) {
      Vec sum[kLanes] = {};
      for (int64_t d = 0; d < padded; d += kLanes) {
        const Vec v = load(q + r * padded + d);
        for (int i = 0; i < kLanes; ++i) {
          sum[i] = fma(v, load(keys + i * tile.stride + d), sum[i]);
          if (prefetch && r == 0) __builtin_prefetch(ahead + i * tile.stride + d, 0, 2);
          if (prefetch && r == value_row)
            __builtin_prefetch(ahead + tile.to_value + i * tile.stride + d, 0, 2);
        }
      }
      store(scores + r * kTile + j, sum_lanes(sum));
    }
  }
}

// outputs[rows, columns] = outputs * decay + weights[rows, kTile] @ values. Tile: `rows` rows by
// `vectors` vectors of the head size, from `column` on; walks keys in order.
template <int rows, int vectors>
LORAX_INLINE void value_tile(const float* weights, const float* decay, const Tile& tile,
                             int64_t column, float* outputs, int64_t stride) {
  Vec sum[rows][vectors];
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v)
      sum[r][v] = load(outputs + r * stride + v * kLanes) * splat(decay[r]);
  }
  for (int64_t j = tile.first; j < tile.last; ++j) {
    const float* values = tile.keys[j / kRun] + j % kRun * tile.stride + tile.to_value + column;
    Vec w[vectors];
    for (int v = 0; v < vectors; ++v) w[v] = load(values + v * kLanes);
    for (int r = 0; r < rows; ++r) {
      const Vec weight = splat(weights[r * kTile + j]);
      for (int v = 0; v < vectors; ++v) sum[r][v] = fma(weight, w[v], sum[r][v]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) store(outputs + r * stride + v * kLanes, sum[r][v]);
  }
}

// One step of the softmax: `rows` rows against the tile of keys from position `key` on.
// positions[r] is that of row r.
template <int rows, bool prefetch>
void step(const Plan& plan, const float* q, const int64_t* positions, const Tile& tile, int64_t key,
          float* states) {
  const AttentionArgs& args = plan.args;
  float scores[rows * kTile], decay[rows];
  bool seen = false;
  for (int r = 0; r < rows; ++r) {
    seen |= positions[r] >= key && (!args.window || positions[r] - args.window + 1 < key + kTile);
  }
  if (!seen) return;
  score_tile<rows, prefetch>(q, tile, plan.padded, scores);
  float numbers[kLanes];
  for (int i = 0; i < kLanes; ++i) numbers[i] = float(i);
  for (int r = 0; r < rows; ++r) {
    float* score = scores + r * kTile;
    float* state = states + r * plan.state;
    const int64_t last =
        std::min<int64_t>(positions[r] - key, kTile);  // the last key that the row sees
    const int64_t first =
        args.window ? std::max<int64_t>(positions[r] - args.window + 1 - key, 0) : 0;
    if (args.softcap > 0.0f) {
      const Vec cap = splat(args.softcap);
      for (int64_t j = 0; j < kTile; j += kLanes)
        store(score + j, cap * tanh(load(score + j) / cap));
    }
    Vec largest = splat(kNone);
    for (int64_t j = 0; j < kTile; j += kLanes) {
      Vec s = load(score + j);
      if (first > 0 || last < kTile - 1) {
        const Vec number = load(numbers) + splat(float(j));
        s = number <= splat(float(last)) ? s : splat(kNone);
        s = number >= splat(float(first)) ? s : splat(kNone);
        store(score + j, s);
      }
      largest = max(largest, s);
    }
    const float maximum = std::max(state[0], reduce_max(largest));
    if (maximum == kNone) {  // nothing seen so far: the weights are zero
      decay[r] = 0.0f;
      std::fill(score, score + kTile, 0.0f);
      continue;
    }
    Vec sum = splat(0.0f);
    for (int64_t j = 0; j < kTile; j += kLanes) {
      const Vec weight = exp(load(score + j) - splat(maximum));
      store(score + j, weight);
      sum = sum + weight;
    }
    float powers[kLanes];
    store(powers, exp(splat(state[0] - maximum)));
    decay[r] = powers[0];
    state[1] = state[1] * decay[r] + reduce_add(sum);
    state[0] = maximum;
  }
  constexpr int vectors = kLanes == 16 ? 4 : 2;
  float* outputs = states + kLanes;
  int64_t d = 0;
  for (; d + vectors * kLanes <= plan.padded; d += vectors * kLanes) {
    value_tile<rows, vectors>(scores, decay, tile, d, outputs + d, plan.state);
  }
  for (; d < plan.padded; d += kLanes) {
    value_tile<rows, 1>(scores, decay, tile, d, outputs + d, plan.state);
  }
}

// All rows of one key-value head against one tile of keys. Walks rows by kBlock.
template <bool prefetch>
void step_rows(const Plan& plan, const float* q, const int64_t* positions, int64_t rows,
               const Tile& tile, int64_t key, float* states) {
  for (int64_t r = 0; r < rows; r += kBlock) {
    const float* some = q + r * plan.padded;
    float* state = states + r * plan.state;
    switch (std::min<int64_t>(rows - r, kBlock)) {
      case 1:
        step<1, prefetch>(plan, some, positions + r, tile, key, state);
        break;
      case 2:
        step<2, prefetch>(plan, some, positions + r, tile, key, state);
        break;
      case 3:
        step<3, prefetch>(plan, some, positions + r, tile, key, state);
        break;
      default:
        step<kBlock, prefetch>(plan, some, positions + r, tile, key, state);
    }
  }
}

// A piece for key-value heads [group, group + groups). Walks splits, tiles of keys, heads, rows.
template <class Q, class T>
void run_piece(const Plan& plan, const Piece& piece, int64_t group, int64_t groups) {
  const AttentionArgs& args = plan.args;
  const Span span(args, piece.sequence, piece.first, piece.queries);
  const int64_t token = args.starts[piece.sequence] + piece.first;
  const int64_t rows = piece.queries * plan.repeats, all = rows * groups;
  const bool direct = sizeof(T) == sizeof(float) && args.size == plan.padded &&
                      args.block % kRun == 0 && rows <= kRowsInPlace;
  const bool several = piece.last_split - piece.split > 1;

  const int64_t floats = all * plan.padded + 2 * all * plan.state + 2 * kTile * plan.padded;
  char* memory = static_cast<char*>(
      scratch(Scratch::inner, size_t(floats) * sizeof(float) + size_t(rows) * sizeof(int64_t)));
  float* q = reinterpret_cast<float*>(memory);
  float* states = q + all * plan.padded;
  float* totals = states + all * plan.state;
  float* copies = totals + all * plan.state;
  int64_t* positions = reinterpret_cast<int64_t*>(copies + 2 * kTile * plan.padded);

  for (int64_t g = 0; g < groups; ++g) {
    load_queries<Q>(plan, token, piece.queries, group + g, q + g * rows * plan.padded);
  }
  for (int64_t r = 0; r < rows; ++r) positions[r] = span.position + r / plan.repeats;
  if (several) clear(plan, totals, all);
  for (int64_t split = piece.split; split < piece.last_split; ++split) {
    clear(plan, states, all);
    const int64_t first = std::max(split * kSplit, span.first_key / kTile * kTile);
    const int64_t last = std::min((split + 1) * kSplit, span.last_key);
    for (int64_t key = first; key < last; key += kTile) {
      for (int64_t g = 0; g < groups; ++g) {
        const float* head_q = q + g * rows * plan.padded;
        float* head_states = states + g * rows * plan.state;
        if (direct) {
          const Tile tile = in_place(args, piece.sequence, group + g, key, last, span);
          step_rows<true>(plan, head_q, positions, rows, tile, key, head_states);
        } else {
          const Tile tile = unpacked<T>(plan, piece.sequence, group + g, key, last, span, copies);
          step_rows<false>(plan, head_q, positions, rows, tile, key, head_states);
        }
      }
    }
    if (several) merge(plan, totals, states, all);
  }
  const float* result = several ? totals : states;
  if (piece.parts) {
    std::memcpy(piece.parts + group * rows * plan.state, result,
                size_t(all * plan.state) * sizeof(float));
    return;
  }
  for (int64_t g = 0; g < groups; ++g) {
    store_outputs<Q>(plan, token, piece.queries, group + g, result + g * rows * plan.state);
  }
}

// Puts together the splits of the sequence that begins with `piece`, in order.
template <class Q>
void merge_parts(const Plan& plan, const Piece* piece, const Piece* end) {
  const AttentionArgs& args = plan.args;
  const int64_t rows = piece->queries * plan.repeats,
                token = args.starts[piece->sequence] + piece->first;
  float* states =
      static_cast<float*>(scratch(Scratch::inner, size_t(rows * plan.state) * sizeof(float)));
  for (int64_t g = 0; g < args.groups; ++g) {
    clear(plan, states, rows);
    for (const Piece* part = piece; part < end && part->sequence == piece->sequence; ++part) {
      merge(plan, states, part->parts + g * rows * plan.state, rows);
    }
    store_outputs<Q>(plan, token, piece->queries, g, states);
  }
}

template <class Q, class T>
void run(const AttentionArgs& args) {
  const int64_t repeats = args.heads / args.groups, padded = ceil_div(args.size, kLanes) * kLanes;
  const Plan plan{args, repeats, padded, kLanes + padded};
  const int64_t most = std::max<int64_t>(kRows / repeats, 1);  // queries of a tile

  // Tiles of queries; a sequence of one tile (decode) is cut into its splits too.
  Piece* pieces = nullptr;
  float* parts = nullptr;
  int64_t num_pieces = 0, num_parts = 0;
  for (const bool count_only : {true, false}) {
    num_pieces = num_parts = 0;
    for (int64_t s = 0; s < args.sequences; ++s) {
      const int64_t queries = args.starts[s + 1] - args.starts[s];
      for (int64_t first = 0; first < queries; first += most) {
        const int64_t some = std::min(most, queries - first);
        const Span span(args, s, first, some);
        const int64_t split = span.first_key / kSplit, last_split = ceil_div(span.last_key, kSplit);
        const bool cut = queries <= most && last_split - split > 1;
        for (int64_t i = split; i < (cut ? last_split : split + 1); ++i, ++num_pieces) {
          if (!count_only) {
            pieces[num_pieces] = {
                s, first, some, i, cut ? i + 1 : last_split, cut ? parts + num_parts : nullptr,
                0, 0};
          }
          if (cut) num_parts += args.heads * some * plan.state;
        }
      }
    }
    if (count_only) {
      const size_t bytes = (size_t(num_pieces) * sizeof(Piece) + 63) / 64 * 64;
      char* memory =
          static_cast<char*>(scratch(Scratch::outer, bytes + size_t(num_parts) * sizeof(float)));
      pieces = reinterpret_cast<Piece*>(memory);
      parts = reinterpret_cast<float*>(memory + bytes);
    }
  }

  split_work(
      pieces, num_pieces, kLeastWork * kBlock, [&](const Piece&) { return args.groups; },
      [&](const Piece& piece) {
        const Span span(args, piece.sequence, piece.first, piece.queries);
        const int64_t first = std::max(piece.split * kSplit, span.first_key);
        const int64_t keys = std::min(piece.last_split * kSplit, span.last_key) - first;
        return keys * (kBlock + piece.queries * repeats) * padded / kLanes;
      },
      [&](const Piece& piece, int64_t group, int64_t groups) {
        const int64_t together = std::max<int64_t>(kRowsTogether / (piece.queries * repeats), 1);
        for (int64_t g = group; g < group + groups; g += together) {
          run_piece<Q, T>(plan, piece, g, std::min(together, group + groups - g));
        }
      });
  if (num_parts == 0) return;
  parallel_for(
      num_pieces, std::max<int64_t>(num_pieces * 65536 / num_parts, 1),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if (pieces[i].parts && (i == 0 || pieces[i - 1].sequence != pieces[i].sequence)) {
            merge_parts<Q>(plan, pieces + i, pieces + num_pieces);
          }
        }
      });
}

}  // namespace

void attention(const AttentionArgs& args) {
  with_dtype(args.dtype, [&](auto q) {
    with_dtype(args.kv_dtype, [&](auto kv) { run<decltype(q), decltype(kv)>(args); });
  });
}

}  // namespace lorax::LORAX_ISA
