// lorax::pick_greedy_ and lorax::top_p_floor on CUDA.
#include "bind.h"
#include "sample.h"

namespace lorax::cuda {
namespace {

// Whether the `count` indices are int64; they must be int32 otherwise.
bool is_int64(const char* op, const char* name, const Tensor& t, int64_t count) {
  check_layout(op, name, t, 1);
  LORAX_CHECK(t.size(0) == count, op, ": ", name, " ", shape_of(t), " does not fit ", count,
              " rows of logits");
  const bool is_64 = t.scalar_type() == ScalarType::Long;
  LORAX_CHECK(is_64 || t.scalar_type() == ScalarType::Int, op, ": ", name,
              " must be int32 or int64");
  return is_64;
}

Tensor bind_pick_greedy(Tensor logits, Tensor rows, Tensor lengths, Tensor tokens) {
  const char* op = "pick_greedy_";
  check_layout(op, "logits", logits, 2);
  check_layout(op, "tokens", tokens, 2);
  LORAX_CHECK(tokens.scalar_type() == ScalarType::Int, op, ": tokens must be int32");
  LORAX_CHECK(logits.size(1) > 0, op, ": logits must have a vocabulary, their shape is ",
              shape_of(logits));
  const int64_t count = logits.size(0), vocab = logits.size(1);
  LORAX_CHECK(count <= 65535, op, ": ", count, " rows of logits, at most 65535 fit into a launch");
  PickGreedyArgs args{};
  args.dtype = dtype_of(op, "logits", logits);
  args.logits = logits.const_data_ptr();
  args.logits_stride = logits.stride(0);
  args.vocab = vocab;
  args.count = int(count);
  args.rows_int64 = is_int64(op, "rows", rows, count);
  args.lengths_int64 = is_int64(op, "lengths", lengths, count);
  args.rows = rows.const_data_ptr();
  args.lengths = lengths.const_data_ptr();
  args.tokens = static_cast<int32_t*>(tokens.mutable_data_ptr());
  args.tokens_stride = tokens.stride(0);
  Tensor chosen = empty(logits, {count}, ScalarType::Long);
  args.chosen = static_cast<int64_t*>(chosen.mutable_data_ptr());
  // torch's allocator keeps it for the stream, so that it may go back before the kernels ran
  Tensor candidates = empty(logits, {count, greedy_parts(vocab)}, ScalarType::Long);
  args.candidates = static_cast<uint64_t*>(candidates.mutable_data_ptr());
  pick_greedy(args, current_stream(logits));
  check_launch(op);
  return chosen;
}

Tensor bind_top_p_floor(Tensor probs, Tensor top_p) {
  const char* op = "top_p_floor";
  check_layout(op, "probs", probs, 2);
  check_layout(op, "top_p", top_p, 1);
  LORAX_CHECK(probs.scalar_type() == ScalarType::Float && top_p.scalar_type() == ScalarType::Float,
              op, ": probs and top_p must be float32");
  LORAX_CHECK(top_p.size(0) == probs.size(0) && probs.size(1) > 0, op, ": top_p ", shape_of(top_p),
              " does not fit probs ", shape_of(probs));
  Tensor floor = empty(probs, {probs.size(0), 1}, ScalarType::Float);
  TopPFloorArgs args{};
  args.probs = static_cast<const float*>(probs.const_data_ptr());
  args.stride = probs.stride(0);
  args.vocab = probs.size(1);
  args.rows = int(probs.size(0));
  args.top_p = static_cast<const float*>(top_p.const_data_ptr());
  args.floor = static_cast<float*>(floor.mutable_data_ptr());
  top_p_floor(args, current_stream(probs));
  check_launch(op);
  return floor;
}

}  // namespace
}  // namespace lorax::cuda

STABLE_TORCH_LIBRARY_IMPL(lorax, CUDA, m) {
  m.impl("pick_greedy_", TORCH_BOX(&lorax::cuda::bind_pick_greedy));
  m.impl("top_p_floor", TORCH_BOX(&lorax::cuda::bind_top_p_floor));
}
