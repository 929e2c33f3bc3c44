// Choosing tokens: the largest logit of each row, and the edge of a top-p set.
#pragma once

#include "kernels.h"

namespace lorax::cuda {

constexpr int kGreedyColumns = 4096;  // of a row that one CTA looks through

struct PickGreedyArgs {
  DType dtype;
  const void* logits;  // [rows, vocab], rows `logits_stride` apart
  int64_t logits_stride;
  int64_t vocab;
  int count;         // rows
  const void* rows;  // [count] int32, or int64 if rows_int64
  const void* lengths;
  bool rows_int64, lengths_int64;
  int32_t* tokens;  // [table rows, positions]: the chosen go to (rows[i], lengths[i])
  int64_t tokens_stride;
  int64_t* chosen;       // [count]
  uint64_t* candidates;  // [count, greedy_parts(vocab)]
};

inline int64_t greedy_parts(int64_t vocab) { return (vocab + kGreedyColumns - 1) / kGreedyColumns; }

void pick_greedy(const PickGreedyArgs& args, cudaStream_t stream);

struct TopPFloorArgs {
  const float* probs;  // [rows, vocab], rows `stride` apart
  int64_t stride, vocab;
  int rows;
  const float* top_p;  // [rows]
  float* floor;        // [rows]
};

void top_p_floor(const TopPFloorArgs& args, cudaStream_t stream);

}  // namespace lorax::cuda
