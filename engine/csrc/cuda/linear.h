// y = x @ weight.T + bias for few tokens, where reading the weights is all that takes time.
#pragma once

#include "kernels.h"

namespace lorax::cuda {

constexpr int64_t kLinearFewTokens = 256;  // beyond it a library multiplies

struct LinearArgs {
  DType dtype;         // of all: bfloat16 or float16
  const void* x;       // [tokens, columns], `x_stride` elements from row to row
  const void* weight;  // [rows, columns], `weight_stride` elements from row to row
  const void* bias;    // [rows] or null
  void* y;             // [tokens, rows], contiguous
  int64_t tokens, rows, columns, x_stride, weight_stride;
};

// Whether the kernel serves this call: a Hopper GPU, 16-bit elements, few tokens, rows that the
// bulk copies can address. A library serves the others.
bool linear_supports(const LinearArgs& args);

void linear(const LinearArgs& args, cudaStream_t stream);

}  // namespace lorax::cuda
