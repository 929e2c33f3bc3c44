// What the attention kernels share: the sequence of a token, the offset of a position in the cache,
// copies and fragments, and the choice of a kernel by dtype and head size.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention.h"
#include "attention_shape.h"
#include "mma.cuh"
#include "pack.h"

namespace lorax::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr unsigned kFullMask = 0xffffffffu;

// The sequence that has token t: the last one that starts at or before it. -1 for padding.
__device__ inline int sequence_of(const int32_t* starts, int sequences, int t) {
  if (t < sequences && starts[t] == t && starts[t + 1] == t + 1) return t;
  if (t >= starts[sequences]) return -1;
  int low = 0, high = sequences;  // starts[low] <= t < starts[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] <= t ? low : high) = middle;
  }
  return low;
}

// 16 bytes to shared memory; zeros unless valid, and then the source is not read.
__device__ inline void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void commit_async() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kPending>
__device__ inline void wait_async() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ inline void load_matrices(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

// Where the key of a position lies, in elements from args.kv; -1 outside low .. high - 1, whose
// block may be gone.
__device__ inline long long key_offset(const AttentionArgs& args, const int32_t* table, int group,
                                       int position, int low, int high) {
  if (position < low || position >= high) return -1;
  const int index = position / args.block;
  return (long long)table[index] * args.block_stride +
         (long long)(position - index * args.block) * args.position_stride +
         (long long)group * args.kv_head_stride;
}

// Calls f(T(0), padded head size as an integral_constant) for the dtype and head size of the call.
template <class F>
void with_kernel_shape(const AttentionArgs& args, F&& f) {
  auto sized = [&](auto zero) {
    using T = decltype(zero);
    if (args.size <= 32) return f(zero, std::integral_constant<int, 32>());
    if (args.size <= 64) return f(zero, std::integral_constant<int, 64>());
    if (args.size <= 96) return f(zero, std::integral_constant<int, 96>());
    if (args.size <= 128) return f(zero, std::integral_constant<int, 128>());
    if (args.size <= 192) return f(zero, std::integral_constant<int, 192>());
    return f(zero, std::integral_constant<int, 256>());
  };
  if (args.dtype == DType::bfloat16) return sized(__nv_bfloat16());
  return sized(__half());
}

}  // namespace lorax::cuda
