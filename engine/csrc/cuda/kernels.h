// What a CUDA kernel and its binding share. No torch headers here: plain `nvcc` compiles a kernel.
//
// How to add a kernel `foo`: `foo.h` has a plain struct `FooArgs` (pointers, sizes, strides in
// elements) and `void foo(const FooArgs&, cudaStream_t)`; `foo.cu` defines it; `bind_foo.cpp`
// checks the tensors and registers the op with `STABLE_TORCH_LIBRARY_IMPL(lorax, CUDA, m)`.
// What the CPU extension needs as well (FooArgs, checks of the binding) goes to `../common/`.
// setup.py finds all of them by name.
//
// A launch may be captured in a CUDA graph and replayed with other contents: a grid depends on
// shapes only, and nothing on the host reads device memory.
#pragma once

#include <cuda_runtime.h>

#include "../common/dtype.h"
