// Arguments of the dense linear layer.
#pragma once

#include "kernels.h"

namespace lorax {

struct LinearArgs {
  const void* x;       // [tokens, inputs], `x_stride` elements from row to row
  const void* weight;  // [outputs, inputs], `weight_stride` elements from row to row
  const void* bias;    // [outputs] or null
  void* out;           // [tokens, outputs], contiguous
  int64_t tokens, inputs, outputs, x_stride, weight_stride;
  DType dtype;  // of all four
};

}  // namespace lorax

LORAX_DECLARE_KERNEL(linear, LinearArgs)
