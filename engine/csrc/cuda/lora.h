// Adapters of a batch on the GPU: t = x @ A.T, rows of A by id, y += scale * t @ B,
// y = scale * y + shift, and own rows of embedding and head.
//
// The kernels read slots, starts and records on the device; the host never does. Every grid depends
// on shapes alone, so a launch can be captured in a CUDA graph.
#pragma once

#include "../common/lora_record.h"
#include "kernels.h"

namespace lorax::cuda {

// Tokens of a launch: up to here a token's result has the same bits whatever its batch, and items
// are small, so that few of them fill the GPU; beyond it they are large, for throughput.
constexpr int64_t kLoraFewTokens = 256;
constexpr int kLoraChunk = 4096;  // of K: one part of t

// Where the adapters lie and which tokens are whose; see engine/ops/layout.py.
struct LoraSegments {
  const void* arena;
  int64_t arena_bytes;
  const int32_t* records;  // of slot 0, at the layer and group of the call
  int64_t record_stride;   // int32 words from a slot's record to the next slot's
  int64_t num_slots;
  const int32_t* slots;   // [count]
  const int32_t* starts;  // [count + 1]
  int64_t count;          // S, at most 65535
  int64_t tokens;         // T
};

struct ShrinkArgs {
  DType dtype;  // of x and A
  LoraSegments segments;
  const void* x;  // [T, k]
  int64_t x_stride;
  int64_t k;
  float* t;  // [shrink_parts(k), T, width]
  int64_t width;
  bool overlap;  // x was complete before the kernel that was launched last: do not wait for that one
};

struct GatherArgs {
  DType dtype;  // of A
  LoraSegments segments;
  const int64_t* ids;  // [T]
  float* t;            // [T, width]
  int64_t width;
};

struct ExpandArgs {
  DType dtype;  // of y and B
  LoraSegments segments;
  void* y;  // [T, sum of splits]
  int64_t y_stride;
  const float* t;  // [parts, T, width]
  int64_t parts;
  int64_t width;
  int64_t splits[kLoraTargets];  // widths of the targets, 0 where there is none
};

struct RescaleArgs {
  DType dtype;  // of y
  LoraSegments segments;
  void* y;  // [T, columns]
  int64_t y_stride;
  int64_t columns;
};

// Own rows by id, for an embedding.
struct OwnRowsArgs {
  DType dtype;  // of y and the rows
  LoraSegments segments;
  const int64_t* ids;  // [T]
  void* y;             // [T, hidden]
  int64_t y_stride;
  int64_t hidden;
};

// Logits of own rows, for a head.
struct OwnLogitsArgs {
  DType dtype;  // of x, y and the rows
  LoraSegments segments;
  const void* x;  // [T, hidden]
  int64_t x_stride;
  int64_t hidden;
  void* y;  // [T, columns]
  int64_t y_stride;
  int64_t columns;
};

// P: how many partial sums a shrink over k leaves.
inline int64_t shrink_parts(int64_t k) { return k > 0 ? (k + kLoraChunk - 1) / kLoraChunk : 1; }

void lora_shrink(const ShrinkArgs& args, cudaStream_t stream);
void lora_gather(const GatherArgs& args, cudaStream_t stream);
void lora_expand(const ExpandArgs& args, cudaStream_t stream);
void lora_rescale(const RescaleArgs& args, cudaStream_t stream);
void lora_own_rows(const OwnRowsArgs& args, cudaStream_t stream);
void lora_own_logits(const OwnLogitsArgs& args, cudaStream_t stream);

}  // namespace lorax::cuda
