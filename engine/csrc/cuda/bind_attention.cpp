// lorax::paged_attention on CUDA. Starts, lengths and tables are read by the kernels only.
#include <algorithm>

#include "attention.h"
#include "bind.h"

namespace lorax::cuda {
namespace {

// int32 on the GPU with `dims` dimensions, `rows` of the first, elements of the last side by side.
const int32_t* check_table(const char* op, const char* name, const Tensor& t, int64_t dims,
                           int64_t rows) {
  LORAX_CHECK(
      t.is_cuda() && t.dim() == dims && t.scalar_type() == ScalarType::Int && t.size(0) == rows, op,
      ": ", name, " must be int32 on the GPU with ", dims, " dimensions and ", rows,
      " rows, its shape is ", shape_of(t));
  LORAX_CHECK(t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1, op, ": ", name,
              " must be contiguous");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

Tensor bind_paged_attention(Tensor q, Tensor kv, int64_t layer, Tensor block_tables, Tensor starts,
                            Tensor lengths, double scale, double softcap, int64_t window,
                            int64_t decodes) {
  const char* op = "paged_attention";
  check_layout(op, "q", q, 3);
  check_layout(op, "kv", kv, 6);
  AttentionArgs args{};
  args.dtype = dtype_of(op, "q", q);
  args.kv_dtype = dtype_of(op, "kv", kv);
  LORAX_CHECK(kv.size(2) == 2, op,
              ": kv must be [blocks, layers, 2, block, groups, size], its shape is ", shape_of(kv));
  LORAX_CHECK(layer >= 0 && layer < kv.size(1), op, ": layer ", layer, " is not in the cache of ",
              kv.size(1), " layers");
  const int64_t tokens = q.size(0), heads = q.size(1), size = q.size(2);
  const int64_t block = kv.size(3), groups = kv.size(4);
  LORAX_CHECK(groups > 0 && heads > 0 && heads % groups == 0, op, ": ", heads,
              " query heads cannot share ", groups, " key-value heads");
  LORAX_CHECK(tokens <= INT32_MAX / heads, op, ": ", tokens, " tokens of ", heads,
              " heads do not fit 32 bits");
  LORAX_CHECK(size > 0 && size == kv.size(5), op, ": q has head size ", size, " and kv ",
              kv.size(5));
  LORAX_CHECK(size <= kAttentionMaxSize, op, ": head size ", size, " is above ", kAttentionMaxSize);
  LORAX_CHECK(block > 0, op, ": kv must have blocks of at least one position");
  LORAX_CHECK(window >= 0, op, ": window ", window, " is negative");
  LORAX_CHECK(softcap >= 0, op, ": softcap ", softcap, " is negative");
  const int64_t sequences = lengths.dim() == 1 ? lengths.size(0) : 0;
  args.lengths = check_table(op, "lengths", lengths, 1, sequences);
  args.starts = check_table(op, "starts", starts, 1, sequences + 1);
  args.tables = check_table(op, "block_tables", block_tables, 2, sequences);
  for (const Tensor* t : {&kv, &block_tables, &starts, &lengths})
    LORAX_CHECK(t->get_device() == q.get_device(), op, ": all tensors must be on the GPU of q");
  args.table_stride = block_tables.stride(0);
  args.tokens = int(tokens);
  args.sequences = int(sequences);
  args.heads = int(heads);
  args.groups = int(groups);
  args.size = int(size);
  args.block = int(block);
  args.window = int(std::min<int64_t>(window, INT32_MAX));
  LORAX_CHECK(tokens == 0 || sequences > 0, op, ": ", tokens, " tokens without a sequence");
  LORAX_CHECK(decodes >= 0 && decodes <= std::min(tokens, sequences), op, ": decodes ", decodes,
              " of ", sequences, " sequences and ", tokens, " tokens");
  // as many tokens as sequences: one for each, or a few without any, which the kernel sees
  args.decodes = int(tokens == sequences ? tokens : decodes);

  Tensor out = empty(q, {tokens, heads, size}, q.scalar_type());
  args.q = q.const_data_ptr();
  args.q_stride = q.stride(0);
  args.q_head_stride = q.stride(1);
  args.out = out.mutable_data_ptr();
  const int64_t element = args.kv_dtype == DType::float32 ? 4 : 2;
  args.kv = static_cast<const char*>(kv.const_data_ptr()) + layer * kv.stride(1) * element;
  args.block_stride = kv.stride(0);
  args.value_stride = kv.stride(2);
  args.position_stride = kv.stride(3);
  args.kv_head_stride = kv.stride(4);
  args.scale = float(scale);
  args.softcap = float(softcap);
  if (tokens == 0) return out;

  const int64_t positions = block_tables.size(1) * block;
  args.parts = int(std::clamp<int64_t>((positions + kAttentionPartSize - 1) / kAttentionPartSize, 1,
                                       kAttentionMaxParts));
  // torch's allocator keeps it for the stream, so that it may go back before the kernels ran
  Tensor workspace = empty(q, {attention_workspace(args)}, ScalarType::Float);
  args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  paged_attention(args, current_stream(q));
  check_launch(op);
  return out;
}

}  // namespace
}  // namespace lorax::cuda

STABLE_TORCH_LIBRARY_IMPL(lorax, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&lorax::cuda::bind_paged_attention));
}
