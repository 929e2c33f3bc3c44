// Arguments of the kernel that hashes the leaves of an image.
#pragma once

#include "kernels.h"

namespace lorax {

struct LeafDigestsArgs {
  const uint8_t* data;
  int64_t bytes, leaf;  // of the data; of each leaf but the last, a multiple of 128
  uint8_t* out;         // 32 bytes for each leaf
};

}  // namespace lorax

LORAX_DECLARE_KERNEL(leaf_digests, LeafDigestsArgs)
