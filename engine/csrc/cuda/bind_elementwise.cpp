// lorax::add_rms_norm and lorax::act_and_mul on CUDA.
#include "bind.h"
#include "elementwise.h"

namespace lorax::cuda {
namespace {

Tensor bind_add_rms_norm(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps) {
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
  Tensor out = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.rows = x.size(0);
  args.width = x.size(1);
  args.x_stride = x.stride(0);
  args.eps = float(eps);
  add_rms_norm(args, current_stream(x));
  check_launch(op);
  return out;
}

Activation activation(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  fail("act_and_mul: unknown activation '", name, "'; one of silu, gelu, gelu_tanh");
}

Tensor bind_act_and_mul(Tensor x, std::string act) {
  const char* op = "act_and_mul";
  check_layout(op, "x", x, 2);
  LORAX_CHECK(x.size(1) % 2 == 0, op, ": the width of x must be even, its shape is ", shape_of(x));
  const int64_t width = x.size(1) / 2;
  Tensor out = empty(x, {x.size(0), width}, x.scalar_type());
  ActAndMulArgs args{};
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.rows = x.size(0);
  args.width = width;
  args.x_stride = x.stride(0);
  args.act = activation(act);
  args.dtype = dtype_of(op, "x", x);
  act_and_mul(args, current_stream(x));
  check_launch(op);
  return out;
}

}  // namespace
}  // namespace lorax::cuda

STABLE_TORCH_LIBRARY_IMPL(lorax, CUDA, m) {
  m.impl("add_rms_norm", TORCH_BOX(&lorax::cuda::bind_add_rms_norm));
  m.impl("act_and_mul", TORCH_BOX(&lorax::cuda::bind_act_and_mul));
}
