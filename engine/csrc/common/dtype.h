// The element types that kernels are compiled for. No torch headers here: kernels include it.
#pragma once

#include <cstdint>

namespace lorax {

enum class DType : int32_t { float32, bfloat16, float16 };

}  // namespace lorax
