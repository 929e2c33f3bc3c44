// lorax::paged_attention on the CPU.
#include "attention.h"
#include "bind.h"

namespace lorax {
namespace {

// Contiguous int32 with `dims` dimensions, `rows` of the first.
const int32_t* check_table(const char* op, const char* name, const Tensor& t, int64_t dims,
                           int64_t rows) {
  LORAX_CHECK(
      t.is_cpu() && t.dim() == dims && t.scalar_type() == ScalarType::Int && t.size(0) == rows, op,
      ": ", name, " must be int32 with ", dims, " dimensions and ", rows, " rows, its shape is ",
      shape_of(t));
  LORAX_CHECK(t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1, op, ": ", name,
              " must be contiguous");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// Refuses sequences whose queries, lengths or blocks do not fit one another.
void check_sequences(const char* op, const AttentionArgs& args, int64_t tokens, int64_t table_width,
                     int64_t num_blocks) {
  LORAX_CHECK(args.starts[0] == 0 && args.starts[args.sequences] == tokens, op,
              ": starts must lead from 0 to ", tokens, " tokens, they lead from ", args.starts[0],
              " to ", args.starts[args.sequences]);
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t queries = args.starts[s + 1] - args.starts[s], length = args.lengths[s];
    LORAX_CHECK(queries >= 0, op, ": starts must not fall, found ", args.starts[s + 1], " after ",
                args.starts[s]);
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
  const int64_t tokens = q.size(0);
  args.heads = q.size(1);
  args.size = q.size(2);
  args.block = kv.size(3);
  args.groups = kv.size(4);
  LORAX_CHECK(args.groups > 0 && args.heads > 0 && args.heads % args.groups == 0, op, ": ",
              args.heads, " query heads cannot share ", args.groups, " key-value heads");
  LORAX_CHECK(args.size > 0 && args.size == kv.size(5), op, ": q has head size ", args.size,
              " and kv ", kv.size(5));
  LORAX_CHECK(args.block > 0, op, ": kv must have blocks of at least one position");
  LORAX_CHECK(window >= 0, op, ": window ", window, " is negative");
  LORAX_CHECK(softcap >= 0, op, ": softcap ", softcap, " is negative");
  args.sequences = lengths.dim() == 1 ? lengths.size(0) : 0;
  args.lengths = check_table(op, "lengths", lengths, 1, args.sequences);
  args.starts = check_table(op, "starts", starts, 1, args.sequences + 1);
  args.tables = check_table(op, "block_tables", block_tables, 2, args.sequences);
  args.table_stride = block_tables.stride(0);
  args.window = window;
  // one kernel serves all sequences, so it need not know which of them decode
  LORAX_CHECK(decodes >= 0 && decodes <= args.sequences, op, ": decodes ", decodes, " of ",
              args.sequences, " sequences");
  check_sequences(op, args, tokens, block_tables.size(1), kv.size(0));

  Tensor out = empty({tokens, args.heads, args.size}, q.scalar_type());
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
  if (tokens > 0) attention(args);
  return out;
}

}  // namespace
}  // namespace lorax

STABLE_TORCH_LIBRARY_IMPL(lorax, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&lorax::bind_paged_attention));
}
