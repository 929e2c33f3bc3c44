// Constants of the adapters' records and images; the format is in engine/ops/layout.py.
#pragma once

#include <cstdint>

namespace lorax {

constexpr int64_t kLoraAlign = 16;  // bytes; the unit of a record's offsets
constexpr int kLoraTargets = 3;
constexpr int kRecordWords = 8;
constexpr int kFlagShift = 2;                  // the extras have a shift row
constexpr int kFlagsScaled = 4 | 8 | 16;       // the extras have a scale row
constexpr int kFlagsExtras = kFlagShift | kFlagsScaled;
constexpr int kFlagOwnRows = 256;              // own rows of embedding or head at kWordOwn
constexpr int kWordOwn = 7;

}  // namespace lorax
