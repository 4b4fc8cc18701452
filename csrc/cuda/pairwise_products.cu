// Energy and force on a GPU, for points of many coordinates: their products on tensor cores.
//
// The formulas are those of pairwise.cu: t_ij = u_i.u_j - h_i - h_j, F_i = w slope (sum_j g_ij a_j u_j - G_i u_i) with
// G_i = sum_j g_ij a_j, and both products are of matrices: u u^T, and g u. Tensor cores multiply 16 bit numbers, so a
// number is a power of two times the sum of two of them, high + low, and a product is high high + high low + low high:
// 22 bits, at twice the rate of TF32. Powers of two bring what is large into the range of 16 bits:
//
//     u   one for each 64 points, nearly always that of a sample; 2 h = high high + 2 high low, so that t_ii = 0. (A point
//         more than 10^5 times farther out than its 63 neighbours takes digits of theirs.)
//     g   one for each target, which changes when a larger g comes; or none, where the phi of the tile before had a mean of
//         2^-6 or more: then g is off by at most 2^-25
//
// Tensor cores cut sums off, always towards zero. So they add up 16 coordinates or 32 sources, and what is more is added up
// in float; the sums over two clouds nearly cancel, and those over groups of sources are added up in double, as those of
// A = sum_j phi_ij a_j and G over tiles are. phi has the same roundings in all rows, with forces or without, near the
// diagonal or not: they cancel too. With v, the second product is of phi and w slope u_j + weight v_j instead.
//
// A block owns 64 targets, 16 for each of its four warps, in registers, and a segment of the sources. Nothing is shared
// between blocks: what they have summed is added up in a launch of its own, in order.
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/pairwise_products_points.h"
#include "cuda/pairwise_work.h"
#include "cuda/products.h"

namespace infovae_fast {
namespace {

using P = Product<__half>;

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;  // targets of a block
constexpr int kGroup = 512;   // sources that are added up in float
constexpr int kStages = 2;
constexpr int kWaves = 4, kMostWaves = 8;     // of blocks, wanted where only energies are; and at most
constexpr int kLeastSources = 256, kStartSources = 128;  // of a block; that take as long as its start and end
constexpr int kShort = 4;  // tiles of a cloud, too few to see first whether they need a factor
constexpr int kGatherThreads = 256, kGatherAtOnce = 8;  // loads before the first is waited for
constexpr float kLargest = 32768;  // that a scaled g may be
constexpr float kLeastMean = 0x1p-6f;  // of the phi of a tile, for the group that follows to do without a factor
constexpr float kSmallSquare = 0x1p16f;  // of distances, below which rounding leaves t next to 0

template <int DP, bool FORCE, bool VALUES>
struct Layout {  // of shared memory: the sums of the threads, then the tiles
    static constexpr Shape shape{DP, VALUES};
    static constexpr size_t totals = FORCE ? kRows * DP * sizeof(double) : 0, bytes = totals + kStages * shape.bytes;
    static_assert(kUnit % kRows == 0 && kGroup % shape.tile == 0 && shape.bytes % 16 == 0);
    static constexpr size_t others = 2 * ((VALUES ? 0 : sizeof(Mixture<float>)) + (kWarps + 4) * sizeof(double));
    static_assert(bytes + others <= 99 << 10);
};

constexpr int blocks_of_processor(int dp, bool usual) { return dp == 16 ? (usual ? 5 : 4) : dp == 32 && usual ? 3 : 2; }

template <int DP, bool PLAIN, bool VALUES>
struct Registers {
    static constexpr bool usual = PLAIN && !VALUES;
    static constexpr int groups = DP <= (PLAIN ? 80 : 48) ? 2 : 1;  // of 16 sources, whose g they hold
    static constexpr int blocks = blocks_of_processor(DP, usual);
};

// ---- the sums ----

// Brings tiles of so many bytes to the slots of shared memory; all threads call `start` and `wait` for each in turn.
template <int BYTES>
class Copies {
public:
    explicit __device__ Copies(unsigned char* slots) : slots_(slots) {
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x == 0) {
            for (int slot = 0; slot < kStages; ++slot) {
                asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(arrived(slot)) : "memory");
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncthreads();
#endif
    }
    __device__ __forceinline__ unsigned char* slot(int number) const { return slots_ + number % kStages * BYTES; }
    // Begins to copy tile `number`, when all threads are done with the one that had its slot.
    __device__ __forceinline__ void start(int number, const unsigned char* from) {
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x > 0) return;  // the copy engine does it
        const unsigned to = unsigned(__cvta_generic_to_shared(slot(number))), barrier = arrived(number);
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(BYTES) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                     "l"(from), "r"(BYTES), "r"(barrier) : "memory");
#else
#pragma unroll
        for (int first = 0; first < BYTES; first += 16 * kThreads) {
            const int at = first + 16 * int(threadIdx.x);
            if (first + 16 * kThreads > BYTES && at >= BYTES) break;
            __pipeline_memcpy_async(slot(number) + at, from + at, 16);
        }
        __pipeline_commit();
#endif
    }
    // Tile `number` is there when all threads have met afterwards.
    __device__ __forceinline__ void wait(int number) {
#if __CUDA_ARCH__ >= 900
        unsigned done = 0;
        while (done == 0) {
            asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                         : "=r"(done) : "r"(arrived(number)), "r"(unsigned(number / kStages % 2)) : "memory");
        }
#else
        __pipeline_wait_prior(0);
#endif
    }

private:
    unsigned char* slots_;
#if __CUDA_ARCH__ >= 900
    static __device__ __forceinline__ unsigned arrived(int number) {
        __shared__ alignas(8) unsigned long long barriers[kStages];
        return unsigned(__cvta_generic_to_shared(barriers + number % kStages));
    }
#endif
};

// PLAIN: one RBF scale and no weights of points. FORCE: also the sums of g u.
template <int DP, bool PLAIN, bool FORCE, bool VALUES>
__device__ __forceinline__ void sum_share(const Work<float>& work, const Points& x, const Points& y, const Share& share) {
    using L = Layout<DP, FORCE, VALUES>;
    using R = Registers<DP, PLAIN, VALUES>;
    constexpr Shape kShape = L::shape;
    constexpr int kSteps = DP / 16, kGroups = R::groups, kTile = kShape.tile, kPitch = kShape.pitch;
    constexpr int kNumbers = 8 * kGroups, kPiece = kTile / kShape.units;  // sources of one unit
    static_assert(kPiece % (16 * kGroups) == 0);
    constexpr unsigned kAll = 0xffffffffu;
    __shared__ Mixture<float> mixture;
    double* const totals = shared_memory<double>() + threadIdx.x;  // [8 kSteps, threads]
    unsigned char* const tiles = shared_memory<unsigned char>() + L::totals;

    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, d = work.d;
    const int own = share.own;
    const Points &mine = own == 0 ? x : y, &others = own == 0 ? y : x;
    const int64_t cloud = blockIdx.y, i0 = share.row_block * kRows, n = work.n[own];
    const int64_t clouds_block = cloud * work.blocks + blockIdx.x;
    const bool full = work.full[own];
    const int row0 = warp * 16 + lane / 4;  // of this lane's targets; the other is 8 rows on
    const double outer = PLAIN ? work.weight[0] : 1.0;
    __shared__ double per_phi;  // slope = outer per_phi

    Copies<kShape.bytes> copies(tiles);
    const auto start = [&](int k) {
        copies.start(k, (k < share.own_count ? mine : others).tile(kShape, cloud, share.tile(k)));
    };
    if constexpr (FORCE) {
        for (int e = 0; e < 8 * kSteps; ++e) totals[e * kThreads] = 0;
    }
    after_previous();
    if (share.count > 0) start(0);
    if constexpr (!PLAIN) work.fill(mixture);
    const auto own_tile = [&](int64_t point) { return Tile16(kShape, mine.tile(kShape, cloud, point / kTile)); };
    typename P::Left own_high[kSteps], own_low[kSteps];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t point = i0 + row0 + 8 * half;
        const Tile16 tile = own_tile(point);
#pragma unroll
        for (int k = 0; k < 2 * kSteps; ++k) {  // eight coordinates
            const int at = int(point % kTile) * kPitch + 8 * k + lane % 4 * 2, e = half + k % 2 * 2;
            own_high[k / 2].r[e] = *reinterpret_cast<const unsigned*>(tile.high + at);
            own_low[k / 2].r[e] = *reinterpret_cast<const unsigned*>(tile.low + at);
        }
    }

    if (threadIdx.x == 0) per_phi = work.force_scale();
    const float own_unit = own_tile(i0).unit[i0 % kTile / kUnit];
    float minus_h[2], factor[2] = {0x1p126f, 0x1p126f};  // of g, for 16 bits
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t point = i0 + row0 + 8 * half;
        minus_h[half] = own_tile(point).minus_h[point % kTile] * own_unit * own_unit;
    }
    double A[2] = {}, G[2] = {}, A_cloud[2] = {}, G_cloud[2] = {}, energy = 0;  // A_cloud: of one cloud
    float A_tile[2] = {}, G_tile[2] = {};
    [[maybe_unused]] bool scaled = true;  // are there factors other than 1
    typename P::Sums sum[FORCE ? kSteps : 1] = {};
    float unit = 0, value_unit = 0;
    double back = 0;  // what the sums are to be multiplied with
    bool other_unit = false;
    const auto flush = [&] {
#pragma unroll
        for (int e = 0; e < 8 * kSteps; ++e) {
            float& part = sum[e / 8].x[e % 8 / 4][e % 4];
            totals[e * kThreads] += back * double(part * inverse_power(factor[e % 4 / 2]));
            part = 0;
        }
    };

    int grouped = 0;  // tiles, since the last flush
    const auto close_group = [&](bool small) {  // are the phi that follow likely to be small
        flush();
        grouped = 0;
        if (PLAIN && small != scaled) scaled = small, factor[0] = factor[1] = small ? 0x1p126f : 1.0f;
    };
    // What is summed goes on with another factor. A flush would do, but goes through shared memory and double.
    const auto change_factors = [&](const float (&to)[2]) {
        const float ratio[2] = {to[0] * inverse_power(factor[0]), to[1] * inverse_power(factor[1])};
#pragma unroll
        for (int e = 0; e < 8 * kSteps; ++e) sum[e / 8].x[e % 8 / 4][e % 4] *= ratio[e % 4 / 2];
        factor[0] = to[0], factor[1] = to[1];
    };

    for (int k = 0; k < share.count; ++k) {
        copies.wait(k);
        __syncthreads();  // all are done with the slot that comes next
        if (k + 1 < share.count) start(k + 1);

        const Tile16 source(kShape, copies.slot(k));
        const bool within = k < share.own_count;
        const int ahead = share.tile(k) * kTile - int(i0);  // of the first target, if they are of one cloud
        const double w = within ? work.within[own] : work.between;
        if constexpr (FORCE) {
            const auto small = [&] { return __any_sync(kAll, fminf(A_tile[0], A_tile[1]) < kTile / 4 * kLeastMean) != 0; };
            // The second tile of a cloud has something to go by.
            const int of_cloud = within ? share.own_count : share.count - share.own_count;
            const bool second = PLAIN && of_cloud > kShort && k == (within ? 1 : share.own_count + 1);
            if (grouped == kGroup / kTile) {
                close_group(PLAIN && small());
            } else if (second && !small()) {
                change_factors({1.0f, 1.0f}), scaled = false;
            }
            ++grouped;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) A_tile[half] = G_tile[half] = 0;

        // 16 kGroups sources. CAREFUL: some may be hidden, of another unit, or so far away that rounding moves t beyond 0.
        const auto add_sources = [&](int first, auto careful, auto with_factors) {
            constexpr bool CAREFUL = decltype(careful)::value, SCALED = decltype(with_factors)::value;
            const float units = own_unit * unit;
            [[maybe_unused]] const float ratio = fminf(unit * inverse_power(own_unit), 0x1p126f);  // 0 h is 0
            [[maybe_unused]] const int there = CAREFUL ? int(source.there[0]) : 0;
            typename P::Sums dots[kGroups];
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    typename P::Right right_high, right_low;
                    const int at = (first + 16 * g) * kPitch + 16 * s;
                    P::template load<false>(right_high, source.high + at, kPitch);
                    P::template load<false>(right_low, source.low + at, kPitch);
                    typename P::Sums part = {};
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
            float phi[kNumbers], g[kNumbers];  // of one scale g is phi
            const auto column_of = [&](int e) { return e / 4 * 8 + lane % 4 * 2 + e % 2; };
#pragma unroll
            for (int e = 0; e < kNumbers; ++e) {
                const float2 two = *reinterpret_cast<const float2*>(source.minus_h + first + column_of(e / 2 * 2));
                const float h = e % 2 == 0 ? two.x : two.y;
                float t = fmaf(dots[e / 8].x[e / 4 % 2][e % 4] + (CAREFUL ? h * ratio : h), units, minus_h[e % 4 / 2]);
                if constexpr (CAREFUL || !PLAIN) t = minimum_or_nan(t, 0.0f);
                phi[e] = PLAIN ? power_of_2(t) : t;
            }
            if constexpr (!PLAIN) {
                float t[kNumbers];
#pragma unroll
                for (int e = 0; e < kNumbers; ++e) t[e] = phi[e];
                radial_of<kNumbers>(t, work, mixture, phi, g);
            }
            [[maybe_unused]] float top[2] = {}, A_here[2] = {}, G_here[2] = {};  // near equal numbers: few in float
#pragma unroll
            for (int e = 0; e < kNumbers; ++e) {
                const int half = e % 4 / 2;
                if constexpr (!PLAIN) {
                    const float a = source.a[first + column_of(e)];
                    phi[e] *= a, g[e] *= a;
                }
                if constexpr (CAREFUL) {
                    const int own_row = row0 + 8 * half, at = first + column_of(e), other = ahead + at;
                    const bool hidden = within && (full ? other == own_row : other <= own_row);
                    if (hidden || at >= there) phi[e] = g[e] = 0.0f;
                }
                A_here[half] += phi[e];
                if constexpr (FORCE && !PLAIN) {
                    G_here[half] += g[e];
                    top[half] = fmaxf(top[half], fabsf(g[e]));
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if constexpr (PLAIN) A_tile[half] += A_here[half];
                else A_cloud[half] += double(A_here[half]);  // of several scales phi is larger, and so are roundings
                if constexpr (FORCE && !PLAIN) G_tile[half] += G_here[half];
            }
            if constexpr (FORCE && SCALED) {  // is a g too large for its factor? Of one scale no g is larger than their sum
                const float(&large)[2] = PLAIN ? A_here : top;
                if (__any_sync(kAll, large[0] * factor[0] > kLargest || large[1] * factor[1] > kLargest)) {
                    float to[2] = {factor[0], factor[1]};
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float most = large[half];
                        most = fmaxf(most, __shfl_xor_sync(kAll, most, 1));
                        most = fmaxf(most, __shfl_xor_sync(kAll, most, 2));
                        if (most * factor[half] <= kLargest) continue;
                        to[half] = inverse_power(power_below(fminf(most, 0x1p126f)) * 0x1p-13f);
                    }
                    change_factors(to);
                }
            }
            if constexpr (FORCE) {
                typename P::Left high[kGroups], low[kGroups];
#pragma unroll
                for (int k = 0; k < 4 * kGroups; ++k) {  // (row, source) = (0, 0), (8, 0), (0, 8), (8, 8)
                    const int r = k % 4, e = k / 4 * 8 + r / 2 * 4 + r % 2 * 2;
                    const float* const numbers = PLAIN ? phi : g;
                    const float by = SCALED ? factor[r % 2] : 1.0f;
                    split(numbers[e] * by, numbers[e + 1] * by, high[k / 4].r[r], low[k / 4].r[r]);
                }
#pragma unroll
                for (int c = 0; c < kSteps; ++c) {
                    typename P::Sums part = {};
#pragma unroll
                    for (int g = 0; g < kGroups; ++g) {
                        typename P::Right right_high, right_low;
                        const int at = (first + 16 * g) * kPitch + 16 * c;
                        P::template load<true>(right_high, source.value_high + at, kPitch);
                        P::template load<true>(right_low, source.value_low + at, kPitch);
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
        for (int piece = 0; piece < kShape.units; ++piece) {
            const float unit_here = source.unit[piece], value_unit_here = VALUES ? source.value_unit[piece] : 0.0f;
            if (unit_here != unit || value_unit_here != value_unit) {
                if constexpr (FORCE) {
                    if (unit > 0) flush();
                }
                unit = unit_here, value_unit = value_unit_here;
                back = VALUES ? double(value_unit) : w * outer * per_phi * double(unit);
                other_unit = unit != own_unit || float(DP) * 0x1p28f * unit * unit > kSmallSquare;
            }
            using Yes = std::true_type;
            using No = std::false_type;
            const auto add_piece = [&](auto... how) {
#pragma unroll 1
                for (int k = 0; k < kPiece / (16 * kGroups); ++k) add_sources(piece * kPiece + k * 16 * kGroups, how...);
            };
            if (overlaps || other_unit) add_piece(Yes(), Yes());
            else if (FORCE && PLAIN && !scaled) add_piece(No(), std::bool_constant<!(FORCE && PLAIN)>());
            else add_piece(No(), Yes());
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if constexpr (PLAIN) A_cloud[half] += double(A_tile[half]);
            if constexpr (FORCE && !PLAIN) G_cloud[half] += double(G_tile[half]);
        }
        if (k + 1 != share.own_count && k + 1 != share.count) continue;
        if constexpr (FORCE) close_group(true);  // the last tile of a cloud: w changes
        A_tile[0] = A_tile[1] = 0, unit = 0;
        const double times = within ? (full ? 1.0 : 2.0) : work.share_of_other;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const double potential = w * outer * A_cloud[half];
            const int64_t point = i0 + row0 + 8 * half;
            energy += times * potential * double(point < n ? (PLAIN ? 1.0f : own_tile(point).a[point % kTile]) : 0.0f);
            A[half] += potential, A_cloud[half] = 0;
            if constexpr (FORCE && !PLAIN) G[half] += w * outer * per_phi * G_cloud[half], G_cloud[half] = 0;
        }
    }

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
        float* const part = alone ? nullptr : work.partials + (clouds_block * kRows + row) * (d + 1);
        float* const potential = !alone ? part + d : work.potential[own] ? work.potential[own] + cloud * n + point : nullptr;
        if (lane % 4 == 0 && potential != nullptr) *potential = float(of_lanes[0]);
        if constexpr (FORCE) {
            float* const force = alone ? work.force[own] + (cloud * n + point) * d : part;
            const double weight = PLAIN ? 1.0 : double(own_tile(point).a[point % kTile]);
#pragma unroll
            for (int k = 0; k < 2 * kSteps; ++k) {  // eight coordinates
                __half high[2], low[2];
                std::memcpy(high, &own_high[k / 2].r[half + k % 2 * 2], sizeof high);
                std::memcpy(low, &own_low[k / 2].r[half + k % 2 * 2], sizeof low);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int c = 8 * k + lane % 4 * 2 + e;
                    const double u = double(own_unit) * (double(__half2float(high[e])) + double(__half2float(low[e])));
                    const double sum_of_g_u = totals[(4 * k + 2 * half + e) * kThreads];
                    if (c < d) force[c] = float(weight * (sum_of_g_u - of_lanes[1] * u));
                }
            }
        }
    }
}

template <int DP, bool PLAIN, bool FORCE, bool VALUES>
__global__ void __launch_bounds__(kThreads, Registers<DP, PLAIN, VALUES>::blocks)
    products_kernel(const __grid_constant__ Work<float> work, const __grid_constant__ Points x,
                    const __grid_constant__ Points y) {
    const Share share(work, blockIdx.x, kRows, Layout<DP, FORCE, VALUES>::shape.tile);
    if (share.count == 0 && !work.full[share.own]) {  // all of its pairs are another block's
        after_previous();
        if (threadIdx.x == 0) work.energies[blockIdx.y * work.blocks + blockIdx.x] = 0;
        return;
    }
    if constexpr (FORCE) {
        if (work.force[share.own] != nullptr) return sum_share<DP, PLAIN, true, VALUES>(work, x, y, share);
    }
    sum_share<DP, PLAIN, false, VALUES>(work, x, y, share);
}

// The energies of the blocks, by the first block of a cloud; and the segments, number by number.
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const __grid_constant__ Work<float> work) {
    const int64_t cloud = blockIdx.y;
    const int d = work.d;
    after_previous();
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
        const int64_t n = work.n[own], segments = work.segments[own], stride = gridDim.x * int64_t(kGatherThreads);
        const int64_t numbers = work.full[own] && segments > 1 ? n * (d + 1) : 0;
        for (int64_t k = blockIdx.x * int64_t(kGatherThreads) + threadIdx.x; k < numbers; k += stride) {
            const int64_t point = k / (d + 1);
            const int c = int(k % (d + 1));
            const float* const first =
                work.partials + ((cloud * work.blocks + first_block + point / kRows * segments) * kRows + point % kRows) * (d + 1) + c;
            double sum = 0;
            for (int64_t s = 0; s < segments; s += kGatherAtOnce) {
                float some[kGatherAtOnce];
#pragma unroll
                for (int e = 0; e < kGatherAtOnce; ++e) {
                    some[e] = s + e < segments ? first[(s + e) * kRows * (d + 1)] : 0.0f;
                }
#pragma unroll
                for (const float one : some) sum += double(one);
            }
            if (c == d && work.potential[own] != nullptr) work.potential[own][cloud * n + point] = float(sum);
            if (c < d && work.force[own] != nullptr) work.force[own][(cloud * n + point) * d + c] = float(sum);
        }
        first_block += work.row_blocks[own] * segments;
    }
}

// ---- the launches ----

struct Plan {
    Work<float> work;
    int64_t clouds;
    int dp;
    bool plain, values;
    Points points[2];

    Plan(const PairwiseProblem<float>& q, int64_t clouds, int processors, const Affine<float>& affine) : clouds(clouds) {
        dp = int(q.d + 15) / 16 * 16;
        if (dp == 112) dp = 128;
        plain = q.radial.rbf && q.radial.weight.size() == 1 && q.a == nullptr && q.b == nullptr;
        values = q.v != nullptr;
        const int64_t tile = shape().tile, multiple = std::max<int64_t>(tile, kUnit);
        work = work_of(q, kRows, tile, affine);
        divide(processors, int64_t(processors) * blocks_of_processor(dp, plain && !values));
        for (int k = 0; k < 2; ++k) points[k].count = (work.n[k] + multiple - 1) / multiple * multiple / tile;
    }
    Shape shape() const { return {dp, values}; }
    // So that the blocks end together. Those of rows that are wanted take equally long and start first. Beside the last of
    // them and behind run those of a cloud of which only the energy is wanted: of its tiles half are needed, and they take
    // half as long.
    void divide(int64_t processors, int64_t at_once) {
        const int64_t tile = shape().tile;
        const int64_t least = std::min(std::max<int64_t>(1, kLeastSources / tile), work.tiles_of_block(clouds, processors));
        const bool full[2] = {work.full[0] && work.row_blocks[0] > 0, work.full[1] && work.row_blocks[1] > 0};
        if (!full[0] && !full[1]) {
            const int64_t tiles = std::max(least, work.tiles_of_block(clouds, kWaves * at_once));
            return work.divide(tiles, tiles);
        }
        const int one = full[0] ? 0 : 1;
        const bool rest = !full[1 - one];  // of two clouds that are full the rows are equally long
        const int64_t all = work.tiles_of_row(one), rows = (work.row_blocks[one] + (rest ? 0 : work.row_blocks[1 - one])) * clouds;
        const int64_t rest_rows = rest ? work.row_blocks[1 - one] * clouds : 0, rest_tiles = work.tiles[1 - one];
        const double start = double(kStartSources) / double(tile);
        double best_time = INFINITY;
        int64_t best[2] = {};  // tiles
        for (int64_t segments = 1; segments == 1 || rows * segments <= kMostWaves * at_once; ++segments) {
            const int64_t tiles = (all + segments - 1) / segments, other = std::max(2 * least, (tiles + 3) / 4);
            if (segments > 1 && tiles < least) break;
            const int64_t blocks = rows * segments, waves = (blocks + at_once - 1) / at_once;
            const double length = double(tiles) + start, start_of_other = start / 2;  // half of its blocks are empty
            const double rest_time = double(rest_rows) * (double(rest_tiles) / 4 + start_of_other * double((rest_tiles + other - 1) / other));
            const double room = double(waves * at_once - blocks) * length, later = std::max(0.0, rest_time - room);
            const double gathered = segments > 1 ? start / 2 * double(blocks) : 0;
            const double tail = later > 0 ? (double(other) / 2 + start) / 2 : 0;
            const double time = double(waves) * length + (later + gathered) / double(at_once) + tail;
            if (time < best_time) best_time = time, best[one] = tiles, best[1 - one] = rest ? other : tiles;
        }
        work.divide(best[0], best[1]);
    }
    // Divides memory, or counts how much it takes.
    size_t place(char* memory) {
        size_t used = 0;
        const auto take = [&](auto*& pointer, int64_t bytes) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used), used += round_up(bytes);
        };
        take(work.energies, clouds * work.blocks * int64_t(sizeof(double)));
        take(work.partials, int64_t(partial_bytes(work, clouds, kRows)));
        for (Points& p : points) take(p.tiles, clouds * p.count * shape().bytes);
        return used;
    }
};

dim3 grid_of(int64_t blocks, int64_t clouds) { return dim3(unsigned(blocks), unsigned(clouds), 1); }

template <int DP>
cudaError_t sum(const Plan& p, cudaStream_t stream) {
    const bool force = p.work.force[0] != nullptr || p.work.force[1] != nullptr;
    const auto run = [&](auto plain, auto forces, auto values) {
        constexpr bool kForces = decltype(forces)::value, kValues = decltype(values)::value;
        return launch(products_kernel<DP, decltype(plain)::value, kForces, kValues>, grid_of(p.work.blocks, p.clouds), kThreads,
                      Layout<DP, kForces, kValues>::bytes, stream, p.work, p.points[0], p.points[1]);
    };
    using Yes = std::true_type;
    using No = std::false_type;
    if (p.values) return run(Yes(), Yes(), Yes());
    if (p.plain) return force ? run(Yes(), Yes(), No()) : run(Yes(), No(), No());
    return force ? run(No(), Yes(), No()) : run(No(), No(), No());
}

}  // namespace

size_t pairwise_products_workspace(const PairwiseProblem<float>& problem, int64_t clouds, int processors,
                                   const Affine<float>& affine) {
    return Plan(problem, clouds, processors, affine).place(nullptr);
}

const char* pairwise_products(const PairwiseProblem<float>& problem, int64_t clouds, const double* lengths,
                              void* workspace, int processors, void* stream_of_caller, const Affine<float>& affine) {
    const cudaStream_t stream = static_cast<cudaStream_t>(stream_of_caller);
    Plan p(problem, clouds, processors, affine);
    if (p.work.blocks == 0 || clouds == 0) return nullptr;
    p.place(static_cast<char*>(workspace));
    p.work.lengths = lengths;
    const size_t shared = size_t(p.dp) * sizeof(double) + size_t(kUnit) * (p.dp + 1) * sizeof(float);
    const int64_t units = (p.points[0].count + p.points[1].count) * p.shape().tile / kUnit;
    cudaError_t error = launch(p.values ? prepare_kernel<true> : prepare_kernel<false>, grid_of(units, clouds),
                               kPrepareThreads, shared, stream, p.work, p.shape(), p.points[0], p.points[1]);
    if (error == cudaSuccess) {
        switch (p.dp) {
            case 16: error = sum<16>(p, stream); break;
            case 32: error = sum<32>(p, stream); break;
            case 48: error = sum<48>(p, stream); break;
            case 64: error = sum<64>(p, stream); break;
            case 80: error = sum<80>(p, stream); break;
            case 96: error = sum<96>(p, stream); break;
            default: error = sum<128>(p, stream);
        }
    }
    if (error == cudaSuccess) {
        const int64_t numbers = std::max(p.work.n[0], p.work.n[1]) * (p.work.d + 1);
        const bool parts = partial_bytes(p.work, 1, 1) > 0;
        const int64_t blocks = parts ? std::min<int64_t>(1 + numbers / kGatherThreads, 8 * processors) : 1;
        error = launch(gather_kernel, grid_of(blocks, clouds), kGatherThreads, 0, stream, p.work);
    }
    return text_of(error);
}

}  // namespace infovae_fast
