// What a CPU kernel and its binding share. No torch headers here.
//
// How to add a kernel `foo`:
//   1. `foo.h`: a plain struct `FooArgs` (pointers, sizes, strides in elements) and
//      `LORAX_DECLARE_KERNEL(foo, FooArgs)`.
//   2. `foo.cpp`: includes `vec.h` and `foo.h`, and defines `void foo(const FooArgs&)` inside
//      `namespace lorax::LORAX_ISA { ... }`; everything else in it lives in an unnamed namespace
//      within. It is compiled once per instruction set (generic, avx2, avx512; LORAX_ISA is that
//      name), so it includes no torch header.
//   3. `bind_foo.cpp`: includes `bind.h` and `foo.h`, checks the tensors, fills FooArgs, calls
//      `lorax::foo(args)` (which picks the instruction set) and registers the function with
//      `STABLE_TORCH_LIBRARY_IMPL(lorax, CPU, m)`. `bind_*.cpp` and `dispatch.cpp` are compiled
//      once, for the baseline.
// What the CUDA extension needs as well (FooArgs, checks of the binding) goes to `../common/`.
// setup.py finds all of them by name. Rebuild: `python setup.py build_ext --inplace`.
//
// A result must not depend on the other rows of the batch or on the number of threads: split the
// work over threads by output, never by the dimension that is summed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"

namespace lorax {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// avx512_bf16 runs the code of avx512, where `isa()` may be asked for the products of bfloat16
// pairs that it adds.
enum class Isa : int32_t { generic, avx2, avx512, avx512_bf16 };

// The instruction set in use: the best that this machine and this build have, found once.
Isa isa();

// Splits [0, count) over torch's threads in runs of at least `grain`, each given to `body(begin,
// end, context)`. Runs in the caller alone if count <= grain or if already inside a parallel
// region.
void parallel_run(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                  void* context);

template <class F>
inline void parallel_for(int64_t count, int64_t grain, const F& f) {
  parallel_run(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Memory of the calling thread, 64-byte aligned, kept for the next call; its contents are not
// defined. A thread has two: `outer` is taken before parallel_for and read by every thread, `inner`
// is taken inside its body.
enum class Scratch : int32_t { outer, inner };
void* scratch(Scratch which, size_t bytes);

}  // namespace lorax

#if defined(__x86_64__)
#define LORAX_DECLARE_KERNEL(name, Args) \
  namespace lorax::generic {             \
  void name(const Args&);                \
  }                                      \
  namespace lorax::avx2 {                \
  void name(const Args&);                \
  }                                      \
  namespace lorax::avx512 {              \
  void name(const Args&);                \
  }                                      \
  namespace lorax {                      \
  inline void name(const Args& args) {   \
    switch (isa()) {                     \
      case Isa::avx512_bf16:             \
      case Isa::avx512:                  \
        return avx512::name(args);       \
      case Isa::avx2:                    \
        return avx2::name(args);         \
      default:                           \
        return generic::name(args);      \
    }                                    \
  }                                      \
  }
#else
#define LORAX_DECLARE_KERNEL(name, Args)                      \
  namespace lorax::generic {                                  \
  void name(const Args&);                                     \
  }                                                           \
  namespace lorax {                                           \
  inline void name(const Args& args) { generic::name(args); } \
  }
#endif
