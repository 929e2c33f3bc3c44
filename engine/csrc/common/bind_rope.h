// Checks and arguments of rope_store_kv_. The values of positions and slot_mapping are not checked
// here: a GPU's stay on the GPU.
#pragma once

#include "bind.h"
#include "rope_args.h"

namespace lorax {

inline Heads heads_of(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  check_layout(op, name, t, 3);
  LORAX_CHECK(t.size(0) == q.size(0) && t.size(2) == q.size(2), op, ": ", name, " ", shape_of(t),
              " does not fit q ", shape_of(q));
  LORAX_CHECK(t.scalar_type() == q.scalar_type(), op, ": q, k and v must have one dtype");
  return {t.mutable_data_ptr(), t.size(1), t.stride(0), t.stride(1)};
}

// The data of int64 `t`[tokens].
inline const int64_t* indices_of(const char* op, const char* name, const Tensor& t,
                                 int64_t tokens) {
  check_layout(op, name, t, 1);
  LORAX_CHECK(t.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64");
  LORAX_CHECK(t.size(0) == tokens, op, ": ", name, " ", shape_of(t), " does not fit ", tokens,
              " tokens");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

inline RopeStoreKvArgs rope_store_kv_args(const char* op, const Tensor& q, const Tensor& k,
                                          const Tensor& v, const Tensor& cos_sin,
                                          const Tensor& positions, const Tensor& kv,
                                          const Tensor& slot_mapping, int64_t layer,
                                          bool interleaved) {
  RopeStoreKvArgs args{};
  args.dtype = dtype_of(op, "q", q);
  args.kv_dtype = dtype_of(op, "kv", kv);
  args.q = heads_of(op, "q", q, q);
  args.k = heads_of(op, "k", k, q);
  args.v = heads_of(op, "v", v, q);
  args.tokens = q.size(0);
  args.head_dim = q.size(2);
  check_layout(op, "kv", kv, 6);
  LORAX_CHECK(kv.size(2) == 2 && kv.size(4) == args.k.count && args.v.count == args.k.count &&
                  kv.size(5) == args.head_dim,
              op, ": kv ", shape_of(kv), " does not fit k ", shape_of(k), " and v ", shape_of(v));
  LORAX_CHECK(layer >= 0 && layer < kv.size(1), op, ": layer ", layer, " of ", kv.size(1));
  check_layout(op, "cos_sin", cos_sin, 2);
  LORAX_CHECK(cos_sin.scalar_type() == ScalarType::Float, op, ": cos_sin must be float32");
  LORAX_CHECK(cos_sin.size(1) % 2 == 0 && cos_sin.size(1) <= args.head_dim, op, ": cos_sin ",
              shape_of(cos_sin), " does not fit heads of ", args.head_dim);
  args.half = cos_sin.size(1) / 2;
  args.cos_sin = static_cast<const float*>(cos_sin.const_data_ptr());
  args.cos_sin_stride = cos_sin.stride(0);
  args.block_size = kv.size(3);
  args.positions = args.half ? indices_of(op, "positions", positions, args.tokens) : nullptr;
  args.places = indices_of(op, "slot_mapping", slot_mapping, args.tokens);
  args.kv =
      static_cast<char*>(kv.mutable_data_ptr()) + layer * kv.stride(1) * int64_t(kv.element_size());
  args.kv_block_stride = kv.stride(0);
  args.kv_value_stride = kv.stride(2);
  args.kv_offset_stride = kv.stride(3);
  args.kv_head_stride = kv.stride(4);
  args.interleaved = interleaved;
  return args;
}

}  // namespace lorax
