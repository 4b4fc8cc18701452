// The points of a cloud as pairs of 16 bit numbers, for pairwise_products.cu, whose first lines say why.
#pragma once
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

#include "cuda/launch.h"
#include "cuda/pairwise_work.h"

namespace infovae_fast {
namespace {

constexpr int kUnit = 64;  // points that share a power of two; clouds are padded to a multiple of it and of a tile
constexpr int kPrepareThreads = 256;

// The points of a cloud as tensor cores take them, in tiles that lie in memory as in shared memory:
//
//     high, low               [tile, pitch], u = unit (high + low)
//     value_high, value_low   the same; what g is multiplied with, if it is not u
//     minus_h                 [tile], -h / unit^2
//     a                       [tile]
//     unit, value_unit        [units], of so many points of the tile each
//     there                   [1], how many points there are; the others are padding
struct Shape {
    int dp, tile, pitch, array, arrays, units, bytes;

    constexpr Shape(int dp, bool values)
        : dp(dp),
          tile(dp == 16 ? 128 : dp <= (values ? 48 : 80) ? 64 : dp <= (values ? 80 : 96) ? 32 : 16),  // two in 99 KiB
          pitch(dp + 8),  // eight rows lie in different banks
          array(tile * pitch), arrays(values ? 4 : 2), units(tile > kUnit ? tile / kUnit : 1),
          bytes(2 * arrays * array + 4 * (2 * tile + (2 * units + 4) / 4 * 4)) {}
};

struct Tile16 {
    __half *high, *low, *value_high, *value_low;
    float *minus_h, *a, *unit, *value_unit, *there;

    __device__ __forceinline__ Tile16(const Shape& s, unsigned char* at) {
        high = reinterpret_cast<__half*>(at), low = high + s.array;
        value_high = s.arrays == 4 ? low + s.array : high, value_low = s.arrays == 4 ? value_high + s.array : low;
        minus_h = reinterpret_cast<float*>(high + s.arrays * s.array), a = minus_h + s.tile;
        unit = a + s.tile, value_unit = unit + s.units, there = value_unit + s.units;
    }
};

struct Points {
    unsigned char* tiles;
    int64_t count;  // of the tiles of a cloud

    __device__ __forceinline__ unsigned char* tile(const Shape& s, int64_t cloud, int64_t index) const {
        return tiles + (cloud * count + index) * s.bytes;
    }
};

// ---- numbers ----

__device__ __forceinline__ float power_below(float x) {  // 2^floor(log2 x); x is positive and normal
    return __uint_as_float(__float_as_uint(x) & 0x7f800000u);
}
__device__ __forceinline__ float inverse_power(float power) {  // of a power of two
    return __uint_as_float(0x7f000000u - __float_as_uint(power));
}

// Two numbers as high + low, side by side in words.
__device__ __forceinline__ void split(float x, float y, unsigned& high, unsigned& low) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float x_high, y_high;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(y), "f"(x));
    asm("{\n.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}"
        : "=f"(x_high), "=f"(y_high) : "r"(high));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(y - y_high), "f"(x - x_high));
#else
    const __half two_high[2] = {__float2half_rn(x), __float2half_rn(y)};
    const __half two_low[2] = {__float2half_rn(x - __half2float(two_high[0])), __float2half_rn(y - __half2float(two_high[1]))};
    std::memcpy(&high, two_high, sizeof high), std::memcpy(&low, two_low, sizeof low);
#endif
}

// ---- the points ----

// The largest of a block, and its threads meet.
__device__ __forceinline__ float largest(float x, float (&of_warps)[kPrepareThreads / 32]) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    for (const float other : of_warps) x = fmaxf(x, other);
    return x;
}

struct Extremes {  // the two least of some numbers, and the two largest
    float low[2] = {INFINITY, INFINITY}, high[2] = {-INFINITY, -INFINITY};

    __device__ void see(float x) { see(x, x); }
    __device__ void see(const Extremes& other) { see(other.low[0], other.high[0]), see(other.low[1], other.high[1]); }
    __device__ void see(float least, float most) {
        low[1] = fminf(low[1], fmaxf(low[0], least)), low[0] = fminf(low[0], least);
        high[1] = fmaxf(high[1], fminf(high[0], most)), high[0] = fmaxf(high[0], most);
    }
};

// A block: 64 points of a cloud, [2] clouds one after the other.
template <bool VALUES>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ Work<float> work,
                                                                  const __grid_constant__ Shape shape,
                                                                  const __grid_constant__ Points x,
                                                                  const __grid_constant__ Points y) {
    constexpr int kAtOnce = 8;  // loads, before the first is waited for
    constexpr int kMostColumns = 4, kWidth = 32;  // of a thread, whose line has so many threads or, for few coordinates, half
    constexpr int kParts = kPrepareThreads / kUnit;  // threads of a point
    static_assert(kMostColumns * kWidth >= 128 && kAtOnce * (kPrepareThreads / kWidth) >= kUnit);
    double* const centre = shared_memory<double>();  // [dp]
    float* const u = reinterpret_cast<float*>(centre + shape.dp);  // [64, dp + 1]
    __shared__ double sum_of[kPrepareThreads];
    __shared__ Extremes extremes_of[kPrepareThreads];
    __shared__ float of_warps[3][kPrepareThreads / 32];
    const int thread = int(threadIdx.x), d = work.d, dp = shape.dp;
    const int64_t cloud = blockIdx.y, units = x.count * shape.tile / kUnit;
    const int own = int64_t(blockIdx.x) < units ? 0 : 1;
    const Points& to = own == 0 ? x : y;
    const int64_t first = (int64_t(blockIdx.x) - (own == 0 ? 0 : units)) * kUnit, n = work.n[own];
    after_previous();

    const int width = dp == 16 ? kWidth / 2 : kWidth, lines = kPrepareThreads / width, line = thread / width;
    float z[kMostColumns][kAtOnce];
#pragma unroll
    for (int k = 0; k < kMostColumns; ++k) {
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
            const int c = thread % width + k * width, row = line + e * lines;
            const bool there = c < d && row < kUnit && first + row < n;
            z[k][e] = there ? work.z[own][(cloud * n + first + row) * d + c] : 0.0f;
        }
    }

    // The mean of the sample without the farthest point on either side, and how far it spreads from there. Several threads
    // share a coordinate.
    const int sample = work.sample_size();
    const int sharers = kPrepareThreads / dp;
    double sum = 0;
    Extremes extremes;
    const int own_c = thread % dp;
    for (int k = thread < sharers * dp ? thread / dp : sample; k < sample; k += kAtOnce * sharers) {
        float some[kAtOnce];
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
            const int64_t number = k + e * sharers;
            some[e] = number < sample && own_c < d ? *work.sample(cloud, own_c, number) : 0.0f;
        }
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
            if (k + e * sharers < sample) sum += double(some[e]), extremes.see(some[e]);
        }
    }
    sum_of[thread] = sum, extremes_of[thread] = extremes;
    __syncthreads();
    float spread = 0;
    if (thread < dp) {
        for (int k = thread + dp; k < sharers * dp; k += dp) {
            sum += sum_of[k], extremes.see(extremes_of[k]);
        }
        const bool all = sample < 3;
        const double least = all ? extremes.low[0] : extremes.low[1], most = all ? extremes.high[0] : extremes.high[1];
        const double mean = all ? sum / double(sample) : (sum - extremes.low[0] - extremes.high[0]) / double(sample - 2);
        centre[thread] = mean, spread = fmaxf(float(most - mean), float(mean - least));
    }
    spread = largest(spread, of_warps[0]);

    const double scale = work.coordinate_scale(), outer = work.weight[0];
    const double slope = (own == 0 ? work.within[0] : work.between) * outer * work.force_scale();
    const auto value = [&](int row, int c, float of_u) {
        const bool moved = own == 0 && first + row < n && c < d;
        return float(slope * double(of_u) + (moved ? outer * double(work.v[(cloud * n + first + row) * d + c]) : 0.0));
    };
    float most_value = 0, most = 0;
#pragma unroll
    for (int k = 0; k < kMostColumns; ++k) {
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
            const int c = thread % width + k * width, row = line + e * lines;
            if (c >= dp || row >= kUnit) continue;
            const float one = first + row < n && c < d ? float((double(z[k][e]) - centre[c]) * scale) : 0.0f;
            u[row * (dp + 1) + c] = one;
            most = fmaxf(most, fabsf(one));
            if constexpr (VALUES) most_value = fmaxf(most_value, fabsf(value(row, c, one)));
        }
    }
    const auto unit_of = [&](float x) {  // the power of two that brings x below 2^14; its square is a normal number
        return power_below(fminf(fmaxf(x, 0x1p-40f), 0x1p126f)) * 0x1p-13f;
    };
    const float unit = fmaxf(unit_of(float(4 * scale) * spread), unit_of(largest(most, of_warps[1])));
    const float value_unit = VALUES ? unit_of(largest(most_value, of_warps[2])) : 1.0f;

    const int row = thread / kParts, part = thread % kParts, place = int((first + row) % shape.tile);
    const Tile16 tile(shape, to.tile(shape, cloud, (first + row) / shape.tile));
    if (place % kUnit == 0 && part == 0) {
        tile.unit[place / kUnit] = unit;
        if (VALUES) tile.value_unit[place / kUnit] = value_unit;
        const int64_t there = n - (first + row);
        if (place == 0) tile.there[0] = float(there < 0 ? 0 : there < shape.tile ? int(there) : shape.tile);
    }
    double square = 0;  // of high high + 2 high low
    alignas(16) unsigned words[2][4];
    const auto eight = [&](int c, float by, auto number, __half* high, __half* low) {
#pragma unroll
        for (int e = 0; e < 4; ++e) split(number(c + 2 * e) * by, number(c + 2 * e + 1) * by, words[0][e], words[1][e]);
        const int at = place * shape.pitch + c;
        *reinterpret_cast<int4*>(high + at) = *reinterpret_cast<const int4*>(words[0]);
        *reinterpret_cast<int4*>(low + at) = *reinterpret_cast<const int4*>(words[1]);
    };
    for (int c = 8 * part; c < dp; c += 8 * kParts) {
        const auto number = [&](int at) { return u[row * (dp + 1) + at]; };
        eight(c, inverse_power(unit), number, tile.high, tile.low);
        __half halves[2][8];
        std::memcpy(halves, words, sizeof halves);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const double a = double(__half2float(halves[0][e])), b = double(__half2float(halves[1][e]));
            square += a * (a + 2 * b);
        }
        if constexpr (VALUES) {
            eight(c, inverse_power(value_unit), [&](int at) { return value(row, at, number(at)); }, tile.value_high,
                  tile.value_low);
        }
    }
#pragma unroll
    for (int offset = kParts / 2; offset > 0; offset /= 2) square += __shfl_xor_sync(0xffffffffu, square, offset);
    if (part == 0) {
        const bool there = first + row < n;
        const double far_away = fmax(1e4 / (double(unit) * double(unit)), 1.0);  // t < -10^4; a large unit is far
        tile.minus_h[place] = float(there ? -square / 2 : -far_away);
        tile.a[place] = !there ? 0.0f : work.a[own] == nullptr ? 1.0f : work.a[own][cloud * n + first + row];
    }
}

}  // namespace
}  // namespace infovae_fast
