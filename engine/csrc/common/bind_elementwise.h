// Checks and arguments of add_rms_norm and act_and_mul. The binding of a device allocates `out`,
// which is null here, and launches its kernel.
#pragma once

#include "bind.h"
#include "elementwise_args.h"

namespace lorax {

inline AddRmsNormArgs add_rms_norm_args(const Tensor& x, const std::optional<Tensor>& residual,
                                        const Tensor& weight, double eps) {
  const char* op = "add_rms_norm";
  check_layout(op, "x", x, 2);
  check_layout(op, "weight", weight, 1);
  LORAX_CHECK(weight.size(0) == x.size(1), op, ": weight ", shape_of(weight), " does not fit x ",
              shape_of(x));
  AddRmsNormArgs args{};
  args.dtype = dtype_of(op, "x", x);
  args.weight_dtype = dtype_of(op, "weight", weight);
  if (residual) {
    check_layout(op, "residual", *residual, 2);
    LORAX_CHECK(residual->size(0) == x.size(0) && residual->size(1) == x.size(1), op, ": residual ",
                shape_of(*residual), " does not fit x ", shape_of(x));
    LORAX_CHECK(residual->scalar_type() == x.scalar_type(), op,
                ": residual and x must have one dtype");
    args.residual = residual->mutable_data_ptr();
    args.residual_stride = residual->stride(0);
  }
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.rows = x.size(0);
  args.width = x.size(1);
  args.x_stride = x.stride(0);
  args.eps = float(eps);
  return args;
}

inline Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  fail("act_and_mul: unknown activation '", name, "'; one of silu, gelu, gelu_tanh");
}

inline ActAndMulArgs act_and_mul_args(const Tensor& x, const std::string& activation) {
  const char* op = "act_and_mul";
  check_layout(op, "x", x, 2);
  LORAX_CHECK(x.size(1) % 2 == 0, op, ": the width of x must be even, its shape is ", shape_of(x));
  ActAndMulArgs args{};
  args.x = x.const_data_ptr();
  args.rows = x.size(0);
  args.width = x.size(1) / 2;
  args.x_stride = x.stride(0);
  args.act = activation_of(activation);
  args.dtype = dtype_of(op, "x", x);
  return args;
}

}  // namespace lorax
