// RMS norm and gated activations on the GPU.
#pragma once

#include "../common/elementwise_args.h"
#include "kernels.h"

namespace lorax::cuda {

void add_rms_norm(const AddRmsNormArgs& args, cudaStream_t stream);
void act_and_mul(const ActAndMulArgs& args, cudaStream_t stream);

}  // namespace lorax::cuda
