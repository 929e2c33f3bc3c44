// What every CPU binding needs. Only for bind_*.cpp.
#pragma once

#include "../common/bind.h"
#include "kernels.h"
