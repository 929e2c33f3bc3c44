// RMS norm and gated activations on the CPU.
#pragma once

#include "../common/elementwise_args.h"
#include "kernels.h"

LORAX_DECLARE_KERNEL(add_rms_norm, AddRmsNormArgs)
LORAX_DECLARE_KERNEL(act_and_mul, ActAndMulArgs)
