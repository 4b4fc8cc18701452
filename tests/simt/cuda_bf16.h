// CUDA's header of the upper halves of floats: what a kernel needs to read and write them.
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return simt::bits<float>(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {  // ties to even
    const unsigned word = simt::bits<unsigned>(x);
    if (x != x) return {0x7FFF};
    return {uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16)};
}
