// How the attention kernels are cut, and the shared memory that follows. Plain C++, so that a
// machine without nvcc tests it.
#pragma once

namespace lorax::cuda {

// What a block may have on sm_86, 89 and 120, the least of the GPUs that we build for.
constexpr int kSharedMemory = 99 * 1024;

constexpr int kHeadSizes[] = {32, 64, 96, 128, 192, 256};  // that a kernel is compiled for

// Whether a warp has its queries in registers; a prompt's are then in the place of a stage before.
constexpr bool keeps_queries(int size) { return size <= 128; }

constexpr int kDecodeKeys = 16;   // positions a warp takes at a time
constexpr int kDecodeStages = 2;  // chunks of a warp that are in flight or in use

// Of heads of 128, four CTAs of 3 warps fit into an SM of 227 KB: 64 x 8 are one wave. Of larger
// heads than 192, 3 warps need more than kSharedMemory; the SM holds as many warps either way.
constexpr int decode_warps(int size) { return size <= 192 ? 3 : 2; }

// CTAs for an SM of 227 KB that share the parts of long rows; so many fit, of small heads more.
constexpr int decode_blocks(int size) { return size <= 128 ? 4 : 2; }

// Bytes of shared memory: the stages of each warp, keys and values, then queries of 8 `tiles`
// heads.
constexpr int decode_shared(int size, int tiles) {
  return (decode_warps(size) * kDecodeStages * 2 * kDecodeKeys + 8 * tiles) * (size + 8) * 2;
}

constexpr bool decode_fits() {
  for (const int size : kHeadSizes) {
    const int fixed = 2 * decode_warps(size) * 16 * 4;  // maximum and sum of each warp's rows
    if (decode_shared(size, 2) + fixed > kSharedMemory) return false;
  }
  return true;
}
static_assert(decode_fits(), "the kernel could not be launched on sm_86, 89 and 120");

// -- prefill

constexpr int kPrefillWarps = 4;
constexpr int kPrefillRows = 64;   // query rows of a CTA, 16 a warp
constexpr int kPrefillStages = 2;  // tiles of keys and values in flight or in use

constexpr int prefill_keys(int size) { return size <= 128 ? 64 : 32; }  // positions of a tile

constexpr int prefill_shared(int size) {  // bytes: the stages, keys and values, then queries
  const int rows =
      kPrefillStages * 2 * prefill_keys(size) + (keeps_queries(size) ? 0 : kPrefillRows);
  return rows * (size + 8) * 2;
}

// CTAs that an SM of 227 KB takes: registers are given out for so many, shared memory has room.
constexpr int prefill_blocks(int size) { return size <= 64 ? 4 : size <= 192 ? 3 : 2; }

// First tile of a sequence that begins at token `start`: room for the last, partial ones ahead.
constexpr int prefill_tile(int start, int sequence, int repeats) {
  return start * repeats / kPrefillRows + sequence;
}

constexpr bool prefill_fits() {
  for (const int size : kHeadSizes)
    if (prefill_shared(size) > kSharedMemory) return false;
  return true;
}
static_assert(prefill_fits(), "the kernel could not be launched on sm_86, 89 and 120");

}  // namespace lorax::cuda
