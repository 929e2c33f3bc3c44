// The ops lorax::lora_... on the GPU.
//
// Only shapes are checked: what slots, segment_starts and records hold is read by the kernels.
#include "../common/bind_lora.h"

#include "bind.h"
#include "lora.h"

namespace lorax::cuda {
namespace {

constexpr int64_t kMaxSegments = 65535;  // of a grid

LoraSegments segments_of(const char* op, const Tensor& arena, const Tensor& records,
                         const Tensor& slots, const Tensor& segment_starts, int64_t layer,
                         int64_t group, int64_t tokens) {
  check_segments(op, arena, records, slots, segment_starts, layer, group);
  const int64_t layers = records.size(1), groups = records.size(2);
  LORAX_CHECK(slots.size(0) <= kMaxSegments, op, ": ", slots.size(0), " segments, at most ",
              kMaxSegments, " fit into a launch");
  LoraSegments segments{};
  segments.arena = arena.const_data_ptr();
  segments.arena_bytes = arena.size(0);
  segments.record_stride = layers * groups * kRecordWords;
  segments.records = static_cast<const int32_t*>(records.const_data_ptr()) +
                     (layer * groups + group) * kRecordWords;
  segments.num_slots = records.size(0);
  segments.slots = static_cast<const int32_t*>(slots.const_data_ptr());
  segments.starts = static_cast<const int32_t*>(segment_starts.const_data_ptr());
  segments.count = slots.size(0);
  segments.tokens = tokens;
  return segments;
}

Tensor bind_lora_shrink(Tensor x, Tensor arena, Tensor records, Tensor slots, Tensor segment_starts,
                        int64_t layer, int64_t group, int64_t stacked_rank, bool overlap) {
  const char* op = "lora_shrink";
  check_layout(op, "x", x, 2);
  LORAX_CHECK(stacked_rank >= 0, op, ": stacked_rank ", stacked_rank, " is negative");
  ShrinkArgs args{};
  args.dtype = dtype_of(op, "x", x);
  args.segments = segments_of(op, arena, records, slots, segment_starts, layer, group, x.size(0));
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.k = x.size(1);
  args.width = stacked_rank;
  args.overlap = overlap;
  Tensor t = empty(x, {shrink_parts(args.k), x.size(0), stacked_rank}, ScalarType::Float);
  args.t = static_cast<float*>(t.mutable_data_ptr());
  lora_shrink(args, current_stream(x));
  check_launch(op);
  return t;
}

Tensor bind_lora_gather(Tensor ids, Tensor arena, Tensor records, Tensor slots,
                        Tensor segment_starts, int64_t layer, int64_t group, int64_t stacked_rank,
                        ScalarType dtype) {
  const char* op = "lora_gather";
  check_contiguous(op, "ids", ids, 1, ScalarType::Long, "int64 [T]");
  LORAX_CHECK(stacked_rank >= 0, op, ": stacked_rank ", stacked_rank, " is negative");
  GatherArgs args{};
  args.dtype = dtype_of(op, "dtype", dtype);
  args.segments = segments_of(op, arena, records, slots, segment_starts, layer, group, ids.size(0));
  args.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  args.width = stacked_rank;
  Tensor t = empty(ids, {1, ids.size(0), stacked_rank}, ScalarType::Float);
  args.t = static_cast<float*>(t.mutable_data_ptr());
  lora_gather(args, current_stream(ids));
  check_launch(op);
  return t;
}

void bind_lora_expand(Tensor y, Tensor t, Tensor arena, Tensor records, Tensor slots,
                      Tensor segment_starts, int64_t layer, int64_t group,
                      std::vector<int64_t> splits) {
  const char* op = "lora_expand_";
  check_layout(op, "y", y, 2);
  check_contiguous(op, "t", t, 3, ScalarType::Float, "float32 [P, T, stacked_rank]");
  LORAX_CHECK(t.size(1) == y.size(0), op, ": t ", shape_of(t), " does not fit y ", shape_of(y));
  ExpandArgs args{};
  int64_t columns = 0;
  for (size_t i = 0; i < splits.size(); ++i) {
    LORAX_CHECK(i < size_t(kLoraTargets) && splits[i] >= 0, op,
                ": splits must be the widths of at most 3 targets");
    args.splits[i] = splits[i];
    columns += splits[i];
  }
  LORAX_CHECK(columns == y.size(1), op, ": splits add up to ", columns, ", y is ", shape_of(y));
  args.dtype = dtype_of(op, "y", y);
  args.segments = segments_of(op, arena, records, slots, segment_starts, layer, group, y.size(0));
  args.y = y.mutable_data_ptr();
  args.y_stride = y.stride(0);
  args.t = static_cast<const float*>(t.const_data_ptr());
  args.parts = t.size(0);
  args.width = t.size(2);
  lora_expand(args, current_stream(y));
  check_launch(op);
}

void bind_lora_rescale(Tensor y, Tensor arena, Tensor records, Tensor slots, Tensor segment_starts,
                       int64_t layer, int64_t group) {
  const char* op = "lora_rescale_";
  check_layout(op, "y", y, 2);
  RescaleArgs args{};
  args.dtype = dtype_of(op, "y", y);
  args.segments = segments_of(op, arena, records, slots, segment_starts, layer, group, y.size(0));
  args.y = y.mutable_data_ptr();
  args.y_stride = y.stride(0);
  args.columns = y.size(1);
  lora_rescale(args, current_stream(y));
  check_launch(op);
}

void bind_lora_own_rows(Tensor y, Tensor ids, Tensor arena, Tensor records, Tensor slots,
                        Tensor segment_starts, int64_t layer, int64_t group) {
  const char* op = "lora_own_rows_";
  check_layout(op, "y", y, 2);
  check_contiguous(op, "ids", ids, 1, ScalarType::Long, "int64 [T]");
  LORAX_CHECK(ids.size(0) == y.size(0), op, ": ids ", shape_of(ids), " does not fit y ",
              shape_of(y));
  OwnRowsArgs args{};
  args.dtype = dtype_of(op, "y", y);
  args.segments = segments_of(op, arena, records, slots, segment_starts, layer, group, y.size(0));
  args.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  args.y = y.mutable_data_ptr();
  args.y_stride = y.stride(0);
  args.hidden = y.size(1);
  lora_own_rows(args, current_stream(y));
  check_launch(op);
}

void bind_lora_own_logits(Tensor y, Tensor x, Tensor arena, Tensor records, Tensor slots,
                          Tensor segment_starts, int64_t layer, int64_t group) {
  const char* op = "lora_own_logits_";
  check_layout(op, "y", y, 2);
  check_layout(op, "x", x, 2);
  LORAX_CHECK(x.size(0) == y.size(0) && x.scalar_type() == y.scalar_type(), op, ": x ",
              shape_of(x), " does not fit y ", shape_of(y));
  OwnLogitsArgs args{};
  args.dtype = dtype_of(op, "y", y);
  args.segments = segments_of(op, arena, records, slots, segment_starts, layer, group, y.size(0));
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.hidden = x.size(1);
  args.y = y.mutable_data_ptr();
  args.y_stride = y.stride(0);
  args.columns = y.size(1);
  lora_own_logits(args, current_stream(y));
  check_launch(op);
}

}  // namespace
}  // namespace lorax::cuda

STABLE_TORCH_LIBRARY_IMPL(lorax, CUDA, m) {
  m.impl("lora_shrink", TORCH_BOX(&lorax::cuda::bind_lora_shrink));
  m.impl("lora_gather", TORCH_BOX(&lorax::cuda::bind_lora_gather));
  m.impl("lora_expand_", TORCH_BOX(&lorax::cuda::bind_lora_expand));
  m.impl("lora_rescale_", TORCH_BOX(&lorax::cuda::bind_lora_rescale));
  m.impl("lora_own_rows_", TORCH_BOX(&lorax::cuda::bind_lora_own_rows));
  m.impl("lora_own_logits_", TORCH_BOX(&lorax::cuda::bind_lora_own_logits));
}
