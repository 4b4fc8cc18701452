// A gated PixelCNN over whole images that are known, in one launch: what is between its layers stays in shared memory.
//
// A block has one image, and for all of its pixels v and h [C] in 16 bits and the sum of the skips. The weights of a layer
// come when the layer before is done. A warp takes 16 or 32 pixels from v_l to v_{l+1} and from h_l to h_{l+1}, in
// registers: the sums of a product are laid out as the left side of the next one wants them.
//
// Rows of pixels have `reach` zeros behind them, so that a tap is an offset and needs no test: pixel (y, x) is number
// y (width + reach) + x. A layer goes from the last pixels to the first, and v_{l+1}[q] takes the place of v_l[q + reach]:
// nobody reads that any more, as taps lead back but for `reach` columns. So v needs no second copy; it wanders by `reach`
// places a layer. h stays where it is. Before a warp writes, the warp that has the next pixels must have read: that alone
// is waited for inside a layer, so that some multiply while others compute gates.
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/masked_conv_work.h"
#include "cuda/products.h"
#include "cuda/shared_memory.h"
#include "resident.h"

namespace infovae_fast {
namespace {

constexpr int kWarps = 12, kThreads = 32 * kWarps;
constexpr int kRound = 2 * kWarps;  // tiles of 16 pixels, at most

// The division of shared memory, in numbers of 16 bits, and what is where in it.
struct Places {
    int row, pixels, tiles;       // row: from a row of pixels to the next; pixels and tiles with the zeros
    int image_row, image_first;   // the same of y, which has reach zeros to all sides but below; and its pixel (0, 0)
    int first_vertical, first_horizontal, vertical, horizontal;  // steps of 16 of the products of layer 0 and the others
    int weights, v, h, skip, image, offsets, sums, done;  // where they start
    int readers;      // so many tiles behind one may read what it overwrites
    int out_columns;  // params in whole pairs of 8 columns
    size_t bytes;

    explicit Places(const Resident& q) {
        const int C = int(q.maps), reach = int(q.reach), far = int(q.first_reach), channels = int(q.channels);
        row = int(q.width) + reach, pixels = int(q.height) * row, tiles = (pixels + 15) / 16;
        if (tiles % kRound > kWarps && tiles % 2 == 1) ++tiles;  // they will go in pairs
        readers = (reach * (row + 2) + 15) / 16;
        image_row = int(q.width) + 2 * far, image_first = (far * image_row + far) * channels;
        first_vertical = (far * (2 * far + 1) * channels + 15) / 16, first_horizontal = (far * channels + 15) / 16;
        vertical = (reach + 1) * (2 * reach + 1) * C / 16, horizontal = (reach + 1) * C / 16;
        out_columns = (int(q.params) + 15) / 16 * 16;
        const int others = layer_weights(C, vertical, horizontal), first = layer_weights(C, first_vertical, first_horizontal);
        const int of_weights = std::max({others, first, C * (C + out_columns)});
        const auto lines = [](int numbers) { return (numbers + 63) / 64 * 64; };  // of 128 bytes
        weights = 0, v = lines(of_weights);
        h = v + lines((reach * row + reach + int(q.layers) * reach + 16 * tiles + reach) * C);
        skip = h + lines((reach + 16 * tiles) * C), image = skip + lines(16 * tiles * C);
        offsets = image + lines((int(q.height) + far) * image_row * channels);
        sums = offsets + lines(2 * 16 * (first_vertical + first_horizontal));
        done = sums + lines(2 * 2 * 5 * C);
        bytes = size_t(done + lines(2 * tiles)) * 2;
    }
    // Of a layer: its four products.
    __host__ __device__ static int layer_weights(int C, int vertical, int horizontal) {
        return 16 * (vertical + horizontal) * 2 * C + 4 * C * C + 2 * C * C;
    }
};

// How far tiles have come, in shared memory: what a warp did before `arrive` is seen by those who have waited for it.
__device__ __forceinline__ void arrive([[maybe_unused]] int* done, [[maybe_unused]] int tiles, [[maybe_unused]] int step) {
#ifdef __CUDACC__
    __syncwarp();
    const int lane = int(threadIdx.x) % 32;
    const unsigned to = unsigned(__cvta_generic_to_shared(done + lane));
    if (lane < tiles) asm volatile("st.release.cta.shared.b32 [%0], %1;" ::"r"(to), "r"(step) : "memory");
#endif
}
__device__ __forceinline__ void wait([[maybe_unused]] const int* done, [[maybe_unused]] int tiles,
                                     [[maybe_unused]] int step) {
#if defined(__CUDACC__) && !defined(INFOVAE_FAST_BARRIERS)
    for (int k = int(threadIdx.x) % 32; k < tiles; k += 32) {
        const unsigned from = unsigned(__cvta_generic_to_shared(done + k));
        int found;
        do {
            asm volatile("ld.acquire.cta.shared.b32 %0, [%1];" : "=r"(found) : "r"(from) : "memory");
            if (found < step) __nanosleep(32);  // else those who wait take the issue slots of the others
        } while (found < step);
    }
    __syncwarp();
#else
    __syncthreads();  // tests/simt runs a warp until it meets others, racecheck knows no flags: all come here equally often
#endif
}

// Two numbers in a word, the first below.
template <typename T>
__device__ __forceinline__ unsigned packed(float first, float second) {
    const Vector<T, 2> two{{rounded<T>(first), rounded<T>(second)}};
    return *reinterpret_cast<const unsigned*>(&two);
}
template <typename T>
__device__ __forceinline__ float2 unpacked(unsigned word) {
    const auto two = widened(*reinterpret_cast<const Vector<T, 2>*>(&word));
    return {two.x[0], two.x[1]};
}

// Of two pairs (a, b), tanh(a) sigmoid(b) each.
template <typename T>
__device__ __forceinline__ unsigned gates(float2 one, float2 other) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // one reciprocal for two; what is cut off is 2^-60 of tanh(a)
        const auto power = [](float b) {
            const float x = -1.44269504f * b;
            return 1 + power_of_2(x > 60 ? 60.0f : x);  // NaN stays
        };
        const float x = power(one.y), y = power(other.y), r = near_reciprocal(x * y);
        return packed<T>(near_tanh(one.x) * (r * y), near_tanh(other.x) * (r * x));
    } else {
        return packed<T>(gate_value<T>(Gate::tanh, one.x, one.y), gate_value<T>(Gate::tanh, other.x, other.y));
    }
}

// A layer, or the head, as a warp sees it. M tiles of 16 pixels, C maps.
template <typename T, int C>
struct Warp {
    using P = Product<T>;
    static constexpr int kPairs = C / 8, kSteps = C / 16;  // columns of 2 C by 16; depth of C by 16

    const Resident& q;
    const Places& s;
    T* memory;
    int lane, place;  // place: the first of the two columns of 8 that this lane has

    __device__ Warp(const Resident& network, const Places& places, T* shared)
        : q(network), s(places), memory(shared), lane(int(threadIdx.x) % 32), place(lane % 4 * 2) {}

    // Maps 8 `chunk` .. of slot number `slot` of v or h: no two of 8 slots side by side meet in a bank.
    __device__ __forceinline__ T* at(int region, int slot, int chunk) const {
        static_assert(C == 16 || C == 32);
        const int turn = slot / (64 / C) % (C / 8);
        return memory + region + slot * C + (chunk ^ turn) * 8;
    }
    __device__ __forceinline__ int v_slot(int layer, int pixel) const {
        return int(q.reach) * (s.row + 1 + layer) + pixel;
    }
    __device__ __forceinline__ int h_slot(int pixel) const { return int(q.reach) + pixel; }
    __device__ __forceinline__ bool is_zero(int pixel) const { return pixel >= s.pixels || pixel % s.row >= int(q.width); }

    // The word of slot `slot` of v or h that has this lane's two maps of chunk `chunk`; 8 slots on it is 8 C numbers on.
    __device__ __forceinline__ unsigned* word_at(int region, int slot, int chunk) const {
        static_assert(8 % (64 / C * (C / 8)) == 0);
        return reinterpret_cast<unsigned*>(at(region, slot + lane / 4, chunk) + place);
    }

    // What is added to a pair of 8 columns from number `column` on, for two pixels.
    template <int M, int COUNT>
    __device__ __forceinline__ void start(typename P::Sums (&sums)[M][COUNT], int column, int apart) const {
        const float* const from = reinterpret_cast<const float*>(memory + s.sums) + 2 * place;
#pragma unroll
        for (int e = 0; e < 2 * M * COUNT; ++e) {
            const int j = e / 2 % COUNT, t = e % 2;
            const float4 four = *reinterpret_cast<const float4*>(from + 2 * (column + j * apart + 8 * t));
            float(&to)[4] = sums[e / 2 / COUNT][j].x[t];
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        }
    }

    // sums += left of all tiles, times 16 rows and the pairs of 8 columns first, first + apart, ... of `matrix`.
    template <int M, int COUNT>
    __device__ __forceinline__ void add(typename P::Sums (&sums)[M][COUNT], const typename P::Left (&left)[M],
                                        const T* matrix, int step, int pairs, int first, int apart) const {
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            const int place = (step * pairs + first + j * apart) * 32 + lane;
            const uint4 four = *reinterpret_cast<const uint4*>(matrix + place * 8);
            const typename P::Right right{{{four.x, four.y}, {four.z, four.w}}};
#pragma unroll
            for (int i = 0; i < M; ++i) P::add(sums[i][j], left[i], right);
        }
    }

    // sums += what a tap reads, of C maps.
    template <int M, int COUNT>
    __device__ __forceinline__ void add_tap(typename P::Sums (&sums)[M][COUNT], int region, int slot, const T* matrix,
                                            int tap, int first, int apart) const {
        const int own = slot + lane % 16;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            const T* const from = at(region, own, 2 * k + lane / 16);
            typename P::Left left[M];
#pragma unroll
            for (int i = 0; i < M; ++i) load_matrices<false>(left[i].r, from + i * 16 * C);
            add<M, COUNT>(sums, left, matrix, tap * kSteps + k, kPairs, first, apart);
        }
    }

    // sums += what the taps of layer 0 read of y.
    template <int M, int COUNT>
    __device__ __forceinline__ void add_image(typename P::Sums (&sums)[M][COUNT], const int (&pixel)[M][2], int steps,
                                              const int* offsets, const T* matrix, int first, int apart) const {
#pragma unroll 1
        for (int k = 0; k < steps; ++k) {
            typename P::Left left[M];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int2 offset = *reinterpret_cast<const int2*>(offsets + 16 * k + e / 2 * 8 + place);
#pragma unroll
                for (int i = 0; i < M; ++i) {
                    const T* const here = memory + s.image + pixel[i][e % 2];
                    const Vector<T, 2> two{{offset.x == kNone ? rounded<T>(0) : here[offset.x],
                                            offset.y == kNone ? rounded<T>(0) : here[offset.y]}};
                    left[i].r[e] = *reinterpret_cast<const unsigned*>(&two);
                }
            }
            add<M, COUNT>(sums, left, matrix, k, kPairs, first, apart);
        }
    }
    static constexpr int kNone = 1 << 30;  // instead of an offset: 0

    // What a lane has of a pair of 8 columns, in 16 bits: as the left side of a product, and as two numbers of two pixels.
    // number(tile, in the 8 columns, pixel below, of the two)
    template <int M, typename F>
    __device__ __forceinline__ static void pack(typename P::Left (&to)[M], F number) {
#pragma unroll
        for (int i = 0; i < M; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) to[i].r[e] = packed<T>(number(i, e / 2, e % 2, 0), number(i, e / 2, e % 2, 1));
        }
    }

    __device__ __forceinline__ static void unpack(typename P::Sums& to, const typename P::Left& from) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float2 two = unpacked<T>(from.r[e]);
            to.x[e / 2][e % 2 * 2] = two.x, to.x[e / 2][e % 2 * 2 + 1] = two.y;
        }
    }
    // both(tile, in the 8 columns, which of the four): the two halves
    template <int M, typename F>
    __device__ __forceinline__ static void gate(typename P::Left (&to)[M], F both) {
#pragma unroll
        for (int e = 0; e < 4 * M; ++e) {
            const float2 one = both(e / 4, e % 4 / 2, e % 2 * 2), other = both(e / 4, e % 4 / 2, e % 2 * 2 + 1);
            to[e / 4].r[e % 4] = gates<T>(one, other);
        }
    }

    // A layer for M tiles from number `tile` on, in two parts: what is read and computed, what is written.
    template <int M>
    struct Pixels {
        typename P::Left v[kSteps][M], h[kSteps][M];  // what comes next
    };

    template <int M, bool FIRST>
    __device__ __forceinline__ void compute(Pixels<M>& next, int layer, int tile) const {
        const T* matrix = memory + s.weights;
        const int pixel = 16 * tile, reach = int(q.reach);
        const bool last = layer + 1 == int(q.layers);
        [[maybe_unused]] int of_image[M][2];
        [[maybe_unused]] const int* const offsets = reinterpret_cast<const int*>(memory + s.offsets);
        if constexpr (FIRST) {
#pragma unroll
            for (int e = 0; e < 2 * M; ++e) {
                const int own = pixel + e / 2 * 16 + e % 2 * 8 + lane / 4;
                of_image[e / 2][e % 2] = s.image_first;
                if (!is_zero(own)) of_image[e / 2][e % 2] += (own / s.row * s.image_row + own % s.row) * int(q.channels);
            }
        }
        typename P::Left below[kPairs][M];
        {
            typename P::Sums f[M][kPairs];
            start(f, 0, 16);
            if constexpr (FIRST) {
                add_image<M, kPairs>(f, of_image, s.first_vertical, offsets, matrix, 0, 1);
            } else {
                int slot = v_slot(layer, pixel) - reach * s.row - reach;
#pragma unroll 1
                for (int tap = 0, y = 0; y <= reach; ++y, slot += s.row) {
#pragma unroll 3
                    for (int x = 0; x <= 2 * reach; ++x, ++tap) {
                        add_tap<M, kPairs>(f, s.v, slot + x, matrix, tap, 0, 1);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                pack<M>(below[j], [&](int i, int t, int down, int e) { return f[i][j].x[t][2 * down + e]; });
            }
#pragma unroll
            for (int j = 0; j < kSteps; ++j) {
                gate<M>(next.v[j], [&](int i, int t, int k) { return float2{f[i][j].x[t][k], f[i][j + kSteps].x[t][k]}; });
            }
        }
        const T* const link = matrix + 16 * (FIRST ? s.first_vertical : s.vertical) * 2 * C;
        const T* const horizontal = link + 4 * C * C;
        const T* const out = horizontal + 16 * (FIRST ? s.first_horizontal : s.horizontal) * 2 * C;
        typename P::Left o[kSteps][M];
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {  // 16 maps of T, both halves
            typename P::Sums f[M][2];
            start(f, 2 * C + 16 * j, C);
#pragma unroll
            for (int k = 0; k < kPairs; ++k) add<M, 2>(f, below[k], link, k, kPairs, j, kSteps);
            if constexpr (FIRST) {
                add_image<M, 2>(f, of_image, s.first_horizontal, offsets + 16 * s.first_vertical, horizontal, j, kSteps);
            } else {
#pragma unroll 2
                for (int tap = 0; tap <= reach; ++tap) {
                    add_tap<M, 2>(f, s.h, h_slot(pixel) - reach + tap, horizontal, tap, j, kSteps);
                }
            }
            gate<M>(o[j], [&](int i, int t, int k) { return float2{f[i][0].x[t][k], f[i][1].x[t][k]}; });
        }
        {  // skip += o W_s
            typename P::Sums f[M][kSteps] = {};
            if constexpr (!FIRST) {
#pragma unroll
                for (int e = 0; e < M * kSteps; ++e) {
                    const uint4 words = *skip_of(tile + e / kSteps, e % kSteps);
                    unpack(f[e / kSteps][e % kSteps], {words.x, words.y, words.z, words.w});
                }
            }
#pragma unroll
            for (int k = 0; k < kSteps; ++k) add<M, kSteps>(f, o[k], out, k, kPairs, kSteps, 1);
#pragma unroll
            for (int j = 0; j < kSteps; ++j) {
                typename P::Left sum[M];
                pack<M>(sum, [&](int i, int t, int down, int e) { return f[i][j].x[t][2 * down + e]; });
#pragma unroll
                for (int i = 0; i < M; ++i) {
                    *skip_of(tile + i, j) = uint4{sum[i].r[0], sum[i].r[1], sum[i].r[2], sum[i].r[3]};
                }
            }
        }
        if (last) return;
        typename P::Sums f[M][kSteps];  // h += o W_o + b_o
        start(f, 4 * C, 16);
        if constexpr (!FIRST) {
#pragma unroll
            for (int j = 0; j < kSteps; ++j) {
                const unsigned* const from[2] = {word_at(s.h, h_slot(pixel), 2 * j), word_at(s.h, h_slot(pixel), 2 * j + 1)};
#pragma unroll
                for (int i = 0; i < M; ++i) {
                    typename P::Left own;
#pragma unroll
                    for (int e = 0; e < 4; ++e) own.r[e] = from[e / 2][(16 * i + e % 2 * 8) * C / 2];
                    typename P::Sums before;
                    unpack(before, own);
#pragma unroll
                    for (int e = 0; e < 8; ++e) f[i][j].x[e / 4][e % 4] += before.x[e / 4][e % 4];
                }
            }
        }
#pragma unroll
        for (int k = 0; k < kSteps; ++k) add<M, kSteps>(f, o[k], out, k, kPairs, 0, 1);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            pack<M>(next.h[j], [&](int i, int t, int down, int e) { return f[i][j].x[t][2 * down + e]; });
        }
    }

    template <int M>
    __device__ __forceinline__ void write(const Pixels<M>& next, int layer, int tile, unsigned zeros) const {
        if (layer + 1 == int(q.layers)) return;
#pragma unroll
        for (int chunk = 0; chunk < C / 8; ++chunk) {
            unsigned* const to_v = word_at(s.v, v_slot(layer + 1, 16 * tile), chunk);
            unsigned* const to_h = word_at(s.h, h_slot(16 * tile), chunk);
#pragma unroll
            for (int e = 0; e < 2 * M; ++e) {
                const bool zero = zeros >> e & 1;
                const int place = 8 * e * C / 2, k = chunk % 2 * 2 + e % 2;
                to_v[place] = zero ? 0 : next.v[chunk / 2][e / 2].r[k];
                to_h[place] = zero ? 0 : next.h[chunk / 2][e / 2].r[k];
            }
        }
    }

    // The sum of the skips of a tile, 16 maps, as this lane has it.
    __device__ __forceinline__ uint4* skip_of(int tile, int j) const {
        return reinterpret_cast<uint4*>(memory + s.skip + ((tile * kSteps + j) * 32 + lane) * 8);
    }

    // params of a tile
    __device__ __forceinline__ void head(int tile, T* out) const {
        const T *const hidden = memory + s.weights, *const output = hidden + C * C;
        const auto positive = [](float x) { return x < 0 ? 0 : x; };  // NaN stays
        typename P::Left left[kSteps][1], inner[kSteps][1];
        typename P::Sums skips[1][kSteps], f[1][kSteps];
        start(skips, 0, 16), start(f, C, 16);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const uint4 words = *skip_of(tile, j);
            typename P::Sums sum;
            unpack(sum, {words.x, words.y, words.z, words.w});
            pack<1>(left[j], [&](int, int t, int down, int e) {
                return positive(sum.x[t][2 * down + e] + skips[0][j].x[t][2 * down + e]);
            });
        }
#pragma unroll
        for (int k = 0; k < kSteps; ++k) add<1, kSteps>(f, left[k], hidden, k, kSteps, 0, 1);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            pack<1>(inner[j], [&](int i, int t, int down, int e) { return positive(f[i][j].x[t][2 * down + e]); });
        }
        const float* const biases = q.biases + q.layers * 5 * C + 2 * C;
#pragma unroll 1
        for (int j = 0; j < s.out_columns / 16; ++j) {
            typename P::Sums params[1][1] = {};
#pragma unroll
            for (int k = 0; k < kSteps; ++k) add<1, 1>(params, inner[k], output, k, s.out_columns / 16, j, 1);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int column = 16 * j + e / 4 * 8 + place + e % 2, own = 16 * tile + e / 2 % 2 * 8 + lane / 4;
                if (is_zero(own) || column >= int(q.params)) continue;
                const int pixel = own / s.row * int(q.width) + own % s.row;
                out[int64_t(pixel) * q.params + column] = rounded<T>(params[0][0].x[e / 4][e % 4] + biases[column]);
            }
        }
    }
};

template <typename T, int C>
struct Network {
    Resident q;
    Places s;
};

template <typename T, int C>
__global__ void __launch_bounds__(kThreads, 1) resident_kernel(const __grid_constant__ Network<T, C> network) {
    const Resident& q = network.q;
    const Places& s = network.s;
    T* const memory = shared_memory<T>();
    const Warp<T, C> own(q, s, memory);
    const int thread = int(threadIdx.x), warp = thread / 32, far = int(q.first_reach);
    const int channels = int(q.channels), height = int(q.height), width = int(q.width);
    const int64_t code = blockIdx.x;
    int* const done = reinterpret_cast<int*>(memory + s.done);

    // The zeros before the first pixels, where the taps of layer 0 lead, and y between its own zeros.
    const auto clear = [&](int region, int from, int to) {
        for (int e = from * C + thread; e < to * C; e += kThreads) memory[region + e] = rounded<T>(0);
    };
    clear(s.v, 0, own.v_slot(1, 0)), clear(s.h, 0, own.h_slot(0));
    for (int e = thread; e < s.tiles; e += kThreads) done[e] = 0;
    int* const offsets = reinterpret_cast<int*>(memory + s.offsets);
    for (int e = thread; e < 16 * (s.first_vertical + s.first_horizontal); e += kThreads) {
        const bool across = e >= 16 * s.first_vertical;
        const int k = across ? e - 16 * s.first_vertical : e, tap = k / channels, side = 2 * far + 1;
        const int dy = across ? 0 : tap / side - far, dx = across ? tap - far : tap % side - far;
        const bool there = tap < (across ? far : far * side);
        offsets[e] = there ? (dy * s.image_row + dx) * channels + k % channels : Warp<T, C>::kNone;
    }
    after_previous();
    const T* const y = static_cast<const T*>(q.y) + code % q.images * channels * height * width;
    for (int e = thread; e < (height + far) * s.image_row * channels; e += kThreads) {
        const int row = e / channels / s.image_row - far, column = e / channels % s.image_row - far, c = e % channels;
        const bool there = row >= 0 && unsigned(column) < unsigned(width);
        memory[s.image + e] = there ? y[(c * height + row) * width + column] : rounded<T>(0);
    }

    const T* table = static_cast<const T*>(q.table);
    const auto bring = [&](int count) {
        for (int e = thread * 8; e < count; e += kThreads * 8) {
            __pipeline_memcpy_async(memory + s.weights + e, table + e, 16);
        }
        __pipeline_commit();
        table += count;
    };
    float* const sums = reinterpret_cast<float*>(memory + s.sums);
    const auto put = [&](int column, float x) {  // where `start` finds it, once for each of two pixels
        float* const to = sums + column / 2 * 4 + column % 2;
        to[0] = x, to[2] = x;
    };
    const auto each_round = [&](auto run) {  // run(tiles of a warp, the first, are there any, round), from the last on
        int end = s.tiles, round = 0;
        for (; end > kWarps; end = max(end - kRound, 0), ++round) {
            const int tile = max(end - kRound, 0) + 2 * warp;
            run(std::integral_constant<int, 2>{}, tile, tile < end, round);
        }
        if (end > 0) run(std::integral_constant<int, 1>{}, warp, warp < end, round);
    };
    unsigned zeros = 0;  // of this lane's pixels, four bits for each round
    each_round([&](auto count, int tile, bool, int round) {
        for (int e = 0; e < 2 * decltype(count)::value; ++e) {
            zeros |= unsigned(own.is_zero(16 * tile + 8 * e + thread % 32 / 4)) << (4 * round + e);
        }
    });
    const auto layer = [&](auto first, int l) {
        constexpr bool FIRST = decltype(first)::value;
        bring(Places::layer_weights(C, FIRST ? s.first_vertical : s.vertical, FIRST ? s.first_horizontal : s.horizontal));
        const T* const condition = static_cast<const T*>(q.condition);
        for (int e = thread; e < 5 * C; e += kThreads) {
            const bool conditioned = condition != nullptr && e < 4 * C;
            put(e, q.biases[l * 5 * C + e] + (conditioned ? widened(condition[(code * q.layers + l) * 4 * C + e]) : 0.0f));
        }
        __pipeline_wait_prior(0);
        __syncthreads();
        each_round([&](auto count, int tile, bool any, int round) {
            constexpr int M = decltype(count)::value;
            typename Warp<T, C>::template Pixels<M> next;
            if (any) own.template compute<M, FIRST>(next, l, tile), arrive(done + tile, M, l + 1);
            wait(done + tile + M, any ? min(s.readers, s.tiles - tile - M) : 0, l + 1);
            if (any) own.template write<M>(next, l, tile, zeros >> 4 * round);
        });
        __syncthreads();
        clear(s.v, own.v_slot(l, 0), own.v_slot(l + 1, 0));
    };
    layer(std::true_type{}, 0);
#pragma unroll 1
    for (int l = 1; l < int(q.layers); ++l) layer(std::false_type{}, l);

    bring(C * (C + s.out_columns));
    for (int e = thread; e < 2 * C; e += kThreads) put(e, q.biases[q.layers * 5 * C + e]);
    __pipeline_wait_prior(0);
    __syncthreads();
    T* const out = static_cast<T*>(q.out) + code * height * width * q.params;
    each_round([&](auto count, int tile, bool any, int) {
        for (int i = 0; i < decltype(count)::value && any; ++i) own.head(tile + i, out);
    });
}

}  // namespace

ResidentNeed resident_cuda_need(const Resident& q) {
    const Places s(q);
    ResidentNeed need{};
    const auto layer = [&](int vertical, int horizontal) { return Places::layer_weights(int(q.maps), vertical, horizontal); };
    need.table = layer(s.first_vertical, s.first_horizontal) + (q.layers - 1) * layer(s.vertical, s.horizontal) +
                 q.maps * (q.maps + s.out_columns);
    need.biases = q.layers * 5 * q.maps + 2 * q.maps + q.params;
    need.shared = s.bytes;
    need.tiles = s.tiles, need.readers = s.readers;
    if (q.maps != 16 && q.maps != 32) need.error = "16 or 32 maps";
    else if (q.n > 0x7fffffff) need.error = "fewer than 2^31 codes";
    return need;
}

const char* resident_cuda(bool bfloat16, const Resident& q, void* stream) {
    const ResidentNeed need = resident_cuda_need(q);
    if (need.error != nullptr) return need.error;
    const auto run = [&](auto zero, auto maps) {
        using T = decltype(zero);
        constexpr int C = decltype(maps)::value;
        const Network<T, C> network{q, Places(q)};
        const dim3 grid(unsigned(q.n), 1, 1);
        return text_of(launch(resident_kernel<T, C>, grid, kThreads, need.shared, static_cast<cudaStream_t>(stream), network));
    };
    const auto by_maps = [&](auto zero) {
        return q.maps == 16 ? run(zero, std::integral_constant<int, 16>{}) : run(zero, std::integral_constant<int, 32>{});
    };
    return bfloat16 ? by_maps(__nv_bfloat16{}) : by_maps(__half{});
}

}  // namespace infovae_fast
