// Arguments of the kernel that writes the matrices of an adapter's file into its image.
#pragma once

#include "kernels.h"

namespace lorax {

// Rows of one matrix; the fields of engine/ops/matrices.py, in its order.
struct MatrixPiece {
  int64_t source;  // bytes from the start of `source`; a multiple of the element's size
  int64_t rows, columns;
  int64_t element;  // of the source: 0 float32, 1 bfloat16, 2 float16, 3 float64
  int64_t target;   // bytes from the start of `image` to where the first element goes
  int64_t stride;   // elements of the image from row to row; transposed: from column to column
  int64_t transposed;
};

struct WriteMatricesArgs {
  const uint8_t* source;
  uint8_t* image;
  const MatrixPiece* pieces;
  int64_t num_pieces;
  DType dtype;   // of the image
  int64_t* bad;  // becomes the first piece with a value that is not finite in `dtype`; -1: none
};

}  // namespace lorax

LORAX_DECLARE_KERNEL(write_matrices, WriteMatricesArgs)
