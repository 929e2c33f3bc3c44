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

__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Once the phase of that parity is complete: what this CTA and its bulk copies wrote is there.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// The same, and also what other CTAs of the cluster stored is there.
__device__ __forceinline__ void wait_barrier_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// -- clusters

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all CTAs of the cluster. Relaxed: nothing written before need be seen.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
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

// Stores 16 bytes to another CTA, whose barrier counts them when they arrive.
__device__ __forceinline__ void store_async_remote(uint32_t address, const float* v,
                                                   uint32_t barrier) {
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

__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap* map, int x, int y,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

// For data that is read once: L2 evicts it first.
__device__ __forceinline__ void load_tile_evict_first(uint32_t to, const CUtensorMap* map, int x,
                                                      int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "l"(kEvictFirst)
      : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// -- matrix products of a warpgroup

// A tile of rows of 128 bytes, swizzled by 128 bytes as the copies write it, K contiguous.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d[64, N] += a[64, 16] @ b[N, 16].T; d as the fragments of PTX's wgmma.m64nNk16.
template <class T, int N>
struct Wgmma;

// Registers of d by eights: their operand numbers in the instruction, and their bindings.
#define LORAX_P0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LORAX_P1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define LORAX_P2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define LORAX_P3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define LORAX_P4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define LORAX_P5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define LORAX_P6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define LORAX_P7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define LORAX_P8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define LORAX_P9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define LORAX_P10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define LORAX_P11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define LORAX_P12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define LORAX_P13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define LORAX_P14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define LORAX_P15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define LORAX_P0_3 LORAX_P0 ", " LORAX_P1 ", " LORAX_P2 ", " LORAX_P3
#define LORAX_P0_7 LORAX_P0_3 ", " LORAX_P4 ", " LORAX_P5 ", " LORAX_P6 ", " LORAX_P7
#define LORAX_P0_11 LORAX_P0_7 ", " LORAX_P8 ", " LORAX_P9 ", " LORAX_P10 ", " LORAX_P11
#define LORAX_P0_15 LORAX_P0_11 ", " LORAX_P12 ", " LORAX_P13 ", " LORAX_P14 ", " LORAX_P15
#define LORAX_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LORAX_D8(i) LORAX_D4(i), LORAX_D4(i + 4)
#define LORAX_D16(i) LORAX_D8(i), LORAX_D8(i + 8)
#define LORAX_D32(i) LORAX_D16(i), LORAX_D16(i + 16)
#define LORAX_D64(i) LORAX_D32(i), LORAX_D32(i + 32)

// A and B: the operand numbers of a and b, after the N / 2 of d.
#define LORAX_WGMMA_OF(T, NAME, N, REGISTERS, A, B, ...)                                          \
  template <>                                                                                     \
  struct Wgmma<T, N> {                                                                            \
    __device__ __forceinline__ static void multiply_add(float (&d)[N / 2], uint64_t a,            \
                                                        uint64_t b) {                             \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS \
                   "}, %" #A ", %" #B ", 1, 1, 1, 0, 0;"                                          \
                   : __VA_ARGS__                                                                  \
                   : "l"(a), "l"(b));                                                             \
    }                                                                                             \
  };
#define LORAX_WGMMA(...)                             \
  LORAX_WGMMA_OF(__nv_bfloat16, "bf16", __VA_ARGS__) \
  LORAX_WGMMA_OF(__half, "f16", __VA_ARGS__)
LORAX_WGMMA(8, "%0, %1, %2, %3", 4, 5, LORAX_D4(0))
LORAX_WGMMA(16, LORAX_P0, 8, 9, LORAX_D8(0))
LORAX_WGMMA(32, LORAX_P0 ", " LORAX_P1, 16, 17, LORAX_D16(0))
LORAX_WGMMA(64, LORAX_P0_3, 32, 33, LORAX_D32(0))
LORAX_WGMMA(80, LORAX_P0_3 ", " LORAX_P4, 40, 41, LORAX_D32(0), LORAX_D8(32))
LORAX_WGMMA(96, LORAX_P0_3 ", " LORAX_P4 ", " LORAX_P5, 48, 49, LORAX_D32(0), LORAX_D16(32))
LORAX_WGMMA(128, LORAX_P0_7, 64, 65, LORAX_D64(0))
LORAX_WGMMA(160, LORAX_P0_7 ", " LORAX_P8 ", " LORAX_P9, 80, 81, LORAX_D64(0), LORAX_D16(64))
LORAX_WGMMA(192, LORAX_P0_11, 96, 97, LORAX_D64(0), LORAX_D32(64))
LORAX_WGMMA(224, LORAX_P0_11 ", " LORAX_P12 ", " LORAX_P13, 112, 113, LORAX_D64(0), LORAX_D32(64),
            LORAX_D16(96))
LORAX_WGMMA(256, LORAX_P0_15, 128, 129, LORAX_D64(0), LORAX_D64(64))
#undef LORAX_WGMMA
#undef LORAX_WGMMA_OF
#undef LORAX_D64
#undef LORAX_D32
#undef LORAX_D16
#undef LORAX_D8
#undef LORAX_D4
#undef LORAX_P0_15
#undef LORAX_P0_11
#undef LORAX_P0_7
#undef LORAX_P0_3
#undef LORAX_P0
#undef LORAX_P1
#undef LORAX_P2
#undef LORAX_P3
#undef LORAX_P4
#undef LORAX_P5
#undef LORAX_P6
#undef LORAX_P7
#undef LORAX_P8
#undef LORAX_P9
#undef LORAX_P10
#undef LORAX_P11
#undef LORAX_P12
#undef LORAX_P13
#undef LORAX_P14
#undef LORAX_P15

}  // namespace lorax::cuda::hopper
