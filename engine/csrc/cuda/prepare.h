// What a step does ahead of the model: edits of the host, and the inputs of the layers.
#pragma once

#include "kernels.h"
#include "step_index.h"

namespace lorax::cuda {

struct WriteRunsArgs {
  int32_t* words;  // [num_words]
  int64_t num_words;
  const int32_t* patch;  // [patch_words], in memory that the GPU can read
  int64_t patch_words;
  int runs;
};

void write_runs(const WriteRunsArgs& args, cudaStream_t stream);
void prepare_step(const PrepareArgs& args, cudaStream_t stream);

}  // namespace lorax::cuda
