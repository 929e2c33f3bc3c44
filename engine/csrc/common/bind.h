// What the bindings of every device need: torch's stable ABI, checks of tensors, allocation. Only
// for bind_*.cpp.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtype.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in the headers of torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace lorax {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device that the kernels of this library run on. Each library defines its own, in
// cpu/bind_device.cpp or cuda/bind_device.cpp.
extern const char* const kDevice;  // for messages: "the CPU" or "the GPU"
bool on_device(const Tensor& t);

// Throws "op: parts..." as RuntimeError unless the condition holds.
#define LORAX_CHECK(condition, ...)               \
  do {                                            \
    if (!(condition)) ::lorax::fail(__VA_ARGS__); \
  } while (0)

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

// The kernels' name of an element type; an error names the op and the argument.
inline DType dtype_of(const char* op, const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      fail(op, ": ", name, " must be float32, bfloat16 or float16");
  }
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  return dtype_of(op, name, t.scalar_type());
}

// On this library's device, with `dims` dimensions and a contiguous last one.
inline void check_layout(const char* op, const char* name, const Tensor& t, int64_t dims) {
  LORAX_CHECK(on_device(t), op, ": ", name, " must be on ", kDevice);
  LORAX_CHECK(t.dim() == dims, op, ": ", name, " must have ", dims, " dimensions, its shape is ",
              shape_of(t));
  LORAX_CHECK(dims == 0 || t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1, op,
              ": the last dimension of ", name, " must be contiguous");
}

// An uninitialised contiguous tensor on the device of `like`, from torch's allocator.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[8];
  int64_t stride = 1;
  for (int64_t i = int64_t(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes.begin()[i] > 0 ? sizes.begin()[i] : 1;
  }
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(),
                                                         strides, code, device_type,
                                                         int32_t(like.get_device()), &handle));
  return Tensor(handle);
}

}  // namespace lorax
