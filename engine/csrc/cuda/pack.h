// Packs of elements that move in one load or store, and their conversion to and from float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace lorax::cuda {

// N elements, aligned to their size but to no more than 16 bytes: whole packs move in 16-byte
// accesses (two of them where a pack has 32 bytes), N = 1 moves one element.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T v[N];
};

template <class T>
constexpr int kPack = 16 / int(sizeof(T));

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <int N, class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

template <class T>
struct TypeTag {
  using type = T;
};

// Of something in shared memory, as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Calls `run` with the tag of the element type.
template <class Run>
void with_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::float32:
      return run(TypeTag<float>{});
    case DType::bfloat16:
      return run(TypeTag<__nv_bfloat16>{});
    case DType::float16:
      return run(TypeTag<__half>{});
  }
}

// Whether packs of `n` elements may be moved from `data`, and from every multiple of `stride`.
__host__ __device__ inline bool fits_packs(const void* data, int64_t stride, int n,
                                           int alignment = 16) {
  return reinterpret_cast<uintptr_t>(data) % alignment == 0 && stride % n == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace lorax::cuda
