// lorax::linear on the CPU.
#include "bind.h"
#include "linear.h"

namespace lorax {
namespace {

Tensor bind_linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const char* op = "linear";
  check_layout(op, "x", x, 2);
  check_layout(op, "weight", weight, 2);
  LORAX_CHECK(x.size(1) > 0, op, ": x has no columns");
  LORAX_CHECK(weight.size(1) == x.size(1), op, ": weight ", shape_of(weight), " does not fit x ",
              shape_of(x));
  LORAX_CHECK(weight.scalar_type() == x.scalar_type(), op, ": weight and x must have one dtype");
  LinearArgs args{};
  args.dtype = dtype_of(op, "x", x);
  if (bias) {
    check_layout(op, "bias", *bias, 1);
    LORAX_CHECK(bias->size(0) == weight.size(0), op, ": bias ", shape_of(*bias),
                " does not fit weight ", shape_of(weight));
    LORAX_CHECK(bias->scalar_type() == x.scalar_type(), op, ": bias and x must have one dtype");
    args.bias = bias->const_data_ptr();
  }
  Tensor out = empty(x, {x.size(0), weight.size(0)}, x.scalar_type());
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.tokens = x.size(0);
  args.inputs = x.size(1);
  args.outputs = weight.size(0);
  args.x_stride = x.stride(0);
  args.weight_stride = weight.stride(0);
  linear(args);
  return out;
}

}  // namespace
}  // namespace lorax

STABLE_TORCH_LIBRARY_IMPL(lorax, CPU, m) { m.impl("linear", TORCH_BOX(&lorax::bind_linear)); }
