// lorax::linear on CUDA: our own kernel for few tokens, torch's library otherwise.
#include <array>

#include "bind.h"
#include "linear.h"

namespace lorax::cuda {
namespace {

constexpr const char* kOp = "linear";

Tensor torch_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Whether our kernel can serve these tensors. If not, torch serves or refuses them.
bool kernel_supports(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const auto is_matrix = [](const Tensor& t) { return t.dim() == 2 && t.stride(1) == 1; };
  const auto is_16_bit = [](ScalarType t) {
    return t == ScalarType::BFloat16 || t == ScalarType::Half;
  };
  const auto is_on_same_device = [&](const Tensor& t) {
    return t.is_cuda() && t.get_device() == x.get_device();
  };
  return is_16_bit(x.scalar_type()) && weight.scalar_type() == x.scalar_type() && is_matrix(x) &&
         is_matrix(weight) && x.size(1) == weight.size(1) && is_on_same_device(weight) &&
         (!bias ||
          (is_on_same_device(*bias) && bias->dim() == 1 && bias->size(0) == weight.size(0) &&
           bias->is_contiguous() && bias->scalar_type() == x.scalar_type()));
}

Tensor bind_linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  if (!kernel_supports(x, weight, bias)) return torch_linear(x, weight, bias);
  LinearArgs args{};
  args.dtype = dtype_of(kOp, "x", x);
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.tokens = x.size(0);
  args.rows = weight.size(0);
  args.columns = x.size(1);
  args.x_stride = x.stride(0);
  args.weight_stride = weight.stride(0);
  if (!linear_supports(args)) return torch_linear(x, weight, bias);
  Tensor y = empty(x, {args.tokens, args.rows}, x.scalar_type());
  args.y = y.mutable_data_ptr();
  linear(args, current_stream(x));
  check_launch(kOp);
  return y;
}

}  // namespace
}  // namespace lorax::cuda

STABLE_TORCH_LIBRARY_IMPL(lorax, CUDA, m) {
  m.impl("linear", TORCH_BOX(&lorax::cuda::bind_linear));
}
