// What engine/ops/digest.py calls through ctypes, which lets other Python threads run meanwhile.
#include "digest.h"

extern "C" {

__attribute__((visibility("default"))) void lorax_cpu_leaf_digests(const uint8_t* data,
                                                                   int64_t bytes, int64_t leaf,
                                                                   uint8_t* out) {
  lorax::leaf_digests({data, bytes, leaf, out});
}
}
