// The rotary embedding that also fills the KV cache, on the CPU.
#pragma once

#include "../common/rope_args.h"
#include "kernels.h"

LORAX_DECLARE_KERNEL(rope_store_kv, RopeStoreKvArgs)
