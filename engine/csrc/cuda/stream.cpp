// The current stream, asked of the torch that is loaded.
//
// Its library is looked up at run time and not linked, so that the extension can be built where
// only a CPU build of torch is installed.
#include <dlfcn.h>

#include "bind.h"

namespace lorax::cuda {
namespace {

using GetStream = AOTITorchError (*)(int32_t, void**);

GetStream find() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  LORAX_CHECK(found, "the torch in use was built without CUDA");
  return reinterpret_cast<GetStream>(found);
}

}  // namespace

cudaStream_t current_stream(const Tensor& t) {
  static const GetStream get = find();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(int32_t(t.get_device()), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace lorax::cuda
