// lorax::rope_store_kv_ on CUDA.
#include "../common/bind_rope.h"

#include "bind.h"
#include "rope.h"

namespace lorax::cuda {
namespace {

void bind_rope_store_kv(Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor kv,
                        Tensor slot_mapping, int64_t layer, bool interleaved) {
  const char* op = "rope_store_kv_";
  rope_store_kv(rope_store_kv_args(op, q, k, v, cos_sin, positions, kv, slot_mapping, layer,
                                   interleaved),
                current_stream(q));
  check_launch(op);
}

}  // namespace
}  // namespace lorax::cuda

STABLE_TORCH_LIBRARY_IMPL(lorax, CUDA, m) {
  m.impl("rope_store_kv_", TORCH_BOX(&lorax::cuda::bind_rope_store_kv));
}
