// lorax::add_rms_norm and lorax::act_and_mul on CUDA.
#include "../common/bind_elementwise.h"

#include "bind.h"
#include "elementwise.h"

namespace lorax::cuda {
namespace {

Tensor bind_add_rms_norm(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps) {
  AddRmsNormArgs args = add_rms_norm_args(x, residual, weight, eps);
  Tensor out = empty(x, {args.rows, args.width}, x.scalar_type());
  args.out = out.mutable_data_ptr();
  add_rms_norm(args, current_stream(x));
  check_launch("add_rms_norm");
  return out;
}

Tensor bind_act_and_mul(Tensor x, std::string activation) {
  ActAndMulArgs args = act_and_mul_args(x, activation);
  Tensor out = empty(x, {args.rows, args.width}, x.scalar_type());
  args.out = out.mutable_data_ptr();
  act_and_mul(args, current_stream(x));
  check_launch("act_and_mul");
  return out;
}

}  // namespace
}  // namespace lorax::cuda

STABLE_TORCH_LIBRARY_IMPL(lorax, CUDA, m) {
  m.impl("add_rms_norm", TORCH_BOX(&lorax::cuda::bind_add_rms_norm));
  m.impl("act_and_mul", TORCH_BOX(&lorax::cuda::bind_act_and_mul));
}
