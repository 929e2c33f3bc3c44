// The index arithmetic of a step's preparation: plain C++, so that a test without a GPU runs it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LORAX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LORAX_HOST_DEVICE inline
#endif

namespace lorax::cuda {

struct PrepareArgs {
  int32_t* computed;  // of each row, `computed_stride` apart
  int64_t computed_stride;
  const int32_t* tokens;  // [rows, positions], rows `tokens_stride` apart
  int64_t tokens_stride;
  const int32_t* blocks;  // [rows, blocks], rows `blocks_stride` apart
  int64_t blocks_stride;
  const int32_t* rows;    // [sequences]
  const int32_t* first;   // [sequences]: position of the first new token; below 0: `computed`
  const int32_t* starts;  // [sequences + 1]: first new token
  int64_t* ids;           // [num_tokens]
  int64_t* positions;     // [num_tokens]
  int64_t* places;        // [num_tokens]
  int32_t* tables;        // [sequences, width]
  int32_t* lengths;       // [sequences]
  int sequences, num_tokens, width, block;
};

// Position of the first new token of sequence `s`. Every thread asks before any of them advances.
LORAX_HOST_DEVICE int first_position(const PrepareArgs& args, int s) {
  const int first = args.first[s];
  return first < 0 ? args.computed[args.rows[s] * args.computed_stride] : first;
}

// Thread `thread` of `threads` walks the new tokens of sequence `s`, then the blocks of its table.
LORAX_HOST_DEVICE void prepare_sequence(const PrepareArgs& args, int s, int first, int thread,
                                        int threads) {
  const int row = args.rows[s], start = args.starts[s], count = args.starts[s + 1] - start;
  const int32_t* tokens = args.tokens + row * args.tokens_stride;
  const int32_t* blocks = args.blocks + row * args.blocks_stride;
  for (int i = thread; i < count; i += threads) {
    const int position = first + i;
    args.ids[start + i] = tokens[position];
    args.positions[start + i] = position;
    args.places[start + i] =
        int64_t(blocks[position / args.block]) * args.block + position % args.block;
  }
  const int length = first + count, used = (length + args.block - 1) / args.block;
  int32_t* table = args.tables + int64_t(s) * args.width;
  for (int i = thread; i < used && i < args.width; i += threads) table[i] = blocks[i];
  if (thread == 0) {
    args.lengths[s] = length;
    if (row != 0) args.computed[row * args.computed_stride] = length;
  }
}

// Thread `thread` of `threads` walks the tokens behind the last sequence: the scratch row's.
LORAX_HOST_DEVICE void prepare_padding(const PrepareArgs& args, int thread, int threads) {
  for (int i = args.starts[args.sequences] + thread; i < args.num_tokens; i += threads) {
    args.ids[i] = 0;
    args.positions[i] = 0;
    args.places[i] = 0;
  }
}

}  // namespace lorax::cuda
