// CUDA's header of 16 bit numbers: what a kernel needs to read and write them.
#pragma once
#include "cuda_runtime.h"

struct __half {
    _Float16 value;
};
inline float __half2float(__half x) {  // without F16C the compiler's own conversion is a slow call
    const unsigned word = simt::bits<uint16_t>(x), sign = word << 16 & 0x80000000u, rest = word & 0x7FFF;
    if (rest >= 0x7C00) return simt::bits<float>(sign | 0x7F800000u | rest << 13);  // infinity and NaN
    return simt::bits<float>(sign | simt::bits<unsigned>(simt::bits<float>(rest << 13) * 0x1p112f));
}
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
