// lorax::write_runs_ and lorax::prepare_step_ on CUDA. The kernels read what the tensors hold.
#include <tuple>

#include "bind.h"
#include "prepare.h"

namespace lorax::cuda {
namespace {

void check_int32(const char* op, const char* name, const Tensor& t, int64_t dims) {
  check_layout(op, name, t, dims);
  LORAX_CHECK(t.scalar_type() == ScalarType::Int, op, ": ", name, " must be int32");
}

// The address by which the GPU reads `patch`: on the GPU, or pinned on the host.
const int32_t* device_pointer(const char* op, const Tensor& patch) {
  cudaPointerAttributes attributes{};
  const cudaError_t error = cudaPointerGetAttributes(&attributes, patch.const_data_ptr());
  LORAX_CHECK(error == cudaSuccess && attributes.type != cudaMemoryTypeUnregistered &&
                  attributes.devicePointer != nullptr,
              op, ": patch must be on the GPU or in pinned memory");
  return static_cast<const int32_t*>(attributes.devicePointer);
}

void bind_write_runs(Tensor words, Tensor patch, int64_t runs) {
  const char* op = "write_runs_";
  check_int32(op, "words", words, 1);
  LORAX_CHECK(patch.dim() == 1 && patch.scalar_type() == ScalarType::Int && patch.is_contiguous(),
              op, ": patch must be contiguous int32 with 1 dimension, its shape is ",
              shape_of(patch));
  LORAX_CHECK(runs >= 0 && 3 * runs <= patch.size(0), op, ": ", runs, " runs do not fit patch ",
              shape_of(patch));
  if (runs == 0) return;
  WriteRunsArgs args{};
  args.words = static_cast<int32_t*>(words.mutable_data_ptr());
  args.num_words = words.size(0);
  args.patch = device_pointer(op, patch);
  args.patch_words = patch.size(0);
  args.runs = int(runs);
  write_runs(args, current_stream(words));
  check_launch(op);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bind_prepare_step(
    Tensor computed, Tensor tokens, Tensor blocks, Tensor rows, Tensor first, Tensor cu_seqlens_q,
    int64_t num_tokens, int64_t block_size, int64_t max_blocks) {
  const char* op = "prepare_step_";
  LORAX_CHECK(
      computed.is_cuda() && computed.dim() == 1 && computed.scalar_type() == ScalarType::Int, op,
      ": computed must be int32 [rows] on the GPU");
  check_int32(op, "tokens", tokens, 2);
  check_int32(op, "blocks", blocks, 2);
  check_int32(op, "rows", rows, 1);
  check_int32(op, "first", first, 1);
  check_int32(op, "cu_seqlens_q", cu_seqlens_q, 1);
  const int64_t sequences = rows.size(0);
  LORAX_CHECK(first.size(0) == sequences && cu_seqlens_q.size(0) == sequences + 1, op, ": first ",
              shape_of(first), " and cu_seqlens_q ", shape_of(cu_seqlens_q), " do not fit rows ",
              shape_of(rows));
  LORAX_CHECK(tokens.size(0) == computed.size(0) && blocks.size(0) == computed.size(0), op,
              ": tokens ", shape_of(tokens), " and blocks ", shape_of(blocks),
              " do not fit computed ", shape_of(computed));
  LORAX_CHECK(
      num_tokens >= 0 && block_size > 0 && max_blocks >= 0 && max_blocks <= blocks.size(1), op,
      ": num_tokens ", num_tokens, ", block_size ", block_size, " and max_blocks ", max_blocks,
      " do not fit blocks ", shape_of(blocks));
  Tensor ids = empty(rows, {num_tokens}, ScalarType::Long);
  Tensor positions = empty(rows, {num_tokens}, ScalarType::Long);
  Tensor slot_mapping = empty(rows, {num_tokens}, ScalarType::Long);
  Tensor block_tables = empty(rows, {sequences, max_blocks}, ScalarType::Int);
  Tensor context_lens = empty(rows, {sequences}, ScalarType::Int);
  PrepareArgs args{};
  args.computed = static_cast<int32_t*>(computed.mutable_data_ptr());
  args.computed_stride = computed.stride(0);
  args.tokens = static_cast<const int32_t*>(tokens.const_data_ptr());
  args.tokens_stride = tokens.stride(0);
  args.blocks = static_cast<const int32_t*>(blocks.const_data_ptr());
  args.blocks_stride = blocks.stride(0);
  args.rows = static_cast<const int32_t*>(rows.const_data_ptr());
  args.first = static_cast<const int32_t*>(first.const_data_ptr());
  args.starts = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr());
  args.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  args.positions = static_cast<int64_t*>(positions.mutable_data_ptr());
  args.places = static_cast<int64_t*>(slot_mapping.mutable_data_ptr());
  args.tables = static_cast<int32_t*>(block_tables.mutable_data_ptr());
  args.lengths = static_cast<int32_t*>(context_lens.mutable_data_ptr());
  args.sequences = int(sequences);
  args.num_tokens = int(num_tokens);
  args.width = int(max_blocks);
  args.block = int(block_size);
  prepare_step(args, current_stream(rows));
  check_launch(op);
  return {ids, positions, slot_mapping, block_tables, context_lens};
}

}  // namespace
}  // namespace lorax::cuda

STABLE_TORCH_LIBRARY_IMPL(lorax, CUDA, m) {
  m.impl("write_runs_", TORCH_BOX(&lorax::cuda::bind_write_runs));
  m.impl("prepare_step_", TORCH_BOX(&lorax::cuda::bind_prepare_step));
}
