// Programmatic dependent launch: a kernel starts while the one before it still runs.
//
// Every kernel of a step is launched with `launch_chained`. Until `wait_for_previous` has returned
// it reads only what no kernel of the step writes: weights, adapters, their records and segments.
// CTA 0 always calls it, so that the end of a kernel means the end of all before it; a CTA that has
// nothing to do leaves at once, for it would take up room that the next kernel can use.
// `allow_next` lets that one start as soon as all CTAs have called it or left.
//
// The linear calls it only when its x is complete. So what starts behind a linear, or behind
// kernels that started behind it, finds complete what was launched ahead of that linear: the shrink
// reads x and writes t beside it, and attention reads the cache of earlier steps. What they write
// there is memory that nobody used since. (CUDA C++ Programming Guide, "Programmatic Dependent
// Launch and Synchronization".)
#pragma once

#include <cstdlib>

#include "kernels.h"

namespace lorax::cuda {

__device__ __forceinline__ void allow_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Major and minor of the current device as 90, 100, ...; asked once.
inline int compute_capability() {
  static const int found = [] {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return major * 10 + minor;
  }();
  return found;
}

// Of the current device; asked once.
inline int multiprocessors() {
  static const int found = [] {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
  }();
  return found;
}

// Whether kernels overlap. LORAX_UNCHAINED turns it off: tools that watch one kernel at a time.
inline bool chained() {
  static const bool found = std::getenv("LORAX_UNCHAINED") == nullptr;
  return found;
}

// Clusters of `cluster` CTAs, which only Hopper and later GPUs have.
template <class... Parameters, class... Arguments>
void launch_clusters(unsigned cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                     size_t shared, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = chained();
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = compute_capability() < 90 ? 0 : cluster > 1 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);  // check_launch asks for its error
}

template <class... Parameters, class... Arguments>
void launch_chained(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                    cudaStream_t stream, const Arguments&... arguments) {
  launch_clusters(1, kernel, grid, block, shared, stream, arguments...);
}

}  // namespace lorax::cuda
