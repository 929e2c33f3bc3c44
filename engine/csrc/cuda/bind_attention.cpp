// lorax::paged_attention on CUDA. Only the kernels read what block_tables, cu_seqlens_q and
// context_lens hold.
#include "../common/bind_attention.h"

#include <algorithm>

#include "attention.h"
#include "bind.h"

namespace lorax::cuda {
namespace {

Tensor bind_paged_attention(Tensor q, Tensor kv, int64_t layer, Tensor block_tables,
                            Tensor cu_seqlens_q, Tensor context_lens, double scale, double softcap,
                            int64_t window, int64_t num_decodes) {
  const char* op = "paged_attention";
  AttentionArgs args = attention_args<AttentionArgs>(op, q, kv, layer, block_tables, cu_seqlens_q,
                                                     context_lens, scale, softcap, window);
  const int64_t tokens = q.size(0), heads = q.size(1), size = q.size(2);
  const int64_t sequences = context_lens.size(0);
  LORAX_CHECK(tokens <= INT32_MAX / heads, op, ": ", tokens, " tokens of ", heads,
              " heads do not fit 32 bits");
  LORAX_CHECK(size <= kAttentionMaxSize, op, ": head size ", size, " is above ", kAttentionMaxSize);
  for (const Tensor* t : {&kv, &block_tables, &cu_seqlens_q, &context_lens})
    LORAX_CHECK(t->get_device() == q.get_device(), op, ": all tensors must be on the GPU of q");
  LORAX_CHECK(tokens == 0 || sequences > 0, op, ": ", tokens, " tokens without a sequence");
  LORAX_CHECK(num_decodes >= 0 && num_decodes <= std::min(tokens, sequences), op, ": num_decodes ",
              num_decodes, " of ", sequences, " sequences and ", tokens, " tokens");
  args.tokens = int(tokens);
  // as many tokens as sequences: one for each, or a few without any, which the kernel sees
  args.decodes = int(tokens == sequences ? tokens : num_decodes);

  Tensor out = empty(q, {tokens, heads, size}, q.scalar_type());
  args.out = out.mutable_data_ptr();
  if (tokens == 0) return out;

  const int64_t positions = block_tables.size(1) * kv.size(3);
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
