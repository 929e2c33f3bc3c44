// Adapters of a batch on the CPU: x @ A.T, rows of A by id, y += scale * t @ B, y = scale * y + shift.
#pragma once

#include "kernels.h"

namespace lorax {

// The consecutive tokens of one slot, and its A of the group.
struct ShrinkPiece {
  const void* a;  // [rank, k], or [vocab, rank] to gather
  int64_t first;  // token
  int64_t tokens;
  int64_t rank;             // stacked over targets
  int64_t work, unit_work;  // the kernel's own: where the piece begins in the work of the call, and
                            // that of a unit
};

struct ShrinkArgs {
  DType dtype;  // of x and A
  const void* x;
  int64_t x_stride;
  int64_t k;
  int64_t a_stride;
  float* t;
  int64_t t_stride;
  ShrinkPiece* pieces;
  int64_t num_pieces;
};

struct GatherArgs {
  DType dtype;  // of A
  const int64_t* ids;
  float* t;
  int64_t t_stride;
  ShrinkPiece* pieces;
  int64_t num_pieces;
};

// The consecutive tokens of one slot, and its B of one target.
struct ExpandPiece {
  const void* b;  // [rank, columns]
  int64_t b_stride;
  float scale;
  int64_t first;  // token
  int64_t tokens;
  int64_t rank;
  int64_t row;     // first of the target's ranks in t
  int64_t column;  // first of the target's columns in y
  int64_t columns;
  int64_t work, unit_work;  // as above
};

struct ExpandArgs {
  DType dtype;  // of y and B
  void* y;
  int64_t y_stride;
  const float* t;
  int64_t t_stride;
  ExpandPiece* pieces;
  int64_t num_pieces;
};

// The consecutive tokens of one slot that has extras.
struct RescalePiece {
  const float* scale;  // [columns]; null: 1
  const float* shift;  // [columns]; null: 0
  int64_t first;       // token
  int64_t tokens;
};

struct RescaleArgs {
  DType dtype;  // of y
  void* y;
  int64_t y_stride;
  int64_t columns;
  const RescalePiece* pieces;
  int64_t num_pieces;
};

}  // namespace lorax

LORAX_DECLARE_KERNEL(lora_shrink, ShrinkArgs)
LORAX_DECLARE_KERNEL(lora_gather, GatherArgs)
LORAX_DECLARE_KERNEL(lora_expand, ExpandArgs)
LORAX_DECLARE_KERNEL(lora_rescale, RescaleArgs)
