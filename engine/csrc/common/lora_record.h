// Constants of the adapters' records and images; the format is in engine/ops/layout.py.
#pragma once

#include <cstdint>

namespace lorax {

constexpr int64_t kLoraAlign = 16;  // bytes; the unit of a record's offsets
constexpr int kLoraTargets = 3;
constexpr int kRecordWords = 8;

}  // namespace lorax
