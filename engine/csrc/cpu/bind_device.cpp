// What the kernels need from torch on the CPU. parallel_run uses torch's own threads, so that the
// kernels and torch's operators share one pool.
#include "bind.h"

namespace lorax {

const char* const kDevice = "the CPU";

bool on_device(const Tensor& t) { return t.is_cpu(); }

void parallel_run(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                  void* context) {
  if (count <= 0) return;
  if (count <= grain) return body(0, count, context);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

}  // namespace lorax
