// Arguments of the kernels that walk rows: RMS norm and gated activations.
#pragma once

#include "dtype.h"

namespace lorax {

struct AddRmsNormArgs {
  const void* x;       // [rows, width], `x_stride` elements from row to row
  void* residual;      // [rows, width] or null; becomes residual + x
  const void* weight;  // [width], of `weight_dtype`
  void* out;           // [rows, width], contiguous
  int64_t rows, width, x_stride, residual_stride;
  float eps;
  DType dtype, weight_dtype;
};

enum class Activation : int32_t { silu, gelu, gelu_tanh };

struct ActAndMulArgs {
  const void* x;  // [rows, 2 * width]: gate, then up; `x_stride` elements from row to row
  void* out;      // [rows, width], contiguous
  int64_t rows, width, x_stride;
  Activation act;
  DType dtype;
};

}  // namespace lorax
