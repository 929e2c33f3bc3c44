// What the kernels need from torch on a GPU: its current stream.
//
// Torch's CUDA library is looked up at run time and not linked, so that the extension can be built
// where only a CPU build of torch is installed.
#include <dlfcn.h>

#include "bind.h"

namespace lorax {

const char* const kDevice = "the GPU";

bool on_device(const Tensor& t) { return t.is_cuda(); }

}  // namespace lorax

namespace lorax::cuda {
namespace {

using GetStream = AOTITorchError (*)(int32_t, void**);

GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  LORAX_CHECK(found, "the torch in use was built without CUDA");
  return reinterpret_cast<GetStream>(found);
}

}  // namespace

cudaStream_t current_stream(const Tensor& t) {
  static const GetStream get_stream = find_get_stream();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream(int32_t(t.get_device()), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace lorax::cuda
