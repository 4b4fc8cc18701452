// CUDA's header of 16 bit numbers: what a kernel needs to read and write them.
#pragma once
#include "cuda_runtime.h"

struct __half {
    _Float16 value;
};
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
