// What engine/ops/matrices.py calls through ctypes, which lets other Python threads run meanwhile.
#include "matrices.h"

extern "C" {

// Returns the first piece with a value that is not finite in `dtype`; -1: there is none.
__attribute__((visibility("default"))) int64_t
lorax_cpu_write_matrices(const uint8_t* source, uint8_t* image, const lorax::MatrixPiece* pieces,
                         int64_t num_pieces, int32_t dtype) {
  int64_t bad = -1;
  lorax::write_matrices({source, image, pieces, num_pieces, lorax::DType(dtype), &bad});
  return bad;
}
}
