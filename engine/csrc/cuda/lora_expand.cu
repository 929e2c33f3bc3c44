// y[i, columns of target] += scale * sum over parts(t)[i, ranks of target] @ B of the target; and
// the shrink of an embedding, which gathers rows of A.
#include "lora_expand_fma.cuh"
#include "lora_expand_mma.cuh"

namespace lorax::cuda {
namespace {

// kMany: the segments of more tokens than an item of the other kind has go to tensor cores.
template <class T, bool kMany>
__global__ void __launch_bounds__(kExpandThreads, 4) expand(const ExpandArgs args) {
  __shared__ union {
    __align__(16) FmaSums sums;
    Halves halves;
  } memory;
  __shared__ WorkList list;
  allow_next();
  const auto is_long = [](const Segment& segment) { return kMany && segment.count > kFmaTokens; };
  const int items = count_work(args.segments, list, [&](const Segment& segment) {
    if (!fits_width(args, segment)) return 0;
    return is_long(segment) ? MmaItems<T>::count(args, segment) : FmaItems<T>::count(args, segment);
  });
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int index = find_work(list, item), local = item - list.first[index];
    const Segment& segment = list.segments[index];
    if constexpr (kMany) {
      if (is_long(segment)) {
        MmaItems<T>::add(args, segment, local, memory.halves);
        continue;
      }
    }
    FmaItems<T>::add(args, segment, local, memory.sums);
  }
  if (blockIdx.x == 0) wait_for_previous();
}

template <class T>
void launch_expand(const ExpandArgs& args, cudaStream_t stream) {
  int64_t tiles = 0;
  bool packs = sizeof(T) == 2 && fits_packs(args.y, args.y_stride, kMmaColumns);
  for (int64_t n : args.splits) {
    tiles += ceil_div(n, kMmaTile);
    packs = packs && n % kMmaColumns == 0;
  }
  if (tiles == 0) return;
  const dim3 grid = work_grid(args.segments, tiles * max_passes(args.segments, kFmaTokens),
                              4 * multiprocessors());
  if constexpr (sizeof(T) == 2)
    if (packs && args.segments.tokens > kLoraFewTokens)
      return launch_chained(expand<T, true>, grid, kExpandThreads, 0, stream, args);
  launch_chained(expand<T, false>, grid, kExpandThreads, 0, stream, args);
}

// Grid: tokens modulo its width, segments. Threads walk the ranks.
template <class T>
__global__ void __launch_bounds__(kExpandThreads) gather(const GatherArgs args) {
  allow_next();
  Segment segment;
  if (!find_segment(args.segments, blockIdx.y, segment)) return wait_for_previous();
  wait_for_previous();
  const int rank = segment.ranks[0] < args.width ? segment.ranks[0] : int(args.width);
  const int64_t stride = row_bytes(segment.ranks[0], int(sizeof(T)));
  const int64_t begin = int64_t(segment.a) * kLoraAlign;
  for (int i = blockIdx.x; i < segment.count; i += gridDim.x) {  // over tokens
    const int64_t id = args.ids[segment.first + i];
    const bool inside = id >= 0 && id < (args.segments.arena_bytes - begin) / stride;
    const T* row = reinterpret_cast<const T*>(static_cast<const char*>(args.segments.arena) +
                                              begin + (inside ? id : 0) * stride);
    float* t = args.t + (segment.first + i) * args.width;
    for (int r = threadIdx.x; r < rank; r += kExpandThreads) t[r] = inside ? widen(row[r]) : 0.0f;
  }
}

}  // namespace

void lora_expand(const ExpandArgs& args, cudaStream_t stream) {
  if (args.segments.count == 0 || args.segments.tokens == 0 || args.width == 0) return;
  switch (args.dtype) {
    case DType::float32:
      return launch_expand<float>(args, stream);
    case DType::bfloat16:
      return launch_expand<__nv_bfloat16>(args, stream);
    case DType::float16:
      return launch_expand<__half>(args, stream);
  }
}

void lora_gather(const GatherArgs& args, cudaStream_t stream) {
  if (args.segments.count == 0 || args.segments.tokens == 0 || args.width == 0) return;
  const int64_t columns = args.segments.tokens < 64 ? args.segments.tokens : 64;
  const dim3 grid(uint32_t(columns), uint32_t(args.segments.count));
  switch (args.dtype) {
    case DType::float32:
      launch_chained(gather<float>, grid, kExpandThreads, 0, stream, args);
      break;
    case DType::bfloat16:
      launch_chained(gather<__nv_bfloat16>, grid, kExpandThreads, 0, stream, args);
      break;
    case DType::float16:
      launch_chained(gather<__half>, grid, kExpandThreads, 0, stream, args);
      break;
  }
}

}  // namespace lorax::cuda
