// The rotary embedding that also fills the KV cache, on the GPU.
#pragma once

#include "../common/rope_args.h"
#include "kernels.h"

namespace lorax::cuda {

void rope_store_kv(const RopeStoreKvArgs& args, cudaStream_t stream);

}  // namespace lorax::cuda
