// Checks that the LoRA ops share. The values of records, slots and segment_starts are not checked
// here: a GPU's stay on the GPU.
#pragma once

#include "bind.h"
#include "lora_record.h"

namespace lorax {

// A contiguous tensor of one type and `dims` dimensions; `wanted` describes it in the message.
inline void check_contiguous(const char* op, const char* name, const Tensor& t, int64_t dims,
                             ScalarType dtype, const char* wanted) {
  LORAX_CHECK(on_device(t) && t.dim() == dims && t.scalar_type() == dtype && t.is_contiguous(), op,
              ": ", name, " must be contiguous ", wanted, " on ", kDevice, ", its shape is ",
              shape_of(t));
}

inline void check_segments(const char* op, const Tensor& arena, const Tensor& records,
                           const Tensor& slots, const Tensor& segment_starts, int64_t layer,
                           int64_t group) {
  check_contiguous(op, "arena", arena, 1, ScalarType::Byte, "bytes");
  check_contiguous(op, "records", records, 4, ScalarType::Int,
                   "int32 [slots, layers + 1, groups, 8]");
  check_contiguous(op, "slots", slots, 1, ScalarType::Int, "int32 [G]");
  check_contiguous(op, "segment_starts", segment_starts, 1, ScalarType::Int, "int32 [G + 1]");
  LORAX_CHECK(records.size(3) == kRecordWords, op, ": records must have 8 words, their shape is ",
              shape_of(records));
  LORAX_CHECK(layer >= 0 && layer < records.size(1), op, ": layer ", layer,
              " is not in the records of ", records.size(1), " layers");
  LORAX_CHECK(group >= 0 && group < records.size(2), op, ": group ", group,
              " is not in the records of ", records.size(2), " groups");
  LORAX_CHECK(segment_starts.size(0) == slots.size(0) + 1, op,
              ": segment_starts must be [G + 1] with slots [G], the shapes are ",
              shape_of(segment_starts), " and ", shape_of(slots));
  LORAX_CHECK(reinterpret_cast<uintptr_t>(arena.const_data_ptr()) % kLoraAlign == 0, op,
              ": arena must be aligned to ", kLoraAlign, " bytes");
}

}  // namespace lorax
