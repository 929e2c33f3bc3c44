// What every CUDA binding needs. Only for bind_*.cpp.
#pragma once

#include "../common/bind.h"
#include "kernels.h"

namespace lorax::cuda {

// The stream on which torch runs the work of the tensor's device; defined in bind_device.cpp.
cudaStream_t current_stream(const Tensor& t);

// Throws if the launch before it was refused.
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  LORAX_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace lorax::cuda
