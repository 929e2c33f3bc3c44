// lorax::paged_attention on the CPU.
#include "../common/bind_attention.h"

#include "attention.h"
#include "bind.h"

namespace lorax {
namespace {

// Refuses sequences whose queries, lengths or blocks do not fit one another.
void check_sequences(const char* op, const AttentionArgs& args, int64_t tokens, int64_t table_width,
                     int64_t num_blocks) {
  LORAX_CHECK(args.starts[0] == 0 && args.starts[args.sequences] == tokens, op,
              ": cu_seqlens_q must lead from 0 to ", tokens, " tokens, they lead from ",
              args.starts[0], " to ", args.starts[args.sequences]);
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t queries = args.starts[s + 1] - args.starts[s], length = args.lengths[s];
    LORAX_CHECK(queries >= 0, op, ": cu_seqlens_q must not fall, found ", args.starts[s + 1],
                " after ", args.starts[s]);
    if (queries == 0) continue;
    LORAX_CHECK(queries <= length, op, ": a sequence of ", length, " positions cannot have ",
                queries, " queries");
    const int64_t last = (length + args.block - 1) / args.block;
    LORAX_CHECK(last <= table_width, op, ": the ", last, " blocks of a sequence of ", length,
                " positions do not fit block_tables of width ", table_width);
    const int64_t seen =
        length - queries - args.window + 1;  // blocks before the window may be gone
    const int32_t* table = args.tables + s * args.table_stride;
    for (int64_t i = args.window && seen > 0 ? seen / args.block : 0; i < last; ++i) {
      LORAX_CHECK(table[i] >= 0 && table[i] < num_blocks, op, ": block ", table[i],
                  " is not in the cache of ", num_blocks, " blocks");
    }
  }
}

Tensor bind_paged_attention(Tensor q, Tensor kv, int64_t layer, Tensor block_tables,
                            Tensor cu_seqlens_q, Tensor context_lens, double scale, double softcap,
                            int64_t window, int64_t num_decodes) {
  const char* op = "paged_attention";
  AttentionArgs args = attention_args<AttentionArgs>(op, q, kv, layer, block_tables, cu_seqlens_q,
                                                     context_lens, scale, softcap, window);
  const int64_t tokens = q.size(0);
  // one kernel serves all sequences, so it need not know which of them decode
  LORAX_CHECK(num_decodes >= 0 && num_decodes <= args.sequences, op, ": num_decodes ", num_decodes,
              " of ", args.sequences, " sequences");
  check_sequences(op, args, tokens, block_tables.size(1), kv.size(0));

  Tensor out = empty(q, {tokens, args.heads, args.size}, q.scalar_type());
  args.out = out.mutable_data_ptr();
  if (tokens > 0) attention(args);
  return out;
}

}  // namespace
}  // namespace lorax

STABLE_TORCH_LIBRARY_IMPL(lorax, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&lorax::bind_paged_attention));
}
