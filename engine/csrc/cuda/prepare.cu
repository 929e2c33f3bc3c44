// The head of a step: what the host has changed goes into the device's state, and the state of the
// step's rows is gathered into batch order.
#include "prepare.h"

namespace lorax::cuda {
namespace {

constexpr int kThreads = 128;

// Grid (runs). A CTA walks the words of one run: (destination, count, source) from the end of the
// patch, which may lie in host memory, so all loads of a thread's turn are independent.
__global__ void __launch_bounds__(kThreads) write_runs_kernel(const WriteRunsArgs args) {
  const int32_t* run = args.patch + args.patch_words - 3 * (int64_t(blockIdx.x) + 1);
  const int64_t to = run[0], count = run[1], from = run[2];
  if (to < 0 || from < 0 || to + count > args.num_words || from + count > args.patch_words) return;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kThreads) args.words[to + i] = args.patch[from + i];
}

// Grid (sequences + 1). A CTA has one sequence, the last one the padding behind them.
__global__ void __launch_bounds__(kThreads) prepare_step_kernel(const PrepareArgs args) {
  const int s = blockIdx.x;
  if (s == args.sequences) return prepare_padding(args, threadIdx.x, kThreads);
  const int first = first_position(args, s);
  __syncthreads();  // before the row advances
  prepare_sequence(args, s, first, threadIdx.x, kThreads);
}

}  // namespace

void write_runs(const WriteRunsArgs& args, cudaStream_t stream) {
  if (args.runs > 0) write_runs_kernel<<<args.runs, kThreads, 0, stream>>>(args);
}

void prepare_step(const PrepareArgs& args, cudaStream_t stream) {
  prepare_step_kernel<<<args.sequences + 1, kThreads, 0, stream>>>(args);
}

}  // namespace lorax::cuda
