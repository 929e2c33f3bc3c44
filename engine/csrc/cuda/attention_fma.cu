// Attention in float32 by plain FMA: float32 tensors, a cache of another dtype than the queries,
// head sizes, blocks and strides that the tensor core kernels do not take. Also picks the kernel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention_mma.cuh"
#include "chain.cuh"

namespace lorax::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kBatch = 4;  // positions a warp takes at a time

__device__ inline float load(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::float32) return static_cast<const float*>(p)[i];
  if (dtype == DType::bfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  return __half2float(static_cast<const __half*>(p)[i]);
}

__device__ inline void store(void* p, DType dtype, int64_t i, float value) {
  if (dtype == DType::float32)
    static_cast<float*>(p)[i] = value;
  else if (dtype == DType::bfloat16)
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16(value);
  else
    static_cast<__half*>(p)[i] = __float2half(value);
}

// Grid (tokens, heads). Warp w walks the chunks of 4 positions w, w + 4, ...; lane i has the
// elements i, i + 32, ... of the head, kEach of them. Chunks begin at multiples of 4.
template <class KV, int kEach>
__global__ void __launch_bounds__(kWarps * 32) fma_kernel(const AttentionArgs args) {
  allow_next();
  wait_for_previous();
  __shared__ float tops[kWarps], sums[kWarps], merged[kWarps][kEach * 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token = blockIdx.x, head = blockIdx.y;
  const int group = head / (args.heads / args.groups);
  const int64_t to = ((int64_t)token * args.heads + head) * args.size;
  const int sequence = sequence_of(args.starts, args.sequences, token);
  if (sequence < 0) {  // padding
    for (int d = threadIdx.x; d < args.size; d += blockDim.x)
      store(args.out, args.dtype, to + d, 0);
    return;
  }
  const int high = args.lengths[sequence] - (args.starts[sequence + 1] - token) + 1;
  const int low = args.window > 0 ? max(high - args.window, 0) : 0;
  const int32_t* table = args.tables + sequence * args.table_stride;
  const KV* kv = static_cast<const KV*>(args.kv);

  float q[kEach], o[kEach], m = -INFINITY, l = 0.f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int d = i * 32 + lane;
    o[i] = 0.f;
    q[i] = d < args.size
               ? load(args.q, args.dtype, token * args.q_stride + head * args.q_head_stride + d)
               : 0.f;
  }
  for (int at = low / kBatch * kBatch + warp * kBatch; at < high; at += kWarps * kBatch) {
    long long row[kBatch];
    float s[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      row[b] = key_offset(args, table, group, at + b, low, high);
      s[b] = 0.f;
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (row[b] >= 0 && i * 32 + lane < args.size)
          s[b] += q[i] * float(kv[row[b] + i * 32 + lane]);
    }
    float top = m;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) s[b] += __shfl_xor_sync(kFullMask, s[b], step);
      s[b] *= args.scale;
      if (args.softcap > 0.f) s[b] = args.softcap * tanhf(s[b] / args.softcap);
      if (row[b] < 0) s[b] = -INFINITY;
      top = fmaxf(top, s[b]);
    }
    const float base = top == -INFINITY ? 0.f : top, shrink = expf(m - base);
    m = top;
    l *= shrink;
#pragma unroll
    for (int i = 0; i < kEach; ++i) o[i] *= shrink;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const float p = expf(s[b] - base);
      l += p;
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (row[b] >= 0 && i * 32 + lane < args.size)
          o[i] += p * float(kv[row[b] + args.value_stride + i * 32 + lane]);
    }
  }
  if (lane == 0) {
    tops[warp] = m;
    sums[warp] = l;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) merged[warp][i * 32 + lane] = o[i];
  __syncthreads();
  float top = tops[0];
  for (int w = 1; w < kWarps; ++w) top = fmaxf(top, tops[w]);
  const float base = top == -INFINITY ? 0.f : top;
  for (int d = threadIdx.x; d < args.size; d += blockDim.x) {  // over the head size
    float sum = 0.f, value = 0.f;
    for (int w = 0; w < kWarps; ++w) {
      const float weight = expf(tops[w] - base);
      sum += weight * sums[w];
      value += weight * merged[w][d];
    }
    store(args.out, args.dtype, to + d, value / sum);
  }
}

template <class KV>
void launch(const AttentionArgs& args, cudaStream_t stream) {
  const dim3 grid(args.tokens, args.heads);
  if (args.size <= 64)
    launch_chained(fma_kernel<KV, 2>, grid, kWarps * 32, 0, stream, args);
  else if (args.size <= 128)
    launch_chained(fma_kernel<KV, 4>, grid, kWarps * 32, 0, stream, args);
  else
    launch_chained(fma_kernel<KV, 8>, grid, kWarps * 32, 0, stream, args);
}

// The tensor core kernels copy 16 bytes at a time, of positions of one block.
bool can_use_tensor_cores(const AttentionArgs& args) {
  return args.dtype != DType::float32 && args.dtype == args.kv_dtype && args.size % 8 == 0 &&
         args.block % kDecodeKeys == 0 && reinterpret_cast<uintptr_t>(args.kv) % 16 == 0 &&
         args.block_stride % 8 == 0 && args.value_stride % 8 == 0 &&
         args.position_stride % 8 == 0 && args.kv_head_stride % 8 == 0;
}

}  // namespace

void attention_fma(const AttentionArgs& args, cudaStream_t stream) {
  if (args.kv_dtype == DType::float32)
    launch<float>(args, stream);
  else if (args.kv_dtype == DType::bfloat16)
    launch<__nv_bfloat16>(args, stream);
  else
    launch<__half>(args, stream);
}

int64_t attention_workspace(const AttentionArgs& args) {
  if (!can_use_tensor_cores(args) || args.parts == 1) return 0;
  return int64_t(args.decodes) * args.heads * args.parts * (args.size + 2);
}

void paged_attention(const AttentionArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) return;
  if (!can_use_tensor_cores(args)) return attention_fma(args, stream);
  // Prompts first: decodes fetch old positions meanwhile.
  if (args.tokens > args.decodes && args.sequences > args.decodes) attention_prefill(args, stream);
  if (args.decodes > 0) attention_decode(args, stream);
}

}  // namespace lorax::cuda
