// lorax::rope_store_kv_ on the CPU.
#include "../common/bind_rope.h"

#include "bind.h"
#include "rope.h"

namespace lorax {
namespace {

// Refuses values outside [0, limit).
void check_values(const char* op, const char* name, const int64_t* values, int64_t count,
                  int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    LORAX_CHECK(values[i] >= 0 && values[i] < limit, op, ": ", name, "[", i, "] is ", values[i],
                ", the limit is ", limit);
  }
}

void bind_rope_store_kv(Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor kv,
                        Tensor slot_mapping, int64_t layer, bool interleaved) {
  const char* op = "rope_store_kv_";
  const RopeStoreKvArgs args =
      rope_store_kv_args(op, q, k, v, cos_sin, positions, kv, slot_mapping, layer, interleaved);
  if (args.half) check_values(op, "positions", args.positions, args.tokens, cos_sin.size(0));
  check_values(op, "slot_mapping", args.places, args.tokens, kv.size(0) * kv.size(3));
  rope_store_kv(args);
}

}  // namespace
}  // namespace lorax

STABLE_TORCH_LIBRARY_IMPL(lorax, CPU, m) {
  m.impl("rope_store_kv_", TORCH_BOX(&lorax::bind_rope_store_kv));
}
