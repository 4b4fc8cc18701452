// Energy and force on a GPU, for points that fit in registers: value and gradient in one launch.
//
// The formulas are those of csrc/cpu/pairwise.cpp: coordinates are centred and scaled, t = u_i.u_j - h_i - h_j is the
// exponent, F_i = -w slope [(sum_j a_j g_ij) u_i - sum_j g_ij a_j u_j] + sum_j phi_ij v_j.
//
// A block owns 32 R targets, R for each lane, and a segment of the sources, in tiles of 128: first those of its own
// cloud, then the other's. Its four warps share the sources of a tile. A tile is summed in T, the tiles in double. The
// last block of a row of segments adds them up in their order and the very last one the energies, so that the bits do
// not depend on which block comes last.
#include <cuda_pipeline.h>

#include <algorithm>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/pairwise_work.h"

namespace infovae_fast {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kTile = kThreads;      // sources in shared memory at once: each thread brings one
constexpr int kBlocksPerProcessor = 8;  // wanted, so that the last ones to run cost little
constexpr int kProductsLeastDim = 7, kProductsLeastPoints = 1024;  // for tensor cores
constexpr int kManyTargets = 8192;   // from here on, four targets a lane: each source is read once for four
constexpr int kManyMaxDim = 6;       // more go to tensor cores

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
    constexpr int kAtOnce = ONE || DP > 10 ? 1 : 4 / R;  // sources
#pragma unroll(ONE ? 2 : 1)
    for (int first = 0; first < kTile / kWarps; first += kAtOnce) {
        T t[kAtOnce * R], phi[kAtOnce * R], g[kAtOnce * R], source[stride], v[stride];
#pragma unroll
        for (int e = 0; e < kAtOnce * R; ++e) {
            const int r = e % R;
            if (r == 0) load_row<T, stride>(tile + (first + e / R) * stride, source);
            t[e] = -(x.h[r] + source[DP]);
#pragma unroll
            for (int c = 0; c < DP; ++c) t[e] += x.u[r][c] * source[c];
            t[e] = minimum_or_nan(t[e], T(0));  // close points far from the centre: phi is 1 at most
            if constexpr (ONE) phi[e] = g[e] = power_of_2(t[e]);
        }
        if constexpr (!ONE) radial_of<kAtOnce * R>(t, work, mixture, phi, g);
#pragma unroll
        for (int e = 0; e < kAtOnce * R; ++e) {
            const int r = e % R, k = first + e / R;
            if (r == 0 && kAtOnce > 1) load_row<T, stride>(tile + k * stride, source);
            if (r == 0 && WITH_V) load_row<T, stride>(v_tile + k * stride, v);
            const T a = source[DP + 1];
            if constexpr (MASK) {
                const int self = diagonal + 32 * r;
                if (upper ? k <= self : k == self) phi[e] = g[e] = T(0);
            }
            x.A[r] += phi[e] * a;
            if constexpr (FORCE) {
                g[e] *= WITH_V ? a * gain : a;
                x.G[r] += g[e];
#pragma unroll
                for (int c = 0; c < DP; ++c) x.S[r][c] += g[e] * source[c];
                if constexpr (WITH_V) {
#pragma unroll
                    for (int c = 0; c < DP; ++c) x.S[r][c] += phi[e] * v[c];
                }
            }
        }
    }
}

// What this thread and those it has met wrote is seen before, and what others wrote behind it.
__device__ __forceinline__ void fence() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 700
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
    __threadfence();
#endif
}

// Whether all other blocks are done that count with one of two counters; what they wrote is then there to read.
struct Last {
    bool of_row, of_all;
};
__device__ __forceinline__ Last last_of(unsigned* row, int64_t row_blocks, unsigned* all, int64_t all_blocks) {
    __shared__ Last last;
    __syncthreads();
    if (threadIdx.x == 0) {  // for all threads of the block: what they did is before, what they do is behind
        fence();
        const unsigned all_before = atomicAdd(all, 1u);  // both are on their way together
        const unsigned row_before = row_blocks > 1 ? atomicAdd(row, 1u) : 0;
        fence();
        last.of_row = row_blocks > 1 && row_before + 1 == unsigned(row_blocks);
        last.of_all = all_before + 1 == unsigned(all_blocks);
    }
    __syncthreads();
    return last;
}

template <typename T, int DP, int R, bool ONE, bool WITH_V>
constexpr int blocks_of_processor() {  // that registers must leave room for; no more than do without spills
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1000
    if (sizeof(T) == 4 && DP <= 10 && ONE && !WITH_V) return R > 1 ? 4 : DP == 2 ? 8 : DP == 6 ? 7 : 4;
#endif
    return DP == 10 ? 3 : 2;
}

template <typename T, int DP, int R, bool ONE, bool WITH_V>
__global__ void __launch_bounds__(kThreads, (blocks_of_processor<T, DP, R, ONE, WITH_V>()))
    pairwise_kernel(const __grid_constant__ Work<T> work, unsigned* all_counters) {
    constexpr int stride = Layout<T, DP>::stride, rows = 32 * R, sums = DP + 2;  // sums: A, G, S
    __shared__ Mixture<T> mixture;
    __shared__ double centre[DP], energy_of_warp[kWarps];
    double* total = shared_memory<double>();  // [R, sums, threads]
    T* tile = reinterpret_cast<T*>(total + R * sums * kThreads);
    T* v_tile = tile + kTile * stride;

    const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32, d = work.d;
    const Share share(work, blockIdx.x, rows, kTile);
    const int own = share.own, other = 1 - own;
    const int64_t cloud = blockIdx.y, i0 = share.row_block * rows, n = work.n[own];
    const int64_t clouds_block = cloud * work.blocks + blockIdx.x;
    const bool force = work.force[own] != nullptr, full = work.full[own];

    // Points as they lie in memory, with their weights: the first are on their way before the centre is known.
    const auto weight_of = [&](int k, int64_t at) {
        return at >= work.n[k] ? T(0) : work.a[k] == nullptr ? T(1) : work.a[k][cloud * work.n[k] + at];
    };
    Targets<T, DP, R> x;
    T own_weight[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const int64_t at = i0 + 32 * r + lane;
#pragma unroll
        for (int c = 0; c < DP; ++c) x.u[r][c] = at < n && c < d ? work.z[own][(cloud * n + at) * d + c] : T(0);
        own_weight[r] = weight_of(own, at);
    }
    const auto cloud_of = [&](int k) { return k < share.own_count ? own : other; };
    const auto start = [&](int k) {
        const int64_t at = int64_t(share.tile(k)) * kTile + thread, many = work.n[cloud_of(k)];
        const T* const from = work.z[cloud_of(k)] + (cloud * many + at) * d;
#pragma unroll
        for (int c = 0; c < DP; ++c) {
            if (at < many && c < d) __pipeline_memcpy_async(tile + thread * stride + c, from + c, sizeof(T));
        }
        __pipeline_commit();
    };
    if (share.count > 0) start(0);

    constexpr int kAtOnce = R > 1 || DP < 10 ? 1 : (DP + kWarps - 1) / kWarps;  // coordinates of a warp
#pragma unroll
    for (int first = warp; first < DP; first += kAtOnce * kWarps) {
        T middle[kAtOnce];
        work.centre(cloud, first, kWarps, lane, middle);
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
            if (lane == 0 && first + e * kWarps < DP) centre[first + e * kWarps] = double(middle[e]);
        }
    }
    if constexpr (!ONE) work.fill(mixture);
    __shared__ double scales[2];
    if (thread == 0) scales[0] = work.coordinate_scale(), scales[1] = work.force_scale();
    __syncthreads();
    const double scale = scales[0], outer = ONE ? work.weight[0] : 1.0;

    // u and h of a point of cloud k.
    const auto centred = [&](int k, int64_t at, const T* from, T* u, T& h) {
        double square = 0;
#pragma unroll
        for (int c = 0; c < DP; ++c) {
            u[c] = at < work.n[k] && c < d ? T((double(from[c]) - centre[c]) * scale) : T(0);
            square += double(u[c]) * double(u[c]);
        }
        h = T(square / 2);
    };
#pragma unroll
    for (int r = 0; r < R; ++r) centred(own, i0 + 32 * r + lane, x.u[r], x.u[r], x.h[r]);
    for (int k = 0; k < R * sums; ++k) total[k * kThreads + thread] = 0;
    double energy = 0;

    for (int k = 0; k < share.count; ++k) {
        const bool within = k < share.own_count;
        const int64_t j0 = int64_t(share.tile(k)) * kTile;
        const bool overlaps = within && j0 < i0 + rows && i0 < j0 + kTile;
        if (k > 0) {
            __syncthreads();
            start(k);
        }
        {
            T* at = tile + thread * stride;
            const T weight = weight_of(cloud_of(k), j0 + thread);
            __pipeline_wait_prior(0);
            centred(cloud_of(k), j0 + thread, at, at, at[DP]);
            at[DP + 1] = weight;
            if constexpr (WITH_V) {
                const int64_t j = j0 + thread;
                for (int c = 0; c < DP; ++c) {
                    const bool there = within && own == 0 && j < n && c < d;
                    v_tile[thread * stride + c] = there ? T(outer) * work.v[(cloud * n + j) * d + c] : T(0);
                }
            }
        }
        __syncthreads();
        const double w = within ? work.within[own] : work.between, slope = outer * scales[1];
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
        const double times = within ? (full ? 1.0 : 2.0) : work.share_of_other, after = WITH_V ? 1.0 : w * slope;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            double* at = total + r * sums * kThreads + thread;
            const double potential = w * outer * double(x.A[r]);
            energy += times * potential * double(own_weight[r]);
            at[0] += potential;
            if (force) {
                at[kThreads] += after * double(x.G[r]);
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
    T* partial = work.partials + clouds_block * rows * (d + 1);
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
                else partial[row * (d + 1) + c] = T(value);
            }
        }
    }
    if (alone && !work.wants_energy) return;
    unsigned* const counters = all_counters + cloud * (work.row_blocks[0] + work.row_blocks[1] + 1);
    const Last last = last_of(counters + 1 + (own == 0 ? 0 : work.row_blocks[0]) + share.row_block,
                              full ? work.segments[own] : 1, counters, work.blocks);
    if (last.of_row) {
        const T* partials = partial - share.segment * rows * (d + 1);
        for (int k = thread; k < rows * (d + 1); k += kThreads) {
            double sum = 0;
#pragma unroll 4
            for (int64_t s = 0; s < work.segments[own]; ++s) sum += double(partials[s * rows * (d + 1) + k]);
            put(k / (d + 1), k % (d + 1), sum);
        }
    }
    if (!last.of_all || !work.wants_energy) return;
    double sum = 0;
    for (int64_t k = thread; k < work.blocks; k += kThreads) sum += work.energies[cloud * work.blocks + k];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) energy_of_warp[warp] = sum;
    __syncthreads();
    if (thread == 0) {
        sum = 0;
        for (int k = 0; k < kWarps; ++k) sum += energy_of_warp[k];
        work.put_energy(cloud, sum);
    }
}

template <typename T>
struct Plan {
    bool many;  // targets a lane
    Work<T> work;
    unsigned* counters = nullptr;  // of each row of segments, and of all of them
    int64_t clouds;
    size_t counter_bytes, energy_bytes, partial_bytes;
    size_t bytes() const { return counter_bytes + energy_bytes + partial_bytes; }

    Plan(const PairwiseProblem<T>& q, int64_t clouds, int processors, const Affine<T>& affine) : clouds(clouds) {
        many = sizeof(T) == 4 && q.v == nullptr && q.d <= kManyMaxDim &&
               std::max(q.n, q.y == nullptr ? 0 : q.m) * clouds >= kManyTargets;
        const int64_t rows = !many ? 32 : q.radial.rbf && q.radial.weight.size() == 1 ? 128 : 64;
        work = work_of(q, rows, kTile, affine);
        const int64_t tiles = work.tiles_of_block(clouds, int64_t(processors) * kBlocksPerProcessor);
        work.divide(tiles, tiles);
        counter_bytes = round_up(clouds * (work.row_blocks[0] + work.row_blocks[1] + 1) * int64_t(sizeof(unsigned)));
        energy_bytes = round_up(clouds * work.blocks * int64_t(sizeof(double)));
        partial_bytes = infovae_fast::partial_bytes(work, clouds, rows);
    }
};

template <typename T, int DP, int R, bool ONE, bool WITH_V>
cudaError_t launch_pairs(const Plan<T>& p, cudaStream_t stream) {
    const auto kernel = pairwise_kernel<T, DP, R, ONE, WITH_V>;
    const size_t tile = kTile * Layout<T, DP>::stride * sizeof(T);
    cudaLaunchConfig_t config{};
    config.dynamicSmemBytes = R * (DP + 2) * kThreads * sizeof(double) + tile * (WITH_V ? 2 : 1);
    if (const cudaError_t error = allow_shared(kernel, config.dynamicSmemBytes)) return error;
    config.gridDim = dim3(unsigned(p.work.blocks), unsigned(p.clouds), 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, p.work, p.counters);
}

template <typename T, int DP>
cudaError_t launch_pairs(const Plan<T>& p, cudaStream_t stream) {
    const bool one = p.work.rbf && p.work.scales == 1;
    if (p.work.v != nullptr) {
        return one ? launch_pairs<T, DP, 1, true, true>(p, stream) : launch_pairs<T, DP, 1, false, true>(p, stream);
    }
    if constexpr (sizeof(T) == 4 && DP <= kManyMaxDim) {
        if (p.many) {
            return one ? launch_pairs<T, DP, 4, true, false>(p, stream) : launch_pairs<T, DP, 2, false, false>(p, stream);
        }
    }
    return one ? launch_pairs<T, DP, 1, true, false>(p, stream) : launch_pairs<T, DP, 1, false, false>(p, stream);
}

template <typename T>
cudaError_t launch_pairs(const Plan<T>& p, cudaStream_t stream) {
    const int d = p.work.d;
    if constexpr (sizeof(T) == 8) {
        return d <= 6 ? launch_pairs<T, 6>(p, stream) : launch_pairs<T, 18>(p, stream);
    } else {
        if (d <= 2) return launch_pairs<T, 2>(p, stream);
        if (d <= 6) return launch_pairs<T, 6>(p, stream);
        return d <= 10 ? launch_pairs<T, 10>(p, stream) : launch_pairs<T, 18>(p, stream);
    }
}

// Whether tensor cores can do it, and are faster: below, what prepares the points takes longer than it saves.
template <typename T>
bool by_products(const PairwiseProblem<T>& q) {
    if (sizeof(T) == 8 || q.d > kCudaMaxProductsDim) return false;
    if (q.v != nullptr && (!q.radial.rbf || q.radial.weight.size() > 1 || q.a != nullptr || q.b != nullptr)) return false;
    int device = 0, major = 0;
    const bool known = cudaGetDevice(&device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess;
    if (!known || major < 8) return false;
    return q.d > kCudaMaxDim || (q.d >= kProductsLeastDim && std::max(q.n, q.m) >= kProductsLeastPoints);
}

}  // namespace

template <typename T>
size_t pairwise_cuda_workspace(const PairwiseProblem<T>& problem, int64_t clouds, int processors, const Affine<T>& affine) {
    if constexpr (sizeof(T) == 4) {
        if (by_products(problem)) return pairwise_products_workspace(problem, clouds, processors, affine);
    }
    return Plan<T>(problem, clouds, processors, affine).bytes();
}

template <typename T>
const char* pairwise_cuda(const PairwiseProblem<T>& problem, int64_t clouds, const double* lengths, void* workspace,
                          int processors, void* stream, const Affine<T>& affine) {
    const bool products = by_products(problem);
    if ((problem.d > kCudaMaxDim && !products) || int(problem.radial.weight.size()) > kCudaMaxScales || clouds > 65535) {
        return "at most 18 coordinates (of float 128 from compute capability 8.0 on, but where v comes with several scales or "
               "weights of points), 32 scales and 65535 clouds";
    }
    if constexpr (sizeof(T) == 4) {
        if (products) return pairwise_products(problem, clouds, lengths, workspace, processors, stream, affine);
    }
    Plan<T> p(problem, clouds, processors, affine);
    if (p.work.blocks == 0 || clouds == 0) return nullptr;
    char* memory = static_cast<char*>(workspace);
    p.work.lengths = lengths;
    p.counters = reinterpret_cast<unsigned*>(memory);
    p.work.energies = reinterpret_cast<double*>(memory + p.counter_bytes);
    p.work.partials = reinterpret_cast<T*>(memory + p.counter_bytes + p.energy_bytes);
    cudaError_t error = cudaMemsetAsync(workspace, 0, p.counter_bytes, static_cast<cudaStream_t>(stream));
    if (error == cudaSuccess) error = launch_pairs(p, static_cast<cudaStream_t>(stream));
    return text_of(error);
}

template size_t pairwise_cuda_workspace<float>(const PairwiseProblem<float>&, int64_t, int, const Affine<float>&);
template size_t pairwise_cuda_workspace<double>(const PairwiseProblem<double>&, int64_t, int, const Affine<double>&);
template const char* pairwise_cuda<float>(const PairwiseProblem<float>&, int64_t, const double*, void*, int, void*, const Affine<float>&);
template const char* pairwise_cuda<double>(const PairwiseProblem<double>&, int64_t, const double*, void*, int, void*, const Affine<double>&);

}  // namespace infovae_fast
