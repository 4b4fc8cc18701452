// Energy and force on a GPU, for points that fit in registers: value and gradient in one launch.
//
// The formulas are those of csrc/cpu/pairwise.cpp: coordinates are centred and scaled, t = u_i.u_j - h_i - h_j is the
// exponent, F_i = -w slope [(sum_j a_j g_ij) u_i - sum_j g_ij a_j u_j] + sum_j phi_ij v_j.
//
// A block owns 32 R targets, R for each lane, and a segment of the sources, in tiles of 128: first those of its own
// cloud, then the other's. Its four warps share the sources of a tile. A tile is summed in T, the tiles in double. The
// last block of a row of segments adds them up in their order and the very last one the energies, so that the bits do
// not depend on which block comes last.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "pairwise.h"

namespace infovae_fast {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kTile = kThreads;      // sources in shared memory at once: each thread brings one
constexpr int kMaxScales = 32;
constexpr int kSample = 64;          // points whose mean is the centre; any point near the cloud would do
constexpr int kBlocksPerProcessor = 8;  // wanted, so that the last ones to run cost little
constexpr int kManyTargets = 8192;   // from here on, four targets a lane: each source is read once for four
constexpr int kManyMaxDim = 10;      // if the registers hold them

#ifdef __CUDACC__
template <typename T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return reinterpret_cast<T*>(bytes);
}
#endif

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

__device__ __forceinline__ float reciprocal(float x) {  // of a normal number; a division would call a subroutine
#ifdef __CUDA_ARCH__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y + y * (1.0f - x * y);
#else
    return 1.0f / x;
#endif
}
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// log2(1 + u), u > -1/2: 1 + u = 2^e m with m in [sqrt(1/2), sqrt(2)); log2 m = s Q(s^2), s = (m - 1) / (m + 1).
__device__ __forceinline__ float log2_1p(float u) {
    const float x = 1.0f + u, lost = u - (x - 1.0f);
    const int bits = __float_as_int(x), e = (bits - 0x3f3504f3) >> 23;
    const float m = __int_as_float(bits - (e << 23)), s = (m - 1.0f) * reciprocal(m + 1.0f), q = s * s;
    const float Q = 2.88539007978892671f + q * (0.961798847641742934f + q * (0.576714383962467901f + q * 0.431735879207038553f));
    return float(e) + (s * Q + 1.44269504f * lost * reciprocal(x)) + (x - x);  // NaN and infinity become NaN
}
__device__ __forceinline__ double log2_1p(double u) { return 1.4426950408889634074 * log1p(u); }

template <typename T>
struct Mixture {  // in units of the first scale
    T rate[kMaxScales], rate_by_alpha[kMaxScales], weight[kMaxScales], weighted_rate[kMaxScales];
};

template <typename T>
struct Work {
    // The problem; [2] is x and y. Of several clouds the arrays follow one another.
    const T *z[2], *v, *a[2];
    int64_t n[2];
    int d;
    bool rbf;
    int scales;
    double bandwidth[kMaxScales], weight[kMaxScales], alpha;
    const double* lengths;       // bandwidths in the memory of the GPU, or null
    double within[2], between;   // w_xx and w_yy, w_xy
    T *force[2], *potential[2];
    double* energy;
    // The division of the work.
    bool full[2];                // rows need forces or potentials: all sources, else each pair of the cloud once
    bool sees_other[2];          // the sources of the other cloud too
    double share_of_other;       // how often such a pair counts in the energy
    int64_t tiles[2], row_blocks[2], segments[2], tiles_a_segment, blocks;
    unsigned* counters;          // of each row of segments, and of all of them
    double *energies, *partials; // [blocks], [blocks, 32 R, D + 1]
};

template <typename T, int DP>
struct Layout {
    static constexpr int stride = (DP + 2 + 3) / 4 * 4;  // a source in shared memory: u, h, a
};

template <typename T>
struct alignas(16) Quad {
    T at[16 / sizeof(T)];
};

template <typename T, int count>
__device__ __forceinline__ void load_row(const T* from, T (&to)[count]) {
    constexpr int width = 16 / sizeof(T);
    static_assert(count % width == 0);
#pragma unroll
    for (int k = 0; k < count / width; ++k) {
        const Quad<T> quad = reinterpret_cast<const Quad<T>*>(from)[k];
#pragma unroll
        for (int l = 0; l < width; ++l) to[k * width + l] = quad.at[l];
    }
}

// phi and g of the exponent. ONE: a single RBF scale, whose weight is applied later; g is phi.
template <typename T, bool ONE>
__device__ __forceinline__ void radial_of(T t, const Work<T>& work, const Mixture<T>& mixture, T& phi, T& g) {
    if constexpr (ONE) {
        phi = g = power_of_2(t);
    } else {
        phi = g = T(0);
        for (int s = 0; s < work.scales; ++s) {
            T p, slope;
            if (work.rbf) {
                p = slope = power_of_2(t * mixture.rate[s]);
            } else {
                const T u = -t * mixture.rate_by_alpha[s], inverse = reciprocal(T(1) + u);
                p = work.alpha == 1 ? inverse : power_of_2(T(-work.alpha) * log2_1p(u));
                slope = p * inverse;
            }
            phi += p * mixture.weight[s];
            g += slope * mixture.weighted_rate[s];
        }
    }
}

// R targets of a lane, and what they have summed over a tile.
template <typename T, int DP, int R>
struct Targets {
    T u[R][DP], h[R];
    T A[R], G[R], S[R][DP];
};

// One source after the other, of those of this warp. MASK: without source `diagonal`, the first target itself, and so
// on for the other targets; `upper`: without those before it, too.
template <bool ONE, bool WITH_V, bool FORCE, bool MASK, typename T, int DP, int R>
__device__ __forceinline__ void sum_tile(const Work<T>& work, const Mixture<T>& mixture, const T* tile, const T* v_tile,
                                         T gain, int diagonal, bool upper, Targets<T, DP, R>& x) {
    constexpr int stride = Layout<T, DP>::stride;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        x.A[r] = x.G[r] = T(0);
#pragma unroll
        for (int c = 0; c < DP; ++c) x.S[r][c] = T(0);
    }
#pragma unroll 2
    for (int k = 0; k < kTile / kWarps; ++k) {
        T source[stride], v[stride];
        load_row<T, stride>(tile + k * stride, source);
        if constexpr (WITH_V) load_row<T, stride>(v_tile + k * stride, v);
        const T h = source[DP], a = source[DP + 1];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            T t = -(x.h[r] + h), phi, g;
#pragma unroll
            for (int c = 0; c < DP; ++c) t += x.u[r][c] * source[c];
            radial_of<T, ONE>(t, work, mixture, phi, g);
            if constexpr (MASK) {
                const int self = diagonal + 32 * r;
                if (upper ? k <= self : k == self) phi = g = T(0);
            }
            x.A[r] += phi * a;
            if constexpr (FORCE) {
                g *= WITH_V ? a * gain : a;
                x.G[r] += g;
#pragma unroll
                for (int c = 0; c < DP; ++c) x.S[r][c] += g * source[c];
                if constexpr (WITH_V) {
#pragma unroll
                    for (int c = 0; c < DP; ++c) x.S[r][c] += phi * v[c];
                }
            }
        }
    }
}

// Whether all the other blocks that count here are done; what they wrote is then there to read.
__device__ __forceinline__ bool last_of(unsigned* counter, int64_t blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(counter, 1u) + 1 == unsigned(blocks);
    __syncthreads();
    __threadfence();
    return last;
}

template <typename T, int DP, int R, bool ONE, bool WITH_V>
__global__ void __launch_bounds__(kThreads, DP == 10 ? 3 : 2) pairwise_kernel(const __grid_constant__ Work<T> work) {
    constexpr int stride = Layout<T, DP>::stride, rows = 32 * R, sums = DP + 2;  // sums: A, G, S
    __shared__ Mixture<T> mixture;
    __shared__ double centre[DP], energy_of_warp[kWarps];
    double* total = shared_memory<double>();  // [R, sums, threads]
    T* tile = reinterpret_cast<T*>(total + R * sums * kThreads);
    T* v_tile = tile + kTile * stride;

    const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32, d = work.d;
    const int64_t cloud = blockIdx.y, first = work.row_blocks[0] * work.segments[0];
    const int own = int64_t(blockIdx.x) < first ? 0 : 1, other = 1 - own;
    const unsigned block = blockIdx.x - (own == 0 ? 0u : unsigned(first)), segments = unsigned(work.segments[own]);
    const int64_t row_block = block / segments, segment = block % segments;
    const int64_t i0 = row_block * rows, n = work.n[own], clouds_block = cloud * work.blocks + blockIdx.x;
    const bool force = work.force[own] != nullptr, full = work.full[own];

    const auto coordinate = [&](int k, int64_t at, int c) { return double(work.z[k][(cloud * work.n[k] + at) * d + c]); };

    // The mean of a sample of both clouds, the same in all blocks.
    const int64_t points = work.n[0] + work.n[1], sample = points < kSample ? points : kSample;
    for (int c = warp; c < DP; c += kWarps) {
        double sum = 0;
        for (int64_t k = lane; c < d && k < sample; k += 32) {
            const int64_t at = points < kSample ? k : k * points / kSample;
            sum += at < work.n[0] ? coordinate(0, at, c) : coordinate(1, at - work.n[0], c);
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (lane == 0) centre[c] = sum / double(sample);
    }
    const double b0 = work.lengths != nullptr ? work.lengths[0] : work.bandwidth[0];
    for (int s = thread; s < work.scales; s += kThreads) {
        const double ratio = b0 / (work.lengths != nullptr ? work.lengths[s] : work.bandwidth[s]), r = ratio * ratio;
        mixture.rate[s] = T(r);
        mixture.rate_by_alpha[s] = T(r / work.alpha);
        mixture.weight[s] = T(work.weight[s]);
        mixture.weighted_rate[s] = T(work.weight[s] * r);
    }
    __syncthreads();
    const double scale = (work.rbf ? sqrt(1.4426950408889634074) : 1.0) / b0;
    const double outer = ONE ? work.weight[0] : 1.0, slope = outer / (b0 * b0 * scale);

    // u, h and the weight of a point; zeros behind the end.
    const auto bring = [&](int k, int64_t at, T* u, T& h, T& weight) {
        double square = 0;
#pragma unroll
        for (int c = 0; c < DP; ++c) {
            u[c] = at < work.n[k] && c < d ? T((coordinate(k, at, c) - centre[c]) * scale) : T(0);
            square += double(u[c]) * double(u[c]);
        }
        h = T(square / 2);
        weight = at >= work.n[k] ? T(0) : work.a[k] == nullptr ? T(1) : work.a[k][cloud * work.n[k] + at];
    };
    Targets<T, DP, R> x;
    T own_weight[R];
#pragma unroll
    for (int r = 0; r < R; ++r) bring(own, i0 + 32 * r + lane, x.u[r], x.h[r], own_weight[r]);
    for (int k = 0; k < R * sums; ++k) total[k * kThreads + thread] = 0;
    double energy = 0;

    const int64_t own_tiles = work.tiles[own], all_tiles = own_tiles + (work.sees_other[own] ? work.tiles[other] : 0);
    const int64_t begin = segment * work.tiles_a_segment, stop = begin + work.tiles_a_segment;
    const int64_t end = stop < all_tiles ? stop : all_tiles;
    for (int64_t k = begin; k < end; ++k) {
        const bool within = k < own_tiles;
        const int64_t j0 = (within ? k : k - own_tiles) * kTile;
        const bool overlaps = within && j0 < i0 + rows && i0 < j0 + kTile;
        if (within && !full && j0 + kTile <= i0) continue;  // these pairs are another block's
        __syncthreads();
        {
            T* at = tile + thread * stride;
            bring(within ? own : other, j0 + thread, at, at[DP], at[DP + 1]);
            if constexpr (WITH_V) {
                const int64_t j = j0 + thread;
                for (int c = 0; c < DP; ++c) {
                    const bool there = within && own == 0 && j < n && c < d;
                    v_tile[thread * stride + c] = there ? T(outer) * work.v[(cloud * n + j) * d + c] : T(0);
                }
            }
        }
        __syncthreads();
        const double w = within ? work.within[own] : work.between;
        const int mine = warp * (kTile / kWarps);
        const auto sum = [&](auto forces, auto masks) {
            sum_tile<ONE, WITH_V, decltype(forces)::value, decltype(masks)::value>(
                work, mixture, tile + mine * stride, v_tile + mine * stride, T(w * slope), int(i0 - j0) + lane - mine, !full, x);
        };
        using Yes = std::true_type;
        using No = std::false_type;
        if (force) {
            overlaps ? sum(Yes(), Yes()) : sum(Yes(), No());
        } else {
            overlaps ? sum(No(), Yes()) : sum(No(), No());
        }
        const double share = within ? (full ? 1.0 : 2.0) : work.share_of_other, after = WITH_V ? 1.0 : w * slope;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            double* at = total + r * sums * kThreads + thread;
            const double potential = w * outer * double(x.A[r]);
            energy += share * potential * double(own_weight[r]);
            at[0] += potential;
            if (force) {
                at[kThreads] += (WITH_V ? 1.0 : after) * double(x.G[r]);
#pragma unroll
                for (int c = 0; c < DP; ++c) at[(2 + c) * kThreads] += after * double(x.S[r][c]);
            }
        }
    }

    // The four warps, then the segments, then the blocks.
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) energy += __shfl_xor_sync(0xffffffffu, energy, offset);
    if (lane == 0) energy_of_warp[warp] = energy;
    __syncthreads();
    if (thread == 0) {
        double sum = 0;
        for (int k = 0; k < kWarps; ++k) sum += energy_of_warp[k];
        work.energies[clouds_block] = sum;
    }
    const bool alone = work.segments[own] == 1;
    const auto put = [&](int row, int c, double value) {  // c < d: of the force; c = d: the potential
        const int64_t at = cloud * n + i0 + row;
        if (i0 + row >= n) return;
        if (c == d && work.potential[own] != nullptr) work.potential[own][at] = T(value);
        if (c < d && force) work.force[own][at * d + c] = T(value);
    };
    double* partial = work.partials + clouds_block * rows * (d + 1);
    if (full) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (r % kWarps != warp) continue;
            const auto of_warps = [&](int k) {
                double sum = 0;
                for (int other_warp = 0; other_warp < kWarps; ++other_warp) {
                    sum += total[(r * sums + k) * kThreads + other_warp * 32 + lane];
                }
                return sum;
            };
            const int row = 32 * r + lane;
            const double g = of_warps(1);
#pragma unroll
            for (int c = 0; c <= DP; ++c) {  // not to d: u must stay in registers
                if (c > d) continue;
                const double value = c == d ? of_warps(0)
                                            : double(own_weight[r]) * (of_warps(2 + c) - g * double(x.u[r][c < DP ? c : 0]));
                if (alone) put(row, c, value);
                else partial[row * (d + 1) + c] = value;
            }
        }
    }
    const int64_t row_counter = (own == 0 ? 0 : work.row_blocks[0]) + row_block;
    unsigned* counters = work.counters + cloud * (work.row_blocks[0] + work.row_blocks[1] + 1);
    if (!alone) {
        if (!last_of(counters + row_counter, work.segments[own])) return;
        const double* partials = partial - segment * rows * (d + 1);
        for (int k = thread; full && k < rows * (d + 1); k += kThreads) {
            double sum = 0;
            for (int64_t s = 0; s < work.segments[own]; ++s) sum += partials[s * rows * (d + 1) + k];
            put(k / (d + 1), k % (d + 1), sum);
        }
    }
    if (work.energy == nullptr) return;
    const int64_t row_blocks = work.row_blocks[0] * (work.segments[0] > 0) + work.row_blocks[1] * (work.segments[1] > 0);
    if (!last_of(counters + work.row_blocks[0] + work.row_blocks[1], row_blocks)) return;
    double sum = 0;
    for (int64_t k = thread; k < work.blocks; k += kThreads) sum += work.energies[cloud * work.blocks + k];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) energy_of_warp[warp] = sum;
    __syncthreads();
    if (thread == 0) {
        sum = 0;
        for (int k = 0; k < kWarps; ++k) sum += energy_of_warp[k];
        work.energy[cloud] = sum;
    }
}

template <typename T>
struct Plan {
    Work<T> work{};
    bool many;
    int64_t clouds;
    size_t counter_bytes, energy_bytes, partial_bytes;
    size_t bytes() const { return counter_bytes + energy_bytes + partial_bytes; }
};

template <typename T>
Plan<T> plan(const PairwiseProblem<T>& q, int64_t clouds, int processors) {
    Plan<T> p;
    Work<T>& w = p.work;
    p.clouds = clouds;
    w.z[0] = q.x, w.z[1] = q.y, w.v = q.v, w.a[0] = q.a, w.a[1] = q.b;
    w.n[0] = q.n, w.n[1] = q.y == nullptr ? 0 : q.m, w.d = int(q.d);
    w.rbf = q.radial.rbf, w.scales = int(q.radial.weight.size()), w.alpha = q.radial.alpha;
    const auto copy = [](const std::vector<double>& from, double* to) {  // more than fit are refused before the launch
        std::copy_n(from.begin(), std::min<size_t>(from.size(), kMaxScales), to);
    };
    copy(q.radial.bandwidth, w.bandwidth), copy(q.radial.weight, w.weight);
    w.within[0] = q.w_xx, w.within[1] = q.w_yy, w.between = q.w_xy;
    w.force[0] = q.x_force, w.force[1] = q.y_force, w.potential[0] = q.x_potential, w.potential[1] = q.y_potential;
    w.energy = q.energy;

    p.many = sizeof(T) == 4 && q.v == nullptr && q.d <= kManyMaxDim && std::max(w.n[0], w.n[1]) * clouds >= kManyTargets;
    const int64_t rows = !p.many ? 32 : w.rbf && w.scales == 1 ? 128 : 64;
    const bool energy = q.energy != nullptr, both = w.n[1] > 0;
    for (int k = 0; k < 2; ++k) {
        w.full[k] = w.force[k] != nullptr || w.potential[k] != nullptr;
        w.tiles[k] = (w.n[k] + kTile - 1) / kTile;
    }
    w.sees_other[0] = both && (w.full[0] || (energy && !w.full[1]));
    w.sees_other[1] = both && w.full[1];
    w.share_of_other = w.sees_other[0] && w.sees_other[1] ? 1 : 2;
    int64_t all_tiles[2], work_tiles = 0;
    for (int k = 0; k < 2; ++k) {
        const bool wanted = w.n[k] > 0 && (w.full[k] || energy);
        w.row_blocks[k] = wanted ? (w.n[k] + rows - 1) / rows : 0;
        all_tiles[k] = wanted ? w.tiles[k] + (w.sees_other[k] ? w.tiles[1 - k] : 0) : 0;
        work_tiles += w.row_blocks[k] * all_tiles[k] * clouds;
    }
    const int64_t wanted_blocks = int64_t(processors) * kBlocksPerProcessor;
    w.tiles_a_segment = std::max<int64_t>(1, (work_tiles + wanted_blocks - 1) / wanted_blocks);
    w.blocks = 0;
    for (int k = 0; k < 2; ++k) {
        w.segments[k] = (all_tiles[k] + w.tiles_a_segment - 1) / w.tiles_a_segment;
        w.blocks += w.row_blocks[k] * w.segments[k];
    }
    const auto round_up = [](int64_t bytes) { return size_t(bytes + 255) / 256 * 256; };
    p.counter_bytes = round_up(clouds * (w.row_blocks[0] + w.row_blocks[1] + 1) * int64_t(sizeof(unsigned)));
    p.energy_bytes = round_up(clouds * w.blocks * int64_t(sizeof(double)));
    const bool parts = (w.full[0] && w.segments[0] > 1) || (w.full[1] && w.segments[1] > 1);
    p.partial_bytes = parts ? round_up(clouds * w.blocks * rows * (q.d + 1) * int64_t(sizeof(double))) : 0;
    return p;
}

template <typename T, int DP, int R, bool ONE, bool WITH_V>
cudaError_t launch(const Plan<T>& p, cudaStream_t stream) {
    const auto kernel = pairwise_kernel<T, DP, R, ONE, WITH_V>;
    const size_t tile = kTile * Layout<T, DP>::stride * sizeof(T);
    cudaLaunchConfig_t config{};
    config.dynamicSmemBytes = R * (DP + 2) * kThreads * sizeof(double) + tile * (WITH_V ? 2 : 1);
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.dynamicSmemBytes));
    if (error != cudaSuccess) return error;
    config.gridDim = dim3(unsigned(p.work.blocks), unsigned(p.clouds), 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, p.work);
}

template <typename T, int DP>
cudaError_t launch(const Plan<T>& p, cudaStream_t stream) {
    const bool one = p.work.rbf && p.work.scales == 1;
    if (p.work.v != nullptr) return one ? launch<T, DP, 1, true, true>(p, stream) : launch<T, DP, 1, false, true>(p, stream);
    if constexpr (sizeof(T) == 4 && DP <= kManyMaxDim) {
        if (p.many) return one ? launch<T, DP, 4, true, false>(p, stream) : launch<T, DP, 2, false, false>(p, stream);
    }
    return one ? launch<T, DP, 1, true, false>(p, stream) : launch<T, DP, 1, false, false>(p, stream);
}

template <typename T>
cudaError_t launch(const Plan<T>& p, cudaStream_t stream) {
    const int d = p.work.d;
    if constexpr (sizeof(T) == 8) {
        return d <= 6 ? launch<T, 6>(p, stream) : launch<T, 18>(p, stream);
    } else {
        if (d <= 2) return launch<T, 2>(p, stream);
        if (d <= 6) return launch<T, 6>(p, stream);
        return d <= 10 ? launch<T, 10>(p, stream) : launch<T, 18>(p, stream);
    }
}

}  // namespace

template <typename T>
size_t pairwise_cuda_workspace(const PairwiseProblem<T>& problem, int64_t clouds, int processors) {
    return plan(problem, clouds, processors).bytes();
}

template <typename T>
const char* pairwise_cuda(const PairwiseProblem<T>& problem, int64_t clouds, const double* lengths, void* workspace,
                          int processors, void* stream) {
    if (problem.d > kCudaMaxDim || int(problem.radial.weight.size()) > kMaxScales || clouds > 65535) {
        return "at most 18 coordinates, 32 scales and 65535 clouds";
    }
    Plan<T> p = plan(problem, clouds, processors);
    if (p.work.blocks == 0) return nullptr;
    char* memory = static_cast<char*>(workspace);
    p.work.lengths = lengths;
    p.work.counters = reinterpret_cast<unsigned*>(memory);
    p.work.energies = reinterpret_cast<double*>(memory + p.counter_bytes);
    p.work.partials = reinterpret_cast<double*>(memory + p.counter_bytes + p.energy_bytes);
    cudaError_t error = cudaMemsetAsync(workspace, 0, p.counter_bytes, static_cast<cudaStream_t>(stream));
    if (error == cudaSuccess) error = launch(p, static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template size_t pairwise_cuda_workspace<float>(const PairwiseProblem<float>&, int64_t, int);
template size_t pairwise_cuda_workspace<double>(const PairwiseProblem<double>&, int64_t, int);
template const char* pairwise_cuda<float>(const PairwiseProblem<float>&, int64_t, const double*, void*, int, void*);
template const char* pairwise_cuda<double>(const PairwiseProblem<double>&, int64_t, const double*, void*, int, void*);

}  // namespace infovae_fast
