// Constants of layers.inc.
#pragma once

#include "masked_conv.h"
#include "vector.h"

namespace infovae_fast {

constexpr int kStrip = 6;  // rows whose sums are in registers at once

}  // namespace infovae_fast
