// Energy and force on a GPU, for points of many coordinates: their products on tensor cores.
//
// The formulas are those of pairwise.cu: t_ij = u_i.u_j - h_i - h_j, F_i = w slope (sum_j g_ij a_j u_j - G_i u_i) with
// G_i = sum_j g_ij a_j, and both products are of matrices: u u^T, and g u. Tensor cores multiply 16 bit numbers, so a
// number is a power of two times the sum of two of them, high + low, and a product is high high + high low + low high:
// 22 bits, at twice the rate of TF32. Powers of two bring what is large into the range of 16 bits:
//
//     u   one for each 64 points, nearly always that of a sample; 2 h = high high + 2 high low, so that t_ii = 0. (A point
//         more than 10^5 times farther out than its 63 neighbours takes digits of theirs.)
//     g   one for each target, which changes when a larger g comes. Of one RBF scale it is added to t, where it costs
//         nothing: phi is a power of two itself
//
// Tensor cores cut sums off, always towards zero. So they add up 16 coordinates or sources, and what is more is added up in
// float; the sums over two clouds nearly cancel, and those over groups of sources are added up in double, as those of
// A = sum_j phi_ij a_j and G are. With v, the second product is of phi and w slope u_j + weight v_j instead.
//
// A block owns 64 targets, 16 for each of its four warps, in registers, and a segment of the sources. Nothing is shared
// between blocks: what they have summed is added up in a launch of its own, in order.
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cuda/pairwise_work.h"
#include "cuda/products.h"

namespace infovae_fast {
namespace {

using P = Product<__half>;

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;  // targets of a block
constexpr int kUnit = 64;     // points that share a power of two; both clouds are padded to a multiple
constexpr int kGroup = 256;   // sources that are added up in float
constexpr int kStages = 2;
constexpr int kBlocksPerProcessor = 16, kLeastSources = 256;  // wanted; of a block
constexpr int kPrepareThreads = 256, kGatherThreads = 256;
constexpr float kLargest = 32768;  // that a scaled g may be
constexpr int kFirstShift = 126;   // of t, before the first g is known
constexpr float kSmallSquare = 0x1p20f;  // of distances, below which rounding leaves t next to 0

// Points as tensor cores take them; [clouds, padded, DP], [clouds, padded] and [clouds, padded / kUnit].
struct Points {
    const __half *high, *low;
    const __half *value_high, *value_low;  // what g is multiplied with, if it is not u
    const float *pairs;  // -h / unit^2 as tensor cores add it: of points 2 k and 2 k + 1, twice
    const float *a, *unit, *value_unit;  // u = unit (high + low)
    int64_t padded;
};

// Sources in shared memory at once, so that a block fits where one may have 99 KiB.
constexpr int tile_of(int dp, bool values) {
    return dp == 16 ? 128 : dp <= (values ? 48 : 80) ? 64 : dp <= (values ? 80 : 96) ? 32 : 16;
}

template <int DP, bool VALUES>
struct Layout {
    static constexpr int tile = tile_of(DP, VALUES), arrays = VALUES ? 4 : 2;
    static constexpr int pitch = DP + 8;  // eight rows lie in different banks
    static constexpr int source = tile * pitch;
    static constexpr size_t totals = kRows * DP * sizeof(double);  // and before there are any, the targets
    static constexpr int piece = tile < kUnit ? tile : kUnit, units = tile / piece;  // sources of one unit
    static constexpr int numbers = 3 * tile + 4 * ((2 * units + 3) / 4);  // floats of a tile: pairs, a, the units
    static constexpr size_t bytes = totals + kStages * (arrays * source * sizeof(__half) + numbers * sizeof(float));
    static_assert(2 * kRows * pitch * sizeof(__half) <= totals && kUnit % kRows == 0 && kGroup % tile == 0);
    static_assert(bytes + sizeof(Mixture<float>) + kWarps * sizeof(double) <= 99 << 10);
};

constexpr int blocks_at_once(int dp, bool usual) {  // on a processor
    return dp == 16 ? (usual ? 5 : 4) : dp == 32 && usual ? 3 : 2;
}

template <int DP, bool PLAIN, bool VALUES>
struct Registers {
    static constexpr bool usual = PLAIN && !VALUES;
    static constexpr int groups = DP <= (usual ? 80 : 48) ? 2 : 1;  // of 16 sources, whose g they hold
    static constexpr int blocks = blocks_at_once(DP, usual);
};

// ---- numbers ----

__device__ __forceinline__ float power_below(float x) {  // 2^floor(log2 x); x is positive and normal
    return __uint_as_float(__float_as_uint(x) & 0x7f800000u);
}
__device__ __forceinline__ float inverse_power(float power) {  // of a power of two
    return __uint_as_float(0x7f000000u - __float_as_uint(power));
}
__device__ __forceinline__ float exact_power(int e) { return __uint_as_float(unsigned(e + 127) << 23); }  // 2^e
__device__ __forceinline__ float minimum_or_nan(float x, float limit) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(limit));
    return y;
#else
    return x > limit ? limit : x;
#endif
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

struct Prepared {  // where `prepare_kernel` writes: see Points
    __half *high, *low, *value_high, *value_low;
    float *pairs, *a, *unit, *value_unit;
    int64_t padded;
};

// A block: 64 points of a cloud, [2] clouds one after the other.
template <bool VALUES>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ Work<float> work, int dp,
                                                                  const __grid_constant__ Prepared x,
                                                                  const __grid_constant__ Prepared y) {
    constexpr int kParts = kPrepareThreads / kUnit;  // threads of a point
    double* const centre = shared_memory<double>();  // [dp]
    float* const u = reinterpret_cast<float*>(centre + dp);  // [64, dp + 1]
    __shared__ float largest[2][kPrepareThreads / 32], of_sample[kPrepareThreads / 32];
    const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32, d = work.d;
    const int64_t cloud = blockIdx.y, units = x.padded / kUnit;
    const int own = int64_t(blockIdx.x) < units ? 0 : 1;
    const Prepared& to = own == 0 ? x : y;
    const int64_t index = int64_t(blockIdx.x) - (own == 0 ? 0 : units), first = index * kUnit, n = work.n[own];

#pragma unroll 4
    for (int c = warp; c < dp; c += kPrepareThreads / 32) {
        const double mean = work.centre(cloud, c, lane);
        const float spread = work.spread(cloud, c, lane, mean);
        if (lane == 0) centre[c] = mean, of_sample[warp] = fmaxf(c == warp ? 0.0f : of_sample[warp], spread);
    }
    __syncthreads();
    const double scale = work.coordinate_scale(), outer = work.weight[0], b0 = work.length(0);
    const double slope = (own == 0 ? work.within[0] : work.between) * outer / (b0 * b0 * scale);
    const auto value = [&](int row, int c, float of_u) {
        const bool moved = own == 0 && first + row < n && c < d;
        return float(slope * double(of_u) + (moved ? outer * double(work.v[(cloud * n + first + row) * d + c]) : 0.0));
    };
    float most = 0, most_value = 0;
    constexpr int kAtOnce = 4;  // loads, before the first is waited for
    for (int k = thread; k < kUnit * dp; k += kAtOnce * kPrepareThreads) {
        float z[kAtOnce];
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
            const int at = k + e * kPrepareThreads, row = at / dp, c = at % dp;
            z[e] = first + row < n && c < d && row < kUnit ? work.z[own][(cloud * n + first + row) * d + c] : 0.0f;
        }
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
            const int at = k + e * kPrepareThreads, row = at / dp, c = at % dp;
            if (row >= kUnit) break;
            const float one = first + row < n && c < d ? float((double(z[e]) - centre[c]) * scale) : 0.0f;
            u[row * (dp + 1) + c] = one;
            most = fmaxf(most, fabsf(one));
            if constexpr (VALUES) most_value = fmaxf(most_value, fabsf(value(row, c, one)));
        }
    }
    const auto unit_of = [&](float x, float* of_warps) {  // the power of two that brings x below 2^14
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
        if (lane == 0) of_warps[warp] = x;
        __syncthreads();
        for (int k = 0; k < kPrepareThreads / 32; ++k) x = fmaxf(x, of_warps[k]);
        return power_below(fminf(fmaxf(x, 0x1p-100f), 0x1p126f)) * 0x1p-13f;
    };
    float sample = 0;
    for (int k = 0; k < kPrepareThreads / 32; ++k) sample = fmaxf(sample, of_sample[k]);
    const float usual = power_below(fminf(fmaxf(float(4 * scale) * sample, 0x1p-100f), 0x1p126f)) * 0x1p-13f;
    const float unit = fmaxf(usual, unit_of(most, largest[0])), inverse = inverse_power(unit);
    const float value_unit = VALUES ? unit_of(most_value, largest[1]) : 1.0f;
    if (thread == 0) {
        to.unit[cloud * (to.padded / kUnit) + index] = unit;
        if (VALUES) to.value_unit[cloud * (to.padded / kUnit) + index] = value_unit;
    }
    const int row = thread / kParts, part = thread % kParts;
    const int64_t point = cloud * to.padded + first + row;
    double square = 0;  // of high high + 2 high low
    for (int c = 2 * part; c < dp; c += 2 * kParts) {
        unsigned high, low;
        const float pair[2] = {u[row * (dp + 1) + c], u[row * (dp + 1) + c + 1]};
        split(pair[0] * inverse, pair[1] * inverse, high, low);
        reinterpret_cast<unsigned*>(to.high + point * dp)[c / 2] = high;
        reinterpret_cast<unsigned*>(to.low + point * dp)[c / 2] = low;
        __half two_high[2], two_low[2];
        std::memcpy(two_high, &high, sizeof high), std::memcpy(two_low, &low, sizeof low);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const double a = double(__half2float(two_high[e])), b = double(__half2float(two_low[e]));
            square += a * (a + 2 * b);
        }
        if constexpr (VALUES) {
            const float by = inverse_power(value_unit);
            split(value(row, c, pair[0]) * by, value(row, c + 1, pair[1]) * by, high, low);
            reinterpret_cast<unsigned*>(to.value_high + point * dp)[c / 2] = high;
            reinterpret_cast<unsigned*>(to.value_low + point * dp)[c / 2] = low;
        }
    }
#pragma unroll
    for (int offset = kParts / 2; offset > 0; offset /= 2) square += __shfl_xor_sync(0xffffffffu, square, offset);
    if (part == 0) {
        const bool there = first + row < n;
        const double far_away = fmax(1e4 / (double(unit) * double(unit)), 1.0);
        float* const pair = to.pairs + point / 2 * 4 + point % 2;
        pair[0] = pair[2] = float(there ? -square / 2 : -far_away);
        to.a[point] = !there ? 0.0f : work.a[own] == nullptr ? 1.0f : work.a[own][cloud * n + first + row];
    }
}

// ---- the sums ----

template <int DP, bool VALUES>
struct Source {  // a tile of sources in shared memory
    using L = Layout<DP, VALUES>;
    __half *high, *low, *value_high, *value_low;
    float *pairs, *a, *unit, *value_unit;

    __device__ Source(unsigned char* memory, int slot) {
        high = reinterpret_cast<__half*>(memory) + slot * L::arrays * L::source, low = high + L::source;
        value_high = VALUES ? low + L::source : high, value_low = VALUES ? value_high + L::source : low;
        pairs = reinterpret_cast<float*>(reinterpret_cast<__half*>(memory) + kStages * L::arrays * L::source) + slot * L::numbers;
        a = pairs + 2 * L::tile, unit = a + L::tile, value_unit = unit + L::units;
    }
};

template <int DP, int ROWS>
__device__ __forceinline__ void bring_rows(__half* to, const __half* from) {  // [ROWS, DP], with a pitch
    constexpr int across = DP / 8, vectors = ROWS * across;  // of 16 bytes
#pragma unroll
    for (int first = 0; first < vectors; first += kThreads) {
        const int k = first + int(threadIdx.x);
        if (vectors % kThreads != 0 && k >= vectors) break;
        __pipeline_memcpy_async(to + k / across * Layout<DP, false>::pitch + k % across * 8, from + k * 8, 16);
    }
}

// PLAIN: one RBF scale and no weights of points. FORCE: also the sums of g u.
template <int DP, bool PLAIN, bool FORCE, bool VALUES>
__device__ __forceinline__ void sum_share(const Work<float>& work, const Points& x, const Points& y, const Share& share) {
    using L = Layout<DP, VALUES>;
    using R = Registers<DP, PLAIN, VALUES>;
    constexpr int kSteps = DP / 16, kGroups = R::groups, kTile = L::tile, kNumbers = 8 * kGroups;
    constexpr bool kShifts = PLAIN && FORCE;
    static_assert(L::piece % (16 * kGroups) == 0);
    constexpr unsigned kAll = 0xffffffffu;
    __shared__ Mixture<float> mixture;
    double* const totals = shared_memory<double>() + threadIdx.x;  // [8 kSteps, threads]
    __half* const targets = shared_memory<__half>();
    unsigned char* const sources = shared_memory<unsigned char>() + L::totals;

    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, d = work.d;
    const int own = share.own;
    const Points &mine = own == 0 ? x : y, &others = own == 0 ? y : x;
    const int64_t cloud = blockIdx.y, i0 = share.row_block * kRows, n = work.n[own];
    const int64_t clouds_block = cloud * work.blocks + blockIdx.x;
    const bool full = work.full[own];
    const int row0 = warp * 16 + lane / 4;  // of this lane's targets; the other is 8 rows on
    const double b0 = work.length(0), outer = PLAIN ? work.weight[0] : 1.0;
    const double per_phi = 1 / (b0 * b0 * work.coordinate_scale()), slope = outer * per_phi;
    if constexpr (!PLAIN) work.fill(mixture);

    const auto load = [&](int k, int slot) {
        const Points& p = k < share.own_count ? mine : others;
        const int64_t at = cloud * p.padded + int64_t(share.tile(k)) * kTile;
        const Source<DP, VALUES> to(sources, slot);
        bring_rows<DP, kTile>(to.high, p.high + at * DP), bring_rows<DP, kTile>(to.low, p.low + at * DP);
        if constexpr (VALUES) {
            bring_rows<DP, kTile>(to.value_high, p.value_high + at * DP);
            bring_rows<DP, kTile>(to.value_low, p.value_low + at * DP);
        }
        const int e = int(threadIdx.x);
        static_assert(3 * kTile / 4 <= kThreads);
        if (e < 3 * kTile / 4) {  // pairs, then a
            __pipeline_memcpy_async(to.pairs + 4 * e, (e < kTile / 2 ? p.pairs + 2 * at : p.a + at - 2 * kTile) + 4 * e, 16);
        }
        if (e < L::units) {
            __pipeline_memcpy_async(to.unit + e, p.unit + at / kUnit + e, 4);
            if constexpr (VALUES) __pipeline_memcpy_async(to.value_unit + e, p.value_unit + at / kUnit + e, 4);
        }
    };
    bring_rows<DP, kRows>(targets, mine.high + (cloud * mine.padded + i0) * DP);
    bring_rows<DP, kRows>(targets + kRows * L::pitch, mine.low + (cloud * mine.padded + i0) * DP);
    __pipeline_commit();
    if (share.count > 0) load(0, 0);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    typename P::Left own_high[kSteps], own_low[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        const int at = warp * 16 * L::pitch + 16 * s;
        P::template load<true>(own_high[s], targets + at, L::pitch);
        P::template load<true>(own_low[s], targets + kRows * L::pitch + at, L::pitch);
    }
    __syncthreads();
    if constexpr (FORCE) {
        for (int e = 0; e < 8 * kSteps; ++e) totals[e * kThreads] = 0;
    }

    // What is in 16 bits is g times 2^shift, or times a factor.
    const float own_unit = mine.unit[(cloud * mine.padded + i0) / kUnit];
    float minus_h[2], factor[2] = {0x1p126f, 0x1p126f};
    int shift[2] = {kShifts ? kFirstShift : 0, kShifts ? kFirstShift : 0};
    const auto start_at_shift = [&](int half) {
        const int64_t point = cloud * mine.padded + i0 + row0 + 8 * half;
        minus_h[half] = mine.pairs[point / 2 * 4 + point % 2] * own_unit * own_unit + float(shift[half]);
    };
    start_at_shift(0), start_at_shift(1);
    double A[2] = {}, G[2] = {}, energy = 0;
    typename P::Sums sum[FORCE ? kSteps : 1] = {};
    double back = 0;  // what the sums are to be multiplied with
    const auto flush = [&] {
#pragma unroll
        for (int e = 0; e < 8 * kSteps; ++e) {
            float& part = sum[e / 8].x[e % 8 / 4][e % 4];
            const int half = e % 4 / 2;
            totals[e * kThreads] += back * double(part * (kShifts ? exact_power(-shift[half]) : inverse_power(factor[half])));
            part = 0;
        }
    };

    for (int k = 0; k < share.count; ++k) {
        const int slot = k % kStages;
        __pipeline_wait_prior(0);
        __syncthreads();  // what all have brought is there, and all are done with the other slot
        if (k + 1 < share.count) load(k + 1, 1 - slot);
        __pipeline_commit();

        const Source<DP, VALUES> source(sources, slot);
        const bool within = k < share.own_count;
        const int ahead = share.tile(k) * kTile - int(i0);  // of the first target, if they are of one cloud
        const double w = within ? work.within[own] : work.between, times = within ? (full ? 1.0 : 2.0) : work.share_of_other;
        double A_tile[2] = {}, G_tile[2] = {};  // A times 2^shift
        if (FORCE && k % (kGroup / kTile) == 0) flush();

        // 16 kGroups sources. CAREFUL: some may be hidden, of another unit, or so far away that rounding moves t beyond 0.
        const auto add_sources = [&](int first, float unit, auto careful) {
            constexpr bool CAREFUL = decltype(careful)::value;
            const float units = own_unit * unit;
            float phi[kNumbers], g[kNumbers];  // of one scale g is phi
            [[maybe_unused]] float top[2] = {}, A_here[2], G_here[2] = {};  // near equal numbers: few in float
            const auto eight_of = [](int e) { return e / 4; };
            const auto column_of = [&](int e) { return eight_of(e) * 8 + lane % 4 * 2 + e % 2; };
            const auto of_row = [&](float x) {  // the largest of the four lanes of a target
                x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
                return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
            };
            for (;;) {  // again with another shift where it was too large; now t has all its digits
                typename P::Sums dots[kGroups];
#pragma unroll
                for (int s = 0; s < kSteps; ++s) {
#pragma unroll
                    for (int g = 0; g < kGroups; ++g) {
                        typename P::Right right_high, right_low;
                        const int at = (first + 16 * g) * L::pitch + 16 * s;
                        P::template load<false>(right_high, source.high + at, L::pitch);
                        P::template load<false>(right_low, source.low + at, L::pitch);
                        typename P::Sums part = {};
                        if constexpr (!CAREFUL) {
                            if (s == 0) {
#pragma unroll
                                for (int eight = 0; eight < 2; ++eight) {
                                    const float* const pair = source.pairs + 2 * (first + 16 * g + 8 * eight) + lane % 4 * 4;
                                    const float4 both = *reinterpret_cast<const float4*>(pair);
                                    part.x[eight][0] = both.x, part.x[eight][1] = both.y;
                                    part.x[eight][2] = both.z, part.x[eight][3] = both.w;
                                }
                            }
                        }
                        P::add(part, own_low[s], right_high);
                        P::add(part, own_high[s], right_low);
                        P::add(part, own_high[s], right_high);
#pragma unroll
                        for (int e = 0; e < 8; ++e) {
                            float& number = dots[g].x[e / 4][e % 4];
                            number = s == 0 ? part.x[e / 4][e % 4] : number + part.x[e / 4][e % 4];
                        }
                    }
                }
#pragma unroll
                for (int e = 0; e < kNumbers; ++e) {
                    const int half = e % 4 / 2, at = first + column_of(e);
                    float t = fmaf(dots[e / 8].x[eight_of(e) % 2][e % 4], units, minus_h[half]);
                    if constexpr (CAREFUL) t += source.pairs[at / 2 * 4 + at % 2] * unit * unit;
                    if constexpr (CAREFUL || !PLAIN) t = minimum_or_nan(t, float(shift[half]));
                    phi[e] = PLAIN ? power_of_2(t) : t;
                }
                if constexpr (!PLAIN) {
                    float t[kNumbers];
#pragma unroll
                    for (int e = 0; e < kNumbers; ++e) t[e] = phi[e];
                    radial_of<kNumbers>(t, work, mixture, phi, g);
                }
                for (float& x : A_here) x = 0;
#pragma unroll
                for (int e = 0; e < kNumbers; ++e) {
                    const int half = e % 4 / 2;
                    if constexpr (!PLAIN) {
                        const float a = source.a[first + column_of(e)];
                        phi[e] *= a, g[e] *= a;
                    }
                    if constexpr (CAREFUL) {
                        const int own_row = row0 + 8 * half, other = ahead + first + column_of(e);
                        if (within && (full ? other == own_row : other <= own_row)) phi[e] = g[e] = 0.0f;
                    }
                    A_here[half] += phi[e];
                    if constexpr (FORCE && !PLAIN) {
                        G_here[half] += g[e];
                        top[half] = fmaxf(top[half], fabsf(g[e]));
                    }
                }
                bool over = false;
                if constexpr (kShifts) over = __any_sync(kAll, A_here[0] > kLargest || A_here[1] > kLargest);
                if (!over) break;
                flush();
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float most = 0;
#pragma unroll
                    for (int e = 2 * half; e < kNumbers; e += e % 2 == 0 ? 1 : 3) most = fmaxf(most, phi[e]);
                    most = of_row(most);
                    if (!(of_row(A_here[half]) > kLargest)) continue;
                    const int less = int(__float_as_uint(most) >> 23) - 127 - 1;  // for g between 2 and 4
                    A_tile[half] *= double(exact_power(-less));
                    shift[half] -= less;
                    start_at_shift(half);
                    minus_h[half] += most - most;  // infinity becomes NaN, and the loop ends
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                A_tile[half] += double(A_here[half]);
                if constexpr (FORCE && !PLAIN) G_tile[half] += double(G_here[half]);
            }
            if constexpr (FORCE && !PLAIN) {
                bool over = false;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    top[half] = of_row(top[half]);
                    over = over || top[half] * factor[half] > kLargest;
                }
                if (__any_sync(kAll, over)) {
                    flush();
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        if (top[half] * factor[half] <= kLargest) continue;
                        factor[half] = inverse_power(power_below(fminf(top[half], 0x1p126f)) * 0x1p-13f);
                    }
                }
            }
            if constexpr (FORCE) {
                typename P::Left high[kGroups], low[kGroups];
#pragma unroll
                for (int k = 0; k < 4 * kGroups; ++k) {  // (row, source) = (0, 0), (8, 0), (0, 8), (8, 8)
                    const int r = k % 4, e = k / 4 * 8 + r / 2 * 4 + r % 2 * 2;
                    const float by = PLAIN ? 1.0f : factor[r % 2];
                    const float* const numbers = PLAIN ? phi : g;
                    split(numbers[e] * by, numbers[e + 1] * by, high[k / 4].r[r], low[k / 4].r[r]);
                }
#pragma unroll
                for (int c = 0; c < kSteps; ++c) {
                    typename P::Sums part = {};
#pragma unroll
                    for (int g = 0; g < kGroups; ++g) {
                        typename P::Right right_high, right_low;
                        const int at = (first + 16 * g) * L::pitch + 16 * c;
                        P::template load<true>(right_high, source.value_high + at, L::pitch);
                        P::template load<true>(right_low, source.value_low + at, L::pitch);
                        P::add(part, low[g], right_high);
                        P::add(part, high[g], right_low);
                        P::add(part, high[g], right_high);
                    }
#pragma unroll
                    for (int e = 0; e < 8; ++e) sum[c].x[e / 4][e % 4] += part.x[e / 4][e % 4];
                }
            }
        };
        const bool overlaps = within && ahead < kRows && ahead > -kTile;
#pragma unroll 1
        for (int piece = 0; piece < L::units; ++piece) {
            const float unit = source.unit[piece];
            if constexpr (FORCE) {
                const double now = VALUES ? double(source.value_unit[piece]) : w * slope * double(unit);
                if (now != back) flush();
                back = now;
            }
            const bool careful = overlaps || unit != own_unit || float(DP) * 0x1p28f * unit * unit > kSmallSquare;
#pragma unroll 1
            for (int first = piece * L::piece; first < (piece + 1) * L::piece; first += 16 * kGroups) {
                careful ? add_sources(first, unit, std::true_type()) : add_sources(first, unit, std::false_type());
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const double potential = w * outer * (kShifts ? double(exact_power(-shift[half])) * A_tile[half] : A_tile[half]);
            const int64_t row = i0 + row0 + 8 * half;
            energy += times * potential * double(row < n ? (PLAIN ? 1.0f : mine.a[cloud * mine.padded + row]) : 0.0f);
            A[half] += potential;
            if constexpr (FORCE && !PLAIN) G[half] += w * slope * G_tile[half];
        }
    }
    __pipeline_wait_prior(0);
    if constexpr (FORCE) flush();

    __shared__ double energy_of_warp[kWarps];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) energy += __shfl_xor_sync(kAll, energy, offset);
    if (lane == 0) energy_of_warp[warp] = energy;
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0;
        for (int k = 0; k < kWarps; ++k) sum += energy_of_warp[k];
        work.energies[clouds_block] = sum;
    }
    if (!full) return;
    const bool alone = work.segments[own] == 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + 8 * half;
        double of_lanes[2] = {A[half], PLAIN ? A[half] * per_phi : G[half]};
#pragma unroll
        for (double& x : of_lanes) x += __shfl_xor_sync(kAll, x, 1), x += __shfl_xor_sync(kAll, x, 2);
        const int64_t point = i0 + row;
        if (point >= n) continue;
        const auto put = [&](int c, double value) {  // c < d: of the force; c = d: the potential
            if (!alone) work.partials[(clouds_block * kRows + row) * (d + 1) + c] = float(value);
            else if (c == d && work.potential[own] != nullptr) work.potential[own][cloud * n + point] = float(value);
            else if (c < d && work.force[own] != nullptr) work.force[own][(cloud * n + point) * d + c] = float(value);
        };
        if (lane % 4 == 0) put(d, of_lanes[0]);
        if constexpr (FORCE) {
            const float weight = PLAIN ? 1.0f : mine.a[cloud * mine.padded + point];
#pragma unroll
            for (int s = 0; s < 4 * kSteps; ++s) {
                const int c = s / 2 * 8 + lane % 4 * 2 + s % 2;
                if (c >= d) continue;
                const int64_t at = (cloud * mine.padded + point) * DP + c;
                const double u = double(own_unit) * (double(__half2float(mine.high[at])) + double(__half2float(mine.low[at])));
                const int number = s / 2 * 4 + 2 * half + s % 2;
                put(c, double(weight) * (totals[number * kThreads] - of_lanes[1] * u));
            }
        }
    }
}

template <int DP, bool PLAIN, bool FORCE, bool VALUES>
__global__ void __launch_bounds__(kThreads, Registers<DP, PLAIN, VALUES>::blocks)
    products_kernel(const __grid_constant__ Work<float> work, const __grid_constant__ Points x,
                    const __grid_constant__ Points y) {
    const Share share(work, blockIdx.x, kRows, Layout<DP, VALUES>::tile);
    if constexpr (FORCE) {
        if (work.force[share.own] != nullptr) return sum_share<DP, PLAIN, true, VALUES>(work, x, y, share);
    }
    sum_share<DP, PLAIN, false, VALUES>(work, x, y, share);
}

// The energies of the blocks, by the first block of a cloud; and the segments, point by point.
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const __grid_constant__ Work<float> work) {
    const int64_t cloud = blockIdx.y;
    const int d = work.d;
    if (blockIdx.x == 0 && work.wants_energy) {
        __shared__ double of_warp[kGatherThreads / 32];
        double sum = 0;
        for (int64_t k = threadIdx.x; k < work.blocks; k += kGatherThreads) sum += work.energies[cloud * work.blocks + k];
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            sum = 0;
            for (double of_one : of_warp) sum += of_one;
            work.put_energy(cloud, sum);
        }
    }
    int64_t first_block = 0;
#pragma unroll
    for (int own = 0; own < 2; ++own) {
        const int64_t n = work.n[own], segments = work.segments[own];
        const int64_t warp = (int64_t(blockIdx.x) * kGatherThreads + threadIdx.x) / 32, warps = gridDim.x * (kGatherThreads / 32);
        for (int64_t point = warp; work.full[own] && segments > 1 && point < n; point += warps) {
            const int64_t first = cloud * work.blocks + first_block + point / kRows * segments;
            for (int c = int(threadIdx.x) % 32; c <= d; c += 32) {
                double sum = 0;
#pragma unroll 4
                for (int64_t s = 0; s < segments; ++s) {
                    sum += double(work.partials[((first + s) * kRows + point % kRows) * (d + 1) + c]);
                }
                if (c == d && work.potential[own] != nullptr) work.potential[own][cloud * n + point] = float(sum);
                if (c < d && work.force[own] != nullptr) work.force[own][(cloud * n + point) * d + c] = float(sum);
            }
        }
        first_block += work.row_blocks[own] * segments;
    }
}

// ---- the launches ----

struct Plan {
    Work<float> work;
    int64_t clouds, padded[2];
    int dp;
    bool plain, values;

    Plan(const PairwiseProblem<float>& q, int64_t clouds, int processors, const Affine<float>& affine) : clouds(clouds) {
        dp = int(q.d + 15) / 16 * 16;
        if (dp == 112) dp = 128;
        plain = q.radial.rbf && q.radial.weight.size() == 1 && q.a == nullptr && q.b == nullptr;
        values = q.v != nullptr;
        const int64_t tile = tile_of(dp, values), multiple = std::max<int64_t>(tile, kUnit);
        work = work_of(q, clouds, kRows, tile, processors * kBlocksPerProcessor, kLeastSources / tile,
                       processors * blocks_at_once(dp, plain && !values), affine);
        for (int k = 0; k < 2; ++k) padded[k] = (work.n[k] + multiple - 1) / multiple * multiple;
    }
    // Divides memory, or counts how much it takes.
    size_t place(char* memory, Prepared (&to)[2]) {
        size_t used = 0;
        const auto take = [&](auto*& pointer, int64_t count) {
            using T = std::remove_reference_t<decltype(*pointer)>;
            pointer = reinterpret_cast<T*>(memory + used);
            used += round_up(count * int64_t(sizeof(T)));
        };
        take(work.energies, clouds * work.blocks);
        work.partials = reinterpret_cast<float*>(memory + used);
        used += partial_bytes(work, clouds, kRows);
        for (int k = 0; k < 2; ++k) {
            const int64_t points = clouds * padded[k];
            to[k] = {};
            to[k].padded = padded[k];
            take(to[k].high, points * dp), take(to[k].low, points * dp), take(to[k].pairs, 2 * points), take(to[k].a, points);
            take(to[k].unit, points / kUnit);
            if (!values) continue;
            take(to[k].value_high, points * dp), take(to[k].value_low, points * dp);
            take(to[k].value_unit, points / kUnit);
        }
        return used;
    }
};

template <typename Kernel, typename... Arguments>
cudaError_t start(Kernel* kernel, int64_t blocks, int64_t clouds, int threads, size_t shared, cudaStream_t stream,
                  const Arguments&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks), unsigned(clouds), 1);
    config.blockDim = dim3(unsigned(threads), 1, 1);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    if (shared > 48 << 10) {  // else another thread's launch of more might come between
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (error != cudaSuccess) return error;
    }
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <int DP>
cudaError_t sum(const Plan& p, const Points& x, const Points& y, cudaStream_t stream) {
    const bool force = p.work.force[0] != nullptr || p.work.force[1] != nullptr;
    const auto launch = [&](auto plain, auto forces, auto values) {
        constexpr bool kValues = decltype(values)::value;
        return start(products_kernel<DP, decltype(plain)::value, decltype(forces)::value, kValues>, p.work.blocks, p.clouds,
                     kThreads, Layout<DP, kValues>::bytes, stream, p.work, x, y);
    };
    using Yes = std::true_type;
    using No = std::false_type;
    if (p.values) return launch(Yes(), Yes(), Yes());
    if (p.plain) return force ? launch(Yes(), Yes(), No()) : launch(Yes(), No(), No());
    return force ? launch(No(), Yes(), No()) : launch(No(), No(), No());
}

}  // namespace

size_t pairwise_products_workspace(const PairwiseProblem<float>& problem, int64_t clouds, int processors,
                                   const Affine<float>& affine) {
    Prepared to[2];
    return Plan(problem, clouds, processors, affine).place(nullptr, to);
}

const char* pairwise_products(const PairwiseProblem<float>& problem, int64_t clouds, const double* lengths,
                              void* workspace, int processors, void* stream_of_caller, const Affine<float>& affine) {
    const cudaStream_t stream = static_cast<cudaStream_t>(stream_of_caller);
    Plan p(problem, clouds, processors, affine);
    if (p.work.blocks == 0) return nullptr;
    Prepared to[2];
    p.place(static_cast<char*>(workspace), to);
    p.work.lengths = lengths;
    const size_t shared = size_t(p.dp) * sizeof(double) + size_t(kUnit) * (p.dp + 1) * sizeof(float);
    cudaError_t error = start(p.values ? prepare_kernel<true> : prepare_kernel<false>,
                              (p.padded[0] + p.padded[1]) / kUnit, clouds, kPrepareThreads, shared, stream, p.work, p.dp,
                              to[0], to[1]);
    const auto points = [](const Prepared& t) {
        const bool values = t.value_high != nullptr;
        return Points{t.high, t.low, values ? t.value_high : t.high, values ? t.value_low : t.low,
                      t.pairs, t.a, t.unit, t.value_unit, t.padded};
    };
    const Points x = points(to[0]), y = points(to[1]);
    if (error == cudaSuccess) {
        switch (p.dp) {
            case 16: error = sum<16>(p, x, y, stream); break;
            case 32: error = sum<32>(p, x, y, stream); break;
            case 48: error = sum<48>(p, x, y, stream); break;
            case 64: error = sum<64>(p, x, y, stream); break;
            case 80: error = sum<80>(p, x, y, stream); break;
            case 96: error = sum<96>(p, x, y, stream); break;
            default: error = sum<128>(p, x, y, stream);
        }
    }
    if (error == cudaSuccess) {
        const int64_t points = p.work.n[0] + p.work.n[1];
        const bool parts = partial_bytes(p.work, 1, 1) > 0;
        const int64_t blocks = parts ? std::min<int64_t>(1 + points * 32 / kGatherThreads, 8 * processors) : 1;
        error = start(gather_kernel, blocks, clouds, kGatherThreads, 0, stream, p.work);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace infovae_fast
