// lorax::lora_shrink, lorax::lora_gather, lorax::lora_expand_ and lorax::lora_rescale_ on the CPU.
//
// The bindings read the records (engine/ops/layout.py), check that what they point at lies in the
// arena, and hand the kernels one piece per segment (shrink, gather, rescale) or per segment and
// target (expand). Base segments yield none.
#include "../common/bind_lora.h"

#include "bind.h"
#include "lora.h"

namespace lorax {
namespace {

struct Record {
  uint32_t a, b, extra;
  uint16_t ranks[4];  // of three targets; then flags
  float scales[kLoraTargets];

  bool has_extras() const { return (ranks[3] & kFlagsExtras) != 0; }
  int64_t rank() const { return int64_t(ranks[0]) + ranks[1] + ranks[2]; }
};
static_assert(sizeof(Record) == kRecordWords * 4);

int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

int64_t padded(int64_t bytes) { return (bytes + kLoraAlign - 1) / kLoraAlign * kLoraAlign; }

// The checked view of arena, records, slots and segment_starts that the ops share.
class Segments {
 public:
  Segments(const char* op, const Tensor& arena, const Tensor& records, const Tensor& slots,
           const Tensor& segment_starts, int64_t layer, int64_t group, int64_t tokens)
      : op_(op) {
    check_segments(op, arena, records, slots, segment_starts, layer, group);
    const int64_t layers = records.size(1), groups = records.size(2);
    count_ = slots.size(0);
    arena_ = static_cast<const char*>(arena.const_data_ptr());
    arena_bytes_ = arena.size(0);
    num_slots_ = records.size(0);
    stride_ = layers * groups;
    records_ = static_cast<const Record*>(records.const_data_ptr()) + layer * groups + group;
    slots_ = static_cast<const int32_t*>(slots.const_data_ptr());
    starts_ = static_cast<const int32_t*>(segment_starts.const_data_ptr());
    int64_t before = 0;
    for (int64_t s = 0; s <= count_; ++s) {
      LORAX_CHECK(starts_[s] >= before && starts_[s] <= tokens, op,
                  ": segment_starts must rise from 0 to at most ", tokens, " tokens, found ",
                  starts_[s], " after ", before);
      before = starts_[s];
    }
  }

  int64_t count() const { return count_; }

  // Calls f(slot, record, first token, tokens) for every segment that has tokens.
  template <class F>
  void for_all(const F& f) const {
    for (int64_t s = 0; s < count_; ++s) {
      const int64_t slot = slots_[s], first = starts_[s], tokens = starts_[s + 1] - first;
      LORAX_CHECK(slot >= 0 && slot < num_slots_, op_, ": slot ", slot,
                  " is not in the records of ", num_slots_, " slots");
      if (tokens) f(slot, records_[slot * stride_], first, tokens);
    }
  }

  // The same for every segment whose adapter has a pair in this group.
  template <class F>
  void for_each(int64_t stacked_rank, const F& f) const {
    for_all([&](int64_t slot, const Record& record, int64_t first, int64_t tokens) {
      if (record.rank() == 0) return;
      LORAX_CHECK(record.rank() <= stacked_rank, op_, ": stacked_rank ", stacked_rank,
                  " is below ", record.rank(), ", that of slot ", slot);
      f(slot, record, first, tokens);
    });
  }

  // What lies `offset` bytes into the arena, `bytes` of it.
  const char* arena_at(int64_t slot, int64_t offset, int64_t bytes) const {
    LORAX_CHECK(offset + bytes <= arena_bytes_, op_, ": the adapter in slot ", slot, " (bytes ",
                offset, " to ", offset + bytes, ") reaches past the end of the arena of ",
                arena_bytes_, " bytes");
    return arena_ + offset;
  }

 private:
  const char* op_;
  const char* arena_;
  int64_t arena_bytes_, count_, num_slots_, stride_;
  const Record* records_;
  const int32_t *slots_, *starts_;
};

template <class T>
T* outer_scratch(int64_t count) {
  return static_cast<T*>(scratch(Scratch::outer, size_t(count) * sizeof(T)));
}

Tensor bind_lora_shrink(Tensor x, Tensor arena, Tensor records, Tensor slots, Tensor segment_starts,
                        int64_t layer, int64_t group, int64_t stacked_rank, bool) {
  const char* op = "lora_shrink";
  check_layout(op, "x", x, 2);
  ShrinkArgs args{};
  args.dtype = dtype_of(op, "x", x);
  LORAX_CHECK(stacked_rank >= 0, op, ": stacked_rank ", stacked_rank, " is negative");
  const Segments segments(op, arena, records, slots, segment_starts, layer, group, x.size(0));
  Tensor t = empty(x, {1, x.size(0), stacked_rank}, ScalarType::Float);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.k = x.size(1);
  const int64_t row_bytes = padded(args.k * size_of(args.dtype));
  args.a_stride = row_bytes / size_of(args.dtype);
  args.t = static_cast<float*>(t.mutable_data_ptr());
  args.t_stride = stacked_rank;
  args.pieces = outer_scratch<ShrinkPiece>(segments.count());
  segments.for_each(stacked_rank, [&](int64_t slot, const Record& record, int64_t first,
                                      int64_t tokens) {
    const char* a = segments.arena_at(slot, record.a * kLoraAlign, record.rank() * row_bytes);
    args.pieces[args.num_pieces++] = {a, first, tokens, record.rank(), 0, 0};
  });
  if (args.num_pieces) lora_shrink(args);
  return t;
}

Tensor bind_lora_gather(Tensor ids, Tensor arena, Tensor records, Tensor slots,
                        Tensor segment_starts, int64_t layer, int64_t group, int64_t stacked_rank,
                        ScalarType dtype) {
  const char* op = "lora_gather";
  check_contiguous(op, "ids", ids, 1, ScalarType::Long, "int64 [T]");
  LORAX_CHECK(stacked_rank >= 0, op, ": stacked_rank ", stacked_rank, " is negative");
  const Segments segments(op, arena, records, slots, segment_starts, layer, group, ids.size(0));
  GatherArgs args{};
  args.dtype = dtype_of(op, "dtype", dtype);
  Tensor t = empty(ids, {1, ids.size(0), stacked_rank}, ScalarType::Float);
  args.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  args.t = static_cast<float*>(t.mutable_data_ptr());
  args.t_stride = stacked_rank;
  args.pieces = outer_scratch<ShrinkPiece>(segments.count());
  segments.for_each(stacked_rank, [&](int64_t slot, const Record& record, int64_t first,
                                      int64_t tokens) {
    const int64_t rank = record.ranks[0], row_bytes = padded(rank * size_of(args.dtype));
    int64_t largest = 0;
    for (int64_t i = first; i < first + tokens; ++i) {
      LORAX_CHECK(args.ids[i] >= 0 && args.ids[i] <= INT32_MAX, op, ": id ", args.ids[i],
                  " is no token id");
      largest = args.ids[i] > largest ? args.ids[i] : largest;
    }
    const char* a = segments.arena_at(slot, record.a * kLoraAlign, (largest + 1) * row_bytes);
    args.pieces[args.num_pieces++] = {a, first, tokens, rank, 0, 0};
  });
  if (args.num_pieces) lora_gather(args);
  return t;
}

// t[0] + t[1] + ..., in this order, of t[P, T, stacked_rank]; a single part is used as it is.
const float* sum_parts(const Tensor& t, float* sums) {
  const float* parts = static_cast<const float*>(t.const_data_ptr());
  const int64_t size = t.size(1) * t.size(2);
  if (t.size(0) == 1) return parts;
  for (int64_t i = 0; i < size; ++i) sums[i] = 0.0f;
  for (int64_t p = 0; p < t.size(0); ++p) {
    for (int64_t i = 0; i < size; ++i) sums[i] += parts[p * size + i];
  }
  return sums;
}

void bind_lora_expand(Tensor y, Tensor t, Tensor arena, Tensor records, Tensor slots,
                      Tensor segment_starts, int64_t layer, int64_t group,
                      std::vector<int64_t> splits) {
  const char* op = "lora_expand_";
  check_layout(op, "y", y, 2);
  ExpandArgs args{};
  args.dtype = dtype_of(op, "y", y);
  LORAX_CHECK(t.is_cpu() && t.dim() == 3 && t.size(1) == y.size(0) &&
                  t.scalar_type() == ScalarType::Float && t.is_contiguous(),
              op, ": t must be contiguous float32 [P, T, stacked_rank] beside y ", shape_of(y),
              ", its shape is ", shape_of(t));
  const int64_t num_splits = int64_t(splits.size());
  int64_t columns = 0;
  for (int64_t n : splits) columns = n < 0 || columns < 0 ? -1 : columns + n;
  LORAX_CHECK(num_splits <= kLoraTargets && columns == y.size(1), op,
              ": splits must be the widths of at most 3 targets that fill y ", shape_of(y));
  const Segments segments(op, arena, records, slots, segment_starts, layer, group, y.size(0));
  const int64_t pieces_bytes =
      padded(segments.count() * kLoraTargets * int64_t(sizeof(ExpandPiece)));
  const int64_t sums_bytes = t.size(0) == 1 ? 0 : t.size(1) * t.size(2) * int64_t(sizeof(float));
  char* memory = outer_scratch<char>(pieces_bytes + sums_bytes);
  args.pieces = reinterpret_cast<ExpandPiece*>(memory);
  args.y = y.mutable_data_ptr();
  args.y_stride = y.stride(0);
  args.t_stride = t.size(2);
  const int64_t size = size_of(args.dtype);
  segments.for_each(t.size(2), [&](int64_t slot, const Record& record, int64_t first,
                                   int64_t tokens) {
    int64_t offset = record.b * kLoraAlign, row = 0, column = 0;
    for (int64_t target = 0; target < kLoraTargets; ++target) {
      const int64_t rank = record.ranks[target], n = target < num_splits ? splits[target] : 0;
      LORAX_CHECK(rank == 0 || target < num_splits, op, ": slot ", slot, " has rank ", rank,
                  " for target ", target, ", but splits names ", num_splits, " targets");
      const int64_t row_bytes = padded(n * size);
      if (rank > 0 && n > 0) {
        const char* b = segments.arena_at(slot, offset, rank * row_bytes);
        args.pieces[args.num_pieces++] = {
            b, row_bytes / size, record.scales[target], first, tokens, rank, row, column, n, 0, 0};
      }
      offset += rank * row_bytes;
      row += rank;
      column += n;
    }
  });
  if (args.num_pieces == 0) return;
  args.t = sum_parts(t, reinterpret_cast<float*>(memory + pieces_bytes));
  lora_expand(args);
}

void bind_lora_rescale(Tensor y, Tensor arena, Tensor records, Tensor slots, Tensor segment_starts,
                       int64_t layer, int64_t group) {
  const char* op = "lora_rescale_";
  check_layout(op, "y", y, 2);
  RescaleArgs args{};
  args.dtype = dtype_of(op, "y", y);
  const Segments segments(op, arena, records, slots, segment_starts, layer, group, y.size(0));
  args.y = y.mutable_data_ptr();
  args.y_stride = y.stride(0);
  args.columns = y.size(1);
  const int64_t row_bytes = padded(args.columns * int64_t(sizeof(float)));
  RescalePiece* pieces = outer_scratch<RescalePiece>(segments.count());
  segments.for_all([&](int64_t slot, const Record& record, int64_t first, int64_t tokens) {
    if (!record.has_extras()) return;
    int64_t offset = record.extra * kLoraAlign;
    const auto row = [&](bool there) -> const float* {
      if (!there) return nullptr;
      const char* found = segments.arena_at(slot, offset, row_bytes);
      offset += row_bytes;
      return reinterpret_cast<const float*>(found);
    };
    const float* scale = row(record.ranks[3] & kFlagsScaled);
    const float* shift = row(record.ranks[3] & kFlagShift);
    pieces[args.num_pieces++] = {scale, shift, first, tokens};
  });
  args.pieces = pieces;
  if (args.num_pieces && args.columns) lora_rescale(args);
}

}  // namespace
}  // namespace lorax

STABLE_TORCH_LIBRARY_IMPL(lorax, CPU, m) {
  m.impl("lora_shrink", TORCH_BOX(&lorax::bind_lora_shrink));
  m.impl("lora_gather", TORCH_BOX(&lorax::bind_lora_gather));
  m.impl("lora_expand_", TORCH_BOX(&lorax::bind_lora_expand));
  m.impl("lora_rescale_", TORCH_BOX(&lorax::bind_lora_rescale));
}
