// What the kernels of `pairwise` share: the problem and its division among blocks, the centre, the radial functions.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "cuda/elementary.h"
#include "cuda/shared_memory.h"
#include "pairwise.h"

namespace infovae_fast {
namespace {

constexpr int kSample = 64;  // points whose middle is the centre; any point near most of the cloud would do

template <typename T>
struct Mixture {  // in units of the first scale
    struct alignas(16) Scale {
        T rate, rate_by_alpha, weight, weighted_rate;
    };
    Scale scale[kCudaMaxScales];
};

template <typename T>
struct Work {
    // The problem; [2] is x and y. Of several clouds the arrays follow one another.
    const T *z[2], *v, *a[2];
    int64_t n[2];
    int d;
    bool rbf;
    int scales;
    double bandwidth[kCudaMaxScales], weight[kCudaMaxScales], alpha;
    const double* lengths;       // bandwidths in the memory of the GPU, or null: then these are known
    double known_scale, known_force_scale;
    double within[2], between;   // w_xx and w_yy, w_xy
    T *force[2], *potential[2];
    double* energy;
    Affine<T> affine;            // of one cloud
    bool wants_energy;
    // The division of the work.
    bool full[2];                // rows need forces or potentials: all sources, else each pair of the cloud once
    bool sees_other[2];          // the sources of the other cloud too
    double share_of_other;       // how often such a pair counts in the energy
    int64_t tiles[2], row_blocks[2], segments[2], blocks;
    double* energies;            // [clouds, blocks]
    T* partials;                 // [clouds, blocks, rows of a block, D + 1]: of each row its force and its potential

    int64_t tiles_of_row(int k) const { return tiles[k] + (sees_other[k] ? tiles[1 - k] : 0); }
    // Tiles that blocks of equal shares have, of so many blocks.
    int64_t tiles_of_block(int64_t clouds, int64_t blocks) const {
        const int64_t all = (row_blocks[0] * tiles_of_row(0) + row_blocks[1] * tiles_of_row(1)) * clouds;
        return std::max<int64_t>(1, (all + blocks - 1) / blocks);
    }
    // Segments of the sources, of so many tiles at most.
    void divide(int64_t x_tiles, int64_t y_tiles) {
        const int64_t most[2] = {x_tiles, y_tiles};
        blocks = 0;
        for (int k = 0; k < 2; ++k) {
            segments[k] = row_blocks[k] == 0 ? 0 : (tiles_of_row(k) + most[k] - 1) / most[k];
            blocks += row_blocks[k] * segments[k];
        }
    }
    __device__ int sample_size() const { return int(n[0] + n[1] < kSample ? n[0] + n[1] : kSample); }
    // Coordinate c of point k of the sample, the same in all blocks.
    __device__ const T* sample(int64_t cloud, int c, int64_t k) const {
        const int64_t points = n[0] + n[1], at = points < kSample ? k : k * points / kSample;
        const T* const first = at < n[0] ? z[0] + cloud * n[0] * d : z[1] + (cloud * n[1] - n[0]) * d;
        return first + at * d + c;
    }
    // Its middle, by a warp, for coordinates c, c + apart, ...: of four numbers the mean of the inner two, of four such means
    // again, and once more. A few points that are far away do not move it.
    template <int COUNT>
    __device__ __forceinline__ void centre(int64_t cloud, int c, int apart, int lane, T (&middle)[COUNT]) const {
        const int size = sample_size();
        T z[COUNT][kSample / 32];
#pragma unroll
        for (int k = 0; k < kSample / 32; ++k) {
            const int number = lane + 32 * k;
            const T* const first = sample(cloud, 0, size == kSample ? number : number % size);
#pragma unroll
            for (int e = 0; e < COUNT; ++e) z[e][k] = c + e * apart < d ? first[c + e * apart] : T(0);
        }
        const auto inner = [](T p, T q, T r, T s) {  // the same bits if a pair is swapped, or both are
            return T(0.5) * fmax(fmin(p, q), fmin(r, s)) + T(0.5) * fmin(fmax(p, q), fmax(r, s));
        };
        const auto of = [](T x, int offset) { return __shfl_xor_sync(0xffffffffu, x, offset); };
#pragma unroll
        for (int e = 0; e < COUNT; ++e) middle[e] = inner(z[e][0], z[e][1], of(z[e][0], 1), of(z[e][1], 1));
#pragma unroll
        for (int offset = 2; offset < 32; offset *= 4) {
#pragma unroll
            for (int e = 0; e < COUNT; ++e) {
                const T x = middle[e];
                middle[e] = inner(x, of(x, offset), of(x, 2 * offset), of(x, 3 * offset));
            }
        }
    }
    __device__ double length(int scale) const { return lengths != nullptr ? lengths[scale] : bandwidth[scale]; }
    __device__ void fill(Mixture<T>& mixture) const {
        for (int s = int(threadIdx.x); s < scales; s += int(blockDim.x)) {
            const double ratio = length(0) / length(s), r = ratio * ratio;
            mixture.scale[s] = {T(r), T(r / alpha), T(weight[s]), T(weight[s] * r)};
        }
    }
    __device__ void put_energy(int64_t cloud, double sum) const {
        if (energy != nullptr) energy[cloud] = sum;
        if (affine.value != nullptr) affine.value[cloud] = T(affine.factor * sum + affine.constant);
    }
    // u = coordinate_scale (z - centre), and a force is g u force_scale
    __host__ __device__ double coordinate_scale(double first_length) const { return (rbf ? 1.2011224087864498 : 1.0) / first_length; }
    __device__ double coordinate_scale() const { return lengths == nullptr ? known_scale : coordinate_scale(lengths[0]); }
    __device__ double force_scale() const {
        if (lengths == nullptr) return known_force_scale;
        return 1 / (lengths[0] * lengths[0] * coordinate_scale(lengths[0]));
    }
};

// What block `index` has to do: targets of a cloud, and a segment of the sources of each cloud, because the sums over the
// two nearly cancel. Tile k of the segment, k < count, is tile `tile(k)` of the own cloud for k < own_count, else of the other.
struct Share {
    int own, own_begin, own_count, other_begin, count;
    int64_t row_block, segment;

    template <typename T>
    __device__ Share(const Work<T>& work, unsigned index, int rows, int width) {
        const int64_t first = work.row_blocks[0] * work.segments[0];
        own = int64_t(index) < first ? 0 : 1;
        const unsigned block = index - (own == 0 ? 0u : unsigned(first)), segments = unsigned(work.segments[own]);
        row_block = block / segments, segment = block % segments;
        const auto edge = [&](int64_t tiles, unsigned s) {  // a division of 64 bits takes long
            const bool few = tiles >> 16 == 0 && segments >> 16 == 0;
            return few ? int(unsigned(tiles) * s / segments) : int(tiles * int64_t(s) / int64_t(segments));
        };
        const int64_t others = work.sees_other[own] ? work.tiles[1 - own] : 0;
        const unsigned from = unsigned(segment);
        own_begin = edge(work.tiles[own], from), other_begin = edge(others, from);
        const int own_end = edge(work.tiles[own], from + 1);
        // Of rows that are not wanted, the pairs before the diagonal are another block's.
        const int skipped = work.full[own] ? 0 : int(row_block * rows / width);
        own_begin = own_begin > skipped ? own_begin : skipped < own_end ? skipped : own_end;
        own_count = own_end - own_begin, count = own_count + edge(others, from + 1) - other_begin;
    }
    __device__ int tile(int k) const { return k < own_count ? own_begin + k : other_begin + k - own_count; }
};

// The problem, for blocks of `rows` targets and tiles of `tile` sources; not divided yet.
template <typename T>
Work<T> work_of(const PairwiseProblem<T>& q, int64_t rows, int64_t tile, const Affine<T>& affine) {
    Work<T> w{};
    w.z[0] = q.x, w.z[1] = q.y, w.v = q.v, w.a[0] = q.a, w.a[1] = q.b;
    w.n[0] = q.n, w.n[1] = q.y == nullptr ? 0 : q.m, w.d = int(q.d);
    w.rbf = q.radial.rbf, w.scales = int(q.radial.weight.size()), w.alpha = q.radial.alpha;
    const auto copy = [](const std::vector<double>& from, double* to) {  // more than fit are refused before the launch
        std::copy_n(from.begin(), std::min<size_t>(from.size(), kCudaMaxScales), to);
    };
    copy(q.radial.bandwidth, w.bandwidth), copy(q.radial.weight, w.weight);
    if (!q.radial.bandwidth.empty()) {
        w.known_scale = w.coordinate_scale(w.bandwidth[0]);
        w.known_force_scale = 1 / (w.bandwidth[0] * w.bandwidth[0] * w.known_scale);
    }
    w.within[0] = q.w_xx, w.within[1] = q.w_yy, w.between = q.w_xy;
    w.force[0] = q.x_force, w.force[1] = q.y_force, w.potential[0] = q.x_potential, w.potential[1] = q.y_potential;
    w.energy = q.energy, w.affine = affine, w.wants_energy = q.energy != nullptr || affine.value != nullptr;

    const bool energy = w.wants_energy, both = w.n[1] > 0;
    for (int k = 0; k < 2; ++k) {
        w.full[k] = w.force[k] != nullptr || w.potential[k] != nullptr;
        w.tiles[k] = (w.n[k] + tile - 1) / tile;
    }
    w.sees_other[0] = both && (w.full[0] || (energy && !w.full[1]));
    w.sees_other[1] = both && w.full[1];
    w.share_of_other = w.sees_other[0] && w.sees_other[1] ? 1 : 2;
    for (int k = 0; k < 2; ++k) {
        const bool wanted = w.n[k] > 0 && (w.full[k] || energy);
        w.row_blocks[k] = wanted ? (w.n[k] + rows - 1) / rows : 0;
    }
    return w;
}

inline size_t round_up(int64_t bytes) { return size_t(bytes + 255) / 256 * 256; }

template <typename T>
size_t partial_bytes(const Work<T>& w, int64_t clouds, int64_t rows) {
    const bool parts = (w.full[0] && w.segments[0] > 1) || (w.full[1] && w.segments[1] > 1);
    return parts ? round_up(clouds * w.blocks * rows * (w.d + 1) * int64_t(sizeof(T))) : 0;
}

// phi and g of exponents; several at a time, because each scale has to be read.
template <int COUNT, typename T>
__device__ __forceinline__ void radial_of(const T (&t)[COUNT], const Work<T>& work, const Mixture<T>& mixture,
                                          T (&phi)[COUNT], T (&g)[COUNT]) {
#pragma unroll
    for (int e = 0; e < COUNT; ++e) phi[e] = g[e] = T(0);
    const auto add_scales = [&](auto one) {  // phi and the slope of a scale, at t
#pragma unroll 1
        for (int s = 0; s < work.scales; ++s) {
            const typename Mixture<T>::Scale scale = mixture.scale[s];
#pragma unroll
            for (int e = 0; e < COUNT; ++e) {
                T p, slope;
                one(t[e], scale, p, slope);
                phi[e] += p * scale.weight, g[e] += slope * scale.weighted_rate;
            }
        }
    };
    if (work.rbf) {
        add_scales([](T t, const auto& scale, T& p, T& slope) { p = slope = power_of_2(t * scale.rate); });
    } else if (work.alpha == 1) {
        add_scales([](T t, const auto& scale, T& p, T& slope) {
            p = near_reciprocal(T(1) - t * scale.rate_by_alpha);
            slope = p * p;
        });
    } else {
        add_scales([&](T t, const auto& scale, T& p, T& slope) {
            const T u = -t * scale.rate_by_alpha;
            p = power_of_2(T(-work.alpha) * log2_1p(u));
            slope = p * near_reciprocal(T(1) + u);
        });
    }
}

}  // namespace

// As `pairwise_cuda`, on tensor cores (pairwise_products.cu).
size_t pairwise_products_workspace(const PairwiseProblem<float>& problem, int64_t clouds, int processors,
                                   const Affine<float>& affine);
const char* pairwise_products(const PairwiseProblem<float>& problem, int64_t clouds, const double* lengths,
                              void* workspace, int processors, void* stream, const Affine<float>& affine);

}  // namespace infovae_fast
