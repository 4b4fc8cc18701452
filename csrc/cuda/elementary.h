// Elementary functions on a GPU, by its special function units.
#pragma once
#include <cuda_runtime.h>

#include <cmath>

namespace infovae_fast {
namespace {

// 2^t, relative error 2^-22.5 in float.
__device__ __forceinline__ float power_of_2(float t) {
#ifdef __CUDA_ARCH__
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
    return e;
#else
    return exp2f(t);
#endif
}
__device__ __forceinline__ double power_of_2(double t) { return exp2(t); }

__device__ __forceinline__ float near_reciprocal(float x) {  // within 2^-23; a division would call a subroutine
#ifdef __CUDA_ARCH__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}
__device__ __forceinline__ double near_reciprocal(double x) { return 1.0 / x; }
__device__ __forceinline__ float reciprocal(float x) {  // of a normal number
    const float y = near_reciprocal(x);
    return y + y * (1.0f - x * y);
}

template <typename T>
__device__ __forceinline__ T minimum_or_nan(T x, T limit) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (sizeof(T) == 4) {
        float y;
        asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(limit));
        return y;
    }
#endif
    return x > limit ? limit : x;
}

__device__ __forceinline__ float near_tanh(float x) {  // relative error 2^-11
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return tanhf(x);
#endif
}

// log2(1 + u), u > -1/2: 1 + u = 2^e m with m in [sqrt(1/2), sqrt(2)); log2 m = s Q(s^2), s = (m - 1) / (m + 1).
__device__ __forceinline__ float log2_1p(float u) {
    const float x = 1.0f + u, lost = u - (x - 1.0f);
    const int bits = __float_as_int(x), e = (bits - 0x3f3504f3) >> 23;
    const float m = __int_as_float(bits - (e << 23)), s = (m - 1.0f) * reciprocal(m + 1.0f), q = s * s;
    const float Q = 2.88539007978892671f + q * (0.961798847641742934f + q * (0.576714383962467901f + q * 0.431735879207038553f));
    return float(e) + (s * Q + 1.44269504f * lost * reciprocal(x)) + (x - x);  // NaN and infinity become NaN
}
__device__ __forceinline__ double log2_1p(double u) { return 1.4426950408889634074 * log1p(u); }

}  // namespace
}  // namespace infovae_fast
