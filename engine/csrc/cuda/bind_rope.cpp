// lorax::rope_store_kv_ on CUDA.
#include "bind.h"
#include "rope.h"

namespace lorax::cuda {
namespace {

constexpr const char* kOp = "rope_store_kv_";

Heads heads_of(const char* name, const Tensor& t, const Tensor& q) {
  check_layout(kOp, name, t, 3);
  LORAX_CHECK(t.size(0) == q.size(0) && t.size(2) == q.size(2), kOp, ": ", name, " ", shape_of(t),
              " does not fit q ", shape_of(q));
  LORAX_CHECK(t.scalar_type() == q.scalar_type(), kOp, ": q, k and v must have one dtype");
  return {t.mutable_data_ptr(), t.size(1), t.stride(0), t.stride(1)};
}

// The data of int64 `t`[tokens]. Its values stay on the GPU, so nobody checks them here.
const int64_t* indices_of(const char* name, const Tensor& t, int64_t tokens) {
  check_layout(kOp, name, t, 1);
  LORAX_CHECK(t.scalar_type() == ScalarType::Long, kOp, ": ", name, " must be int64");
  LORAX_CHECK(t.size(0) == tokens, kOp, ": ", name, " ", shape_of(t), " does not fit ", tokens,
              " tokens");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

void bind_rope_store_kv(Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor kv,
                        Tensor places, int64_t layer, bool interleaved) {
  RopeStoreKvArgs args{};
  args.dtype = dtype_of(kOp, "q", q);
  args.kv_dtype = dtype_of(kOp, "kv", kv);
  args.q = heads_of("q", q, q);
  args.k = heads_of("k", k, q);
  args.v = heads_of("v", v, q);
  args.tokens = q.size(0);
  args.head_dim = q.size(2);
  check_layout(kOp, "kv", kv, 6);
  LORAX_CHECK(kv.size(2) == 2 && kv.size(4) == args.k.count && args.v.count == args.k.count &&
                  kv.size(5) == args.head_dim,
              kOp, ": kv ", shape_of(kv), " does not fit k ", shape_of(k), " and v ", shape_of(v));
  LORAX_CHECK(layer >= 0 && layer < kv.size(1), kOp, ": layer ", layer, " of ", kv.size(1));
  check_layout(kOp, "cos_sin", cos_sin, 2);
  LORAX_CHECK(cos_sin.scalar_type() == ScalarType::Float, kOp, ": cos_sin must be float32");
  LORAX_CHECK(cos_sin.size(1) % 2 == 0 && cos_sin.size(1) <= args.head_dim, kOp, ": cos_sin ",
              shape_of(cos_sin), " does not fit heads of ", args.head_dim);
  args.half = cos_sin.size(1) / 2;
  args.cos_sin = static_cast<const float*>(cos_sin.const_data_ptr());
  args.cos_sin_stride = cos_sin.stride(0);
  args.block_size = kv.size(3);
  args.positions = args.half ? indices_of("positions", positions, args.tokens) : nullptr;
  args.places = indices_of("places", places, args.tokens);
  args.kv =
      static_cast<char*>(kv.mutable_data_ptr()) + layer * kv.stride(1) * int64_t(kv.element_size());
  args.kv_block_stride = kv.stride(0);
  args.kv_half_stride = kv.stride(2);
  args.kv_offset_stride = kv.stride(3);
  args.kv_head_stride = kv.stride(4);
  args.interleaved = interleaved;
  rope_store_kv(args, current_stream(q));
  check_launch(kOp);
}

}  // namespace
}  // namespace lorax::cuda

STABLE_TORCH_LIBRARY_IMPL(lorax, CUDA, m) {
  m.impl("rope_store_kv_", TORCH_BOX(&lorax::cuda::bind_rope_store_kv));
}
