// The instruction set in use, and the scratch memory of each thread. Compiled for the baseline.
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

#include "kernels.h"

namespace lorax {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16"};

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx512_bf16)
    return __builtin_cpu_supports("avx512bf16") && supported(Isa::avx512);
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           supported(Isa::avx2);
  }
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
#endif
  return isa == Isa::generic;
}

Isa best() {
  for (Isa isa : {Isa::avx512_bf16, Isa::avx512, Isa::avx2}) {
    if (supported(isa)) return isa;
  }
  return Isa::generic;
}

Isa chosen = best();

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

Isa isa() { return chosen; }

void* scratch(Scratch which, size_t bytes) {
  thread_local Buffer buffers[2];
  Buffer& buffer = buffers[int(which)];
  if (buffer.bytes < bytes) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    std::free(buffer.data);
    buffer.data = std::aligned_alloc(64, rounded);
    buffer.bytes = buffer.data ? rounded : 0;
    if (!buffer.data) throw std::bad_alloc();
  }
  return buffer.data;
}

}  // namespace lorax

// Read through ctypes by engine/ops/extension.py.
extern "C" {

__attribute__((visibility("default"))) const char* lorax_cpu_isa() {
  return lorax::kNames[int(lorax::chosen)];
}

// For tests: kernels run with `name` from now on. Returns whether this machine can.
__attribute__((visibility("default"))) int lorax_cpu_use_isa(const char* name) {
  for (int i = 0; i < 4; ++i) {
    const lorax::Isa isa = lorax::Isa(i);
    if (std::strcmp(name, lorax::kNames[i]) == 0 && lorax::supported(isa)) {
      lorax::chosen = isa;
      return 1;
    }
  }
  return 0;
}
}
