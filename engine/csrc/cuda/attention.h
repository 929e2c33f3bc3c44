// Attention over the paged cache: what the kernels need to know. Strides are in elements.
#pragma once

#include "kernels.h"

namespace lorax::cuda {

constexpr int kAttentionMaxParts = 16;    // a decode's keys are cut into at most so many parts
constexpr int kAttentionPartSize = 1024;  // of about so many positions, more of very long rows
constexpr int kAttentionMaxSize = 256;    // largest head size

struct AttentionArgs {
  DType dtype, kv_dtype;  // of q and out, of the cache
  const void* q;          // [tokens, heads, size]
  int64_t q_stride, q_head_stride;
  void* out;       // [tokens, heads, size] contiguous
  const void* kv;  // keys of the layer: [blocks, 2, block, groups, size], strides below
  int64_t block_stride, value_stride, position_stride, kv_head_stride;
  const int32_t* tables;  // [sequences, table_width]
  int64_t table_stride;
  const int32_t* starts;   // [sequences + 1]
  const int32_t* lengths;  // [sequences], at least the tokens of each
  int tokens, sequences, heads, groups, size, block;
  int decodes;  // each of so many first sequences has one token
  float scale, softcap;
  int window;
  int parts;         // that a decode may have: as many of 1024 as hold a table row, 1 to 16
  float* workspace;  // attention_workspace(args) floats
};

// How many floats the decode kernel keeps its parts in; 0 if it is not called or has one part.
int64_t attention_workspace(const AttentionArgs& args);

void paged_attention(const AttentionArgs& args, cudaStream_t stream);

// The kernels behind paged_attention: of the first `decodes` tokens, of the sequences behind
// them, and of everything. A token behind the last sequence is padding, its output undefined.
void attention_decode(const AttentionArgs& args, cudaStream_t stream);
void attention_prefill(const AttentionArgs& args, cudaStream_t stream);
void attention_fma(const AttentionArgs& args, cudaStream_t stream);

}  // namespace lorax::cuda
