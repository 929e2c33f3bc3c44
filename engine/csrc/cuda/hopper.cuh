// The instructions of Hopper that `linear.cu` is made of: bulk tensor copies, mbarriers, clusters
// and warpgroup matrix products. PTX ISA 8.0 and later; sm_90a only.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "pack.h"

namespace lorax::cuda::hopper {

// -- barriers in shared memory

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ bool passed(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

// Returns once the phase of that parity is complete.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  while (!passed(barrier, parity)) {
  }
}

// -- clusters

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all CTAs of the cluster.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where `address` of this CTA lies in the CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// 16 bytes into another CTA, counted by its barrier when they are there.
__device__ __forceinline__ void send(uint32_t address, const float* v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void load_shared(float (&v)[4], uint32_t address) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(address)
               : "memory");
}

// -- bulk tensor copies; x walks the contiguous dimension

constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // as createpolicy.fractional makes it

__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap* map, int x, int y,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

// For what is read once: it leaves L2 first.
__device__ __forceinline__ void stream_tile(uint32_t to, const CUtensorMap* map, int x, int y,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "l"(kEvictFirst)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// -- matrix products of a warpgroup

// A tile of rows of 128 bytes, swizzled by 128 bytes as the copies write it, K contiguous.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d[64, N] += a[64, 16] @ b[N, 16].T; d as the fragments of PTX's wgmma.m64nNk16.
template <class T, int N>
struct Product;

#define LORAX_PRODUCT(T, NAME)                                                          \
  template <>                                                                           \
  struct Product<T, 8> {                                                                \
    __device__ __forceinline__ static void add(float (&d)[4], uint64_t a, uint64_t b) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32." NAME "." NAME           \
                   " {"                                                                 \
                   "%0, %1, %2, %3}, "                                                  \
                   "%4, %5, 1, 1, 1, 0, 0;"                                             \
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
                   : "l"(a), "l"(b));                                                   \
    }                                                                                   \
  };
LORAX_PRODUCT(__nv_bfloat16, "bf16")
LORAX_PRODUCT(__half, "f16")
#undef LORAX_PRODUCT

#define LORAX_PRODUCT(T, NAME)                                                               \
  template <>                                                                                \
  struct Product<T, 16> {                                                                    \
    __device__ __forceinline__ static void add(float (&d)[8], uint64_t a, uint64_t b) {      \
      asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." NAME "." NAME               \
                   " {"                                                                      \
                   "%0, %1, %2, %3, %4, %5, %6, %7}, "                                       \
                   "%8, %9, 1, 1, 1, 0, 0;"                                                  \
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), \
                     "+f"(d[6]), "+f"(d[7])                                                  \
                   : "l"(a), "l"(b));                                                        \
    }                                                                                        \
  };
LORAX_PRODUCT(__nv_bfloat16, "bf16")
LORAX_PRODUCT(__half, "f16")
#undef LORAX_PRODUCT

#define LORAX_PRODUCT(T, NAME)                                                                 \
  template <>                                                                                  \
  struct Product<T, 32> {                                                                      \
    __device__ __forceinline__ static void add(float (&d)[16], uint64_t a, uint64_t b) {       \
      asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." NAME "." NAME                 \
                   " {"                                                                        \
                   "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "   \
                   "%16, %17, 1, 1, 1, 0, 0;"                                                  \
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),   \
                     "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
                     "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])                        \
                   : "l"(a), "l"(b));                                                          \
    }                                                                                          \
  };
LORAX_PRODUCT(__nv_bfloat16, "bf16")
LORAX_PRODUCT(__half, "f16")
#undef LORAX_PRODUCT

#define LORAX_PRODUCT(T, NAME)                                                                  \
  template <>                                                                                   \
  struct Product<T, 64> {                                                                       \
    __device__ __forceinline__ static void add(float (&d)[32], uint64_t a, uint64_t b) {        \
      asm volatile(                                                                             \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME                           \
          " {"                                                                                  \
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "              \
          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "   \
          "%32, %33, 1, 1, 1, 0, 0;"                                                            \
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), \
            "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]),          \
            "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),       \
            "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),       \
            "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]),       \
            "+f"(d[31])                                                                         \
          : "l"(a), "l"(b));                                                                    \
    }                                                                                           \
  };
LORAX_PRODUCT(__nv_bfloat16, "bf16")
LORAX_PRODUCT(__half, "f16")
#undef LORAX_PRODUCT

}  // namespace lorax::cuda::hopper
