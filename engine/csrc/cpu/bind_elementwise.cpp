// lorax::add_rms_norm and lorax::act_and_mul on the CPU.
#include "../common/bind_elementwise.h"

#include "bind.h"
#include "elementwise.h"

namespace lorax {
namespace {

Tensor bind_add_rms_norm(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps) {
  AddRmsNormArgs args = add_rms_norm_args(x, residual, weight, eps);
  Tensor out = empty(x, {args.rows, args.width}, x.scalar_type());
  args.out = out.mutable_data_ptr();
  add_rms_norm(args);
  return out;
}

Tensor bind_act_and_mul(Tensor x, std::string activation) {
  ActAndMulArgs args = act_and_mul_args(x, activation);
  Tensor out = empty(x, {args.rows, args.width}, x.scalar_type());
  args.out = out.mutable_data_ptr();
  act_and_mul(args);
  return out;
}

}  // namespace
}  // namespace lorax

STABLE_TORCH_LIBRARY_IMPL(lorax, CPU, m) {
  m.impl("add_rms_norm", TORCH_BOX(&lorax::bind_add_rms_norm));
  m.impl("act_and_mul", TORCH_BOX(&lorax::bind_act_and_mul));
}
