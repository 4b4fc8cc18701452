// Masked convolution on a GPU, as products of matrices on its tensor cores. With pixels p in one row, channels last, and
// zeros outside the image,
//
//     f[p]      = sum_k columns[p, k] matrix[k] + bias + condition     k: (tap, input channel), then the link's channels
//     dx[p]     = sum_k df[p - t] weight[t]^T                          k: (tap, output channel): the same kernel, mirrored
//     dweight_k = sum_p columns[p, k] df[p]                            a segment of the pixels for each block
//
// The gradient to the bias is a dweight of a column of ones, where a tile has room for it, or is summed where df is made.
// A block has a tile of the result in the registers of its warps. What it multiplies comes through shared memory, some
// steps ahead; no column is ever in memory as a whole. Then the tile goes through shared memory to those who add bias
// and condition and compute the gate. Columns of a block are of one group of colours, the same in both halves of a gate.
// What an output may not see is zero where it is loaded, data and weights both: 0 * NaN never happens.
//
// 16 bit numbers are multiplied as they are and summed in float (where the weights fit shared memory, by a kernel of their
// own: masked_conv_kept.h); float as four products of TF32, which keep its digits, or one where that is allowed. There are
// no atomics: the bits do not change from run to run.
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/masked_conv_kept.h"
#include "cuda/masked_conv_work.h"
#include "cuda/products.h"
#include "cuda/shared_memory.h"

namespace infovae_fast {
namespace {

constexpr int kThreads = 32 * kWarpRows * kWarpColumns;
constexpr int kStepBytes = 80 << 10;  // of the steps of a product in shared memory, wanted
constexpr int kBlocksPerProcessor = 2;  // of the gradient to weight, wanted
constexpr int kGateRows = 64, kGateColumns = 64;  // of a block of the gradient to f: rows at least, channels at most
template <typename T>
constexpr int kGateBlocks = sizeof(T) == 8 ? 3 : 4;  // of a processor
template <typename T>
constexpr int kGateVector = kVector<T> / 2;  // what a thread has of two rows stays in registers
constexpr int kNoRow = -(1 << 20);  // where no tap leads back into the image

// Number k of the sum over (tap, channel).
struct Column {
    int tap, channel;

    template <typename T>
    __device__ Column(const Work<T>& w, int k) : tap(k / w.in), channel(k % w.in) {}
    template <typename T>
    __device__ __forceinline__ void advance(const Work<T>& w, int by) {
        for (channel += by; channel >= w.in; ++tap) channel -= w.in;
    }
    template <bool MIRRORED, typename T>
    __device__ __forceinline__ bool seen(const Work<T>& w, int group) const {
        if (w.groups == 1 || tap != w.taps - 1) return tap < w.taps;
        const int other = w.group_of(channel, w.grouped);
        return MIRRORED ? group < other + w.own : other < group + w.own;
    }
};

// Where its number for a pixel lies: at base[(pixel - first) stride], if (dy, dx) leads into the image.
template <typename T>
struct Place {
    const T* base;
    int dy, dx, stride;
};
template <bool MIRRORED, typename T>
__device__ __forceinline__ Place<T> place_of(const Work<T>& w, const Column& c, bool seen, int64_t first) {
    if (!seen) return {w.source, kNoRow, 0, 0};
    const int dy = MIRRORED ? -w.tap[c.tap].dy : w.tap[c.tap].dy, dx = MIRRORED ? -w.tap[c.tap].dx : w.tap[c.tap].dx;
    const int64_t at = (first + dy * w.w + dx) * w.source_channels + c.channel;
    if (MIRRORED && c.channel >= w.source_channels) return {w.source_b + (at - w.source_channels), dy, dx, w.source_channels};
    return {w.source + at, dy, dx, w.source_channels};
}

// V numbers to shared memory, or `instead` and zeros. More than one come later, when the pipeline says so.
template <int V, typename T>
__device__ __forceinline__ void bring(T* to, const T* from, bool there, T instead) {
    if constexpr (V == 1) {
        *to = there ? *from : instead;
    } else if (there) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1200
        // By way of L1, where the taps of a tile meet again: what cuda_pipeline.h has goes past it. (From 12.0 on it spills.)
        static_assert(V * sizeof(T) == 16);
        const unsigned at = unsigned(__cvta_generic_to_shared(to));
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
#else
        __pipeline_memcpy_async(to, from, V * sizeof(T));
#endif
    } else {
        int4 bits{};
        std::memcpy(&bits, &instead, sizeof instead);
        *reinterpret_cast<int4*>(to) = bits;
    }
}

// A thread has one place in all rows of `size` numbers that are read in vectors of `vector`.
template <typename T, int SIZE>
__device__ __forceinline__ int place_in(bool wide) {
    constexpr int V = kVector<T>;
    return wide ? int(threadIdx.x) % (SIZE / V) * V : int(threadIdx.x) % SIZE;
}

// Rows of SIZE numbers to shared memory, in vectors of V, or `instead` and zeros for a row that is not there(row, k), the
// thread's own number k. `from` is where the thread's own place in row 0 comes from.
template <int V, int SIZE, int ROWS, int UNROLL = V == 1 ? 2 : ROWS, typename T, typename There>
__device__ __forceinline__ void bring_rows(T* to, int pitch, const T* from, int stride, There there,
                                           T instead = rounded<T>(0)) {
    constexpr int across = SIZE / V, lines = kThreads / across;
    static_assert(kThreads % across == 0 && ROWS % lines == 0);
    const int line = int(threadIdx.x) / across;
    to += line * pitch + int(threadIdx.x) % across * V, from += int64_t(line) * stride;
#pragma unroll UNROLL
    for (int k = 0; k < ROWS / lines; ++k, to += lines * pitch, from += lines * stride) {
        bring<V>(to, from, there(line + k * lines, k), instead);
    }
}

// run(V) for the width of vectors.
template <typename T, typename F>
__device__ __forceinline__ void by_vector(bool wide, F run) {
    if (wide) {
        run(std::integral_constant<int, kVector<T>>{});
    } else {
        run(std::integral_constant<int, 1>{});
    }
}

// Shared memory: the steps of a product, or afterwards the tile; then y, x and image of the rows.
template <typename T, int NB>
struct Room {
    static constexpr int rows = Product<T>::rows, depth = Product<T>::depth;
    // By pixels: left [rows, depth], right [depth, NB], mirrored [NB, depth]. By channels: [depth, rows], [depth, NB].
    // What lies behind a row keeps lanes from meeting in a bank.
    static constexpr int behind = sizeof(T) == 4 ? 2 * kVector<T> : kVector<T>;
    static constexpr int narrow = depth + kVector<T>, tall = rows + behind, wide = NB + behind;
    static constexpr int by_pixels = rows * narrow, by_channels = depth * tall;
    static constexpr int right = depth * wide, mirrored = NB * narrow;
    static constexpr int left = by_pixels > by_channels ? by_pixels : by_channels;
    static constexpr int step = left + (right > mirrored ? right : mirrored);
    static constexpr int wanted = kStepBytes / int(step * sizeof(T)), stages = wanted < 2 ? 2 : wanted < 4 ? wanted : 4;
    static constexpr size_t steps = stages * step * sizeof(T);
    static constexpr size_t tile = rows * Tile<T, NB>::pitch * sizeof(SumOf<T>);
    static constexpr size_t most = steps > tile ? steps : tile, all = most + rows * sizeof(int4);
    static_assert(left * sizeof(T) % 16 == 0 && step * sizeof(T) % 16 == 0 && most % 16 == 0);
};

// load(step, slot) for all steps, some ahead of compute(slot): at first one for each slot.
template <int STAGES, typename Load, typename Compute>
__device__ __forceinline__ void pipeline(int steps, Load load, Compute compute) {
#pragma unroll 1
    for (int next = 0; next < steps + STAGES - 1; ++next) {
        const int s = next - (STAGES - 1);
        if (s > 0) {
            __pipeline_wait_prior(STAGES - 2);
            __syncthreads();  // what all have brought is there, and all are done with the slot that comes next
        }
        if (next < steps) load(next, next % STAGES);
        __pipeline_commit();
        if (s == 0) {
            __pipeline_wait_prior(STAGES - 1);
            __syncthreads();
        }
        if (s >= 0) compute(s % STAGES);
    }
    __pipeline_wait_prior(0);
    __syncthreads();
}

#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kMostBlocks = 2;  // more would not fit shared memory
#else
constexpr int kMostBlocks = 3;
#endif
template <typename T, int NB>
constexpr int kBlocks = sizeof(T) == 2 && NB == 64 ? kMostBlocks : 2;  // of a processor, at a time

// A tile of pixels x channels of one group, with a gate in both halves: the convolution, or its gradient to x.
template <typename T, int NB, bool MIRRORED>
__global__ void __launch_bounds__(kThreads, kBlocks<T, NB>)
    conv_kernel(const __grid_constant__ Work<T> w) {
    using P = Product<T>;
    using R = Room<T, NB>;
    T* const memory = shared_memory<T>();
    int4* const rows = reinterpret_cast<int4*>(shared_memory<unsigned char>() + R::most);  // y, x, image
    const int halves = MIRRORED || w.gate == Gate::none ? 1 : 2, columns = NB / halves, width = halves * w.out_channels;
    const int part = w.out_channels / w.groups, tiles = (part + columns - 1) / columns;
    const int group = int(blockIdx.y) / tiles, first_column = int(blockIdx.y) % tiles * columns;
    const int64_t first = int64_t(blockIdx.x) * P::rows;
    const auto place = [&](int j) { return w.groups > 1 && w.interleaved ? j * w.groups + group : group * part + j; };

    for (int row = int(threadIdx.x); row < P::rows; row += kThreads) {
        const int64_t size = int64_t(w.h) * w.w, image = (first + row) / size;
        const int local = int(first + row - image * size);
        rows[row] = int4{first + row < w.pixels ? local / w.w : kNoRow, local % w.w, int(image), 0};
    }
    __syncthreads();
    after_previous();

    // What each thread loads: a column of the source, of its mirrored weights too, or the weights to one output.
    const int along = place_in<T, P::depth>(w.wide_source);
    Column column(w, along);
    constexpr int kOwnRows = P::rows * P::depth / kVector<T> / kThreads;  // of a thread, when they are read in vectors
    int own_row[kOwnRows];  // y, x in 16 bits each
#pragma unroll
    for (int k = 0; k < kOwnRows; ++k) {
        const int4 at = rows[int(threadIdx.x) / (P::depth / kVector<T>) + k * (P::rows / kOwnRows)];
        own_row[k] = at.x == kNoRow ? INT_MIN : at.x << 16 | at.y;  // y = -32768: no tap leads back from there
    }
    const int c = place_in<T, NB>(w.wide_weight), j = first_column + (c < columns ? c : c - columns);
    const int output = j < part ? place(j) + (c < columns ? 0 : w.out_channels) : -1;

    const int own = w.taps * w.in, own_steps = (own + P::depth - 1) / P::depth;
    const auto load = [&](int step, int slot) {
        T* const left = memory + slot * R::step;
        T* const right = left + R::left;
        const bool linked = !MIRRORED && step >= own_steps;
        const int k = (linked ? step - own_steps : step) * P::depth, end = linked ? w.links : own;
        const bool wide = linked ? w.wide_link : w.wide_source;
        const int channel = k + place_in<T, P::depth>(wide);  // of the link
        const Place<T> p = linked ? Place<T>{w.link + first * w.links + channel, channel < end ? 0 : kNoRow, 0, w.links}
                                  : place_of<MIRRORED>(w, column, column.seen<MIRRORED>(w, group), first);
        by_vector<T>(wide, [&](auto vector) {
            constexpr int V = decltype(vector)::value;
            bring_rows<V, P::depth, P::rows>(left, R::narrow, p.base, p.stride, [&](int row, int k) {
                if constexpr (V == 1) return inside(w, rows[row].x + p.dy, rows[row].y + p.dx);
                return inside(w, (own_row[k] >> 16) + p.dy, (own_row[k] & 0xffff) + p.dx);
            });
        });
        by_vector<T>(w.wide_weight, [&](auto vector) {
            constexpr int V = decltype(vector)::value;
            if constexpr (MIRRORED) {
                const int last = p.dy != kNoRow ? part - first_column : 0;
                const T* const from =
                    w.weight + (int64_t(column.tap) * w.out_channels + place(first_column)) * w.in + column.channel;
                bring_rows<V, P::depth, NB>(right, R::narrow, from, (place(1) - place(0)) * w.in,
                                            [&](int row, int) { return row < last; });
            } else {
                const int last = output >= 0 ? end - k : 0, coloured = own - w.in - k;  // the first row of the last tap
                const T* const from = (linked ? w.link_weight : w.weight) + int64_t(k) * width + output;
                if (linked || w.groups == 1 || coloured >= P::depth) {
                    bring_rows<V, NB, P::depth>(right, R::wide, from, width, [&](int row, int) { return row < last; });
                } else {
                    bring_rows<V, NB, P::depth, 1>(right, R::wide, from, width, [&](int row, int) {
                        const bool seen = row < coloured || w.group_of(row - coloured, w.grouped) < group + w.own;
                        return seen && row < last;
                    });
                }
            }
        });
        column.advance(w, P::depth);
    };
    Tile<T, NB> tile;
    pipeline<R::stages>(own_steps + (w.links + P::depth - 1) / P::depth, load, [&](int slot) {
        const T* const left = memory + slot * R::step;
        tile.template multiply<true, !MIRRORED>(left, R::narrow, left + R::left, MIRRORED ? R::narrow : R::wide, w.exact);
    });
    SumOf<T>* const sums = shared_memory<SumOf<T>>();
    tile.store(sums);
    __syncthreads();

    by_vector<T>(w.wide_out, [&](auto vector) {
        constexpr int V = decltype(vector)::value;
        const int across = columns / V, lines = kThreads / across, c = int(threadIdx.x) % across * V;
        const int channel = place(first_column + c), end = int(min(int64_t(P::rows), w.pixels - first));
        if (first_column + c >= part) return;
        Packed<T, V> bias[2] = {}, next[2] = {};  // the condition, a row ahead
        const auto read = [&](const T* from, Packed<T, V>(&to)[2]) {
            to[0].read(from);
            if (halves == 2) to[1].read(from + w.out_channels);
        };
        const auto read_condition = [&](int row) {
            if (MIRRORED || w.condition == nullptr || row >= end) return;
            read(w.condition + (w.spatial ? first + row : rows[row].z) * width + channel, next);
        };
        if (!MIRRORED && w.bias != nullptr) read(w.bias + channel, bias);
        int row = int(threadIdx.x) / across;
        if (!MIRRORED && w.out_b != nullptr) {
#pragma unroll 2
            for (; row < end; row += lines) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const T* const added = half == 0 ? w.condition : w.condition_b;
                    const int64_t at = (first + row) * w.out_channels + channel;
                    Vector<SumOf<T>, V> value = vector_at<V>(sums + row * Tile<T, NB>::pitch + c + half * columns);
                    value += bias[half].numbers();
                    if (added != nullptr) value += widened(vector_at<V>(added + at));
                    write((half == 0 ? w.out : w.out_b) + at, value);
                }
            }
            return;
        }
        read_condition(row);
        for (; row < end; row += lines) {
            const int64_t pixel = first + row;
            const Packed<T, V> condition[2] = {next[0], next[1]};
            read_condition(row + lines);
            Vector<SumOf<T>, V> value[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (half >= halves) continue;
                value[half] = vector_at<V>(sums + row * Tile<T, NB>::pitch + c + half * columns);
                value[half] += bias[half].numbers(), value[half] += condition[half].numbers();
                if (!MIRRORED && w.f != nullptr) write(w.f + pixel * width + channel + half * w.out_channels, value[half]);
            }
            if (halves == 2) {
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    value[0].x[e] = gate_value<T>(w.gate, value[0].x[e], value[1].x[e]);
                }
            }
            write(w.out + pixel * w.out_channels + channel, value[0]);
        }
    });
}

// The gradient to rows (tap, input channel) x NB columns of weight, then those of the link's, from a segment of the pixels.
template <typename T, int NB>
__global__ void __launch_bounds__(kThreads, 2) weight_kernel(const __grid_constant__ Work<T> w) {
    using P = Product<T>;
    using R = Room<T, NB>;
    T* const memory = shared_memory<T>();
    const int first_row = int(blockIdx.x) * P::rows, first_column = int(blockIdx.y) * NB;
    const int own = w.taps * w.in, rows = own + w.links;
    const int64_t begin = int64_t(blockIdx.z) * w.segment;
    const int pixels = int(begin + w.segment < w.pixels ? w.segment : w.pixels - begin);

    // What each thread loads: a column of x and one of the gradient, at pixels that are `lines` apart.
    const int vector = w.wide_source ? kVector<T> : 1, lines = kThreads / (P::rows / vector);
    const int k = first_row + place_in<T, P::rows>(w.wide_source);
    const int channel = first_column + place_in<T, NB>(w.wide_weight);
    Place<T> p = place_of<false>(w, Column(w, k), k < own, begin);
    if (k >= own && k < rows) p = {w.link + begin * w.links + k - own, 0, 0, w.links};
    const int half = w.gradient_b == nullptr ? w.out_channels : w.out_channels / 2;  // of channels that lie together
    const T* gradient = channel < half ? w.gradient + begin * half + channel : w.gradient_b + begin * half + channel - half;
    int known = channel < w.out_channels ? pixels : 0;
    const int64_t start = begin + int(threadIdx.x) / (P::rows / vector);
    int y = int(start / w.w % w.h), x = int(start % w.w);  // of the next one
    const int rows_apart = lines / w.w % w.h, columns_apart = lines % w.w;
    after_previous();

    const auto load = [&](int step, int slot) {
        T* const left = memory + slot * R::step;
        T* const right = left + R::left;
        const int last = pixels - step * P::depth;
        by_vector<T>(w.wide_source, [&](auto vector) {
            constexpr int V = decltype(vector)::value;
            // Of the column of ones; a pixel too many meets no gradient.
            const bool one = w.sums && w.taps * w.in + w.links - int(blockIdx.x) * P::rows == place_in<T, P::rows>(V > 1);
            bring_rows<V, P::rows, P::depth>(left, R::tall, p.base, p.stride, [&](int row, int) {
                const bool there = row < last && inside(w, y + p.dy, x + p.dx);
                x += columns_apart, y += rows_apart;
                if (x >= w.w) x -= w.w, ++y;
                if (y >= w.h) y -= w.h;
                return there;
            }, rounded<T>(one ? 1 : 0));
        });
        by_vector<T>(w.wide_weight, [&](auto vector) {
            constexpr int V = decltype(vector)::value;
            bring_rows<V, NB, P::depth>(right, R::wide, gradient, half, [&](int row, int) { return row < known; });
        });
        p.base += p.stride * P::depth, gradient += half * P::depth, known -= P::depth;
    };
    Tile<T, NB> tile;
    pipeline<R::stages>((pixels + P::depth - 1) / P::depth, load, [&](int slot) {
        const T* const left = memory + slot * R::step;
        tile.template multiply<false, true>(left, R::tall, left + R::left, R::wide, w.exact);
    });
    SumOf<T>* const sums = shared_memory<SumOf<T>>();
    tile.store(sums);
    __syncthreads();
    const int column = first_column + int(threadIdx.x) % NB;
    if (column >= w.out_channels) return;
    const int written = rows + (w.sums ? 1 : 0);
    SumOf<T>* const parts = w.parts + int64_t(blockIdx.z) * written * w.out_channels + column;
    for (int e = int(threadIdx.x); e < P::rows * NB; e += kThreads) {
        const int row = first_row + e / NB, hidden_from = (w.taps - 1) * w.in;
        if (row >= written) return;
        const bool hidden = w.groups > 1 && row >= hidden_from && row < own &&
                            w.group_of(row - hidden_from, w.in) >= w.group_of(column, w.grouped) + w.own;
        parts[int64_t(row) * w.out_channels] = hidden ? SumOf<T>(0) : sums[e / NB * Tile<T, NB>::pitch + e % NB];
    }
}

// Adds what lanes of a warp have whose numbers differ by a multiple of `across`.
template <typename S, int V>
__device__ __forceinline__ void add_lanes(Vector<S, V>& sum, int across) {
    for (int apart = across; apart < 32; apart *= 2) {
#pragma unroll
        for (int e = 0; e < V; ++e) sum.x[e] += __shfl_xor_sync(0xffffffffu, sum.x[e], apart);
    }
}

// The gradient to f from those to out and, if there is one, to f itself; and its sums over blocks of pixels of an image.
template <typename T>
struct GateWork {
    const T *f, *gradient, *extra;  // f: null without a gate
    T* f_gradient;                  // null without a gate
    SumOf<T>* parts;                // [n, blocks, width] or null
    int size, half, blocks;         // pixels of an image, channels of out
    int columns;                    // of out, of a block: a power of 2
    bool wide;
    Gate gate;
};
// While a row is computed, the next one of its thread comes.
template <typename T>
__global__ void __launch_bounds__(kThreads, kGateBlocks<T>) gate_kernel(const __grid_constant__ GateWork<T> w) {
    using S = SumOf<T>;
    __shared__ __align__(sizeof(int4)) S sums[kThreads / 32][2 * kGateColumns];
    after_previous();
    const int64_t image = blockIdx.x / unsigned(w.blocks);
    const int block = int(blockIdx.x % unsigned(w.blocks)), halves = w.gate == Gate::none ? 1 : 2;
    const int rows = (w.size + w.blocks - 1) / w.blocks, end = min(w.size, (block + 1) * rows);
    const auto run = [&](auto vector, auto inputs) {
        constexpr int V = decltype(vector)::value, INPUTS = decltype(inputs)::value;  // gradient, both of f, both of extra
        const int across = w.columns / V, lines = kThreads / across;
        const int lane = int(threadIdx.x) % across, column = int(blockIdx.y) * w.columns + lane * V;
        int row = column < w.half ? block * rows + int(threadIdx.x) / across : end;
        const int64_t start = (image * w.size + row) * w.half, at = 2 * start + column, apart = int64_t(lines) * w.half;
        const T *gradient = w.gradient + start + column, *f = INPUTS > 1 ? w.f + at : nullptr;
        const T* extra = INPUTS > 3 ? w.extra + at : nullptr;
        T* to_f = INPUTS > 1 ? w.f_gradient + at : nullptr;
        Packed<T, V> next[INPUTS];
        const auto read = [&] {
            next[0].read(gradient), gradient += apart;
            if constexpr (INPUTS > 1) next[1].read(f), next[2].read(f + w.half), f += 2 * apart;
            if constexpr (INPUTS > 3) next[3].read(extra), next[4].read(extra + w.half), extra += 2 * apart;
        };
        if (row < end) read();
        Vector<S, V> sum[2] = {};
#pragma unroll 1
        while (row < end) {
            Packed<T, V> now[INPUTS];
#pragma unroll
            for (int k = 0; k < INPUTS; ++k) now[k] = next[k];
            if ((row += lines) < end) read();
            Vector<S, V> to[2] = {now[0].numbers(), {}};
            if constexpr (INPUTS > 1) {
                const Vector<S, V> a = now[1].numbers(), b = now[2].numbers();
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    const Gated<S> one = gated_of<T>(w.gate, a.x[e], b.x[e]);
                    to[1].x[e] = to[0].x[e] * one.by_b, to[0].x[e] *= one.by_a;
                }
                if constexpr (INPUTS > 3) to[0] += now[3].numbers(), to[1] += now[4].numbers();
                write(to_f, to[0]), write(to_f + w.half, to[1]), to_f += 2 * apart;
                sum[1] += to[1];
            }
            sum[0] += to[0];
        }
        if (w.parts == nullptr) return;
#pragma unroll
        for (int half = 0; half < (INPUTS > 1 ? 2 : 1); ++half) {
            add_lanes(sum[half], across);
            if (int(threadIdx.x) % 32 >= across) continue;
            write(&sums[threadIdx.x / unsigned(max(across, 32))][half * kGateColumns + lane * V], sum[half]);
        }
    };
    const auto by_inputs = [&](auto vector) {
        if (halves == 1) run(vector, std::integral_constant<int, 1>{});
        else if (w.extra == nullptr) run(vector, std::integral_constant<int, 3>{});
        else run(vector, std::integral_constant<int, 5>{});
    };
    if (w.wide) by_inputs(std::integral_constant<int, kGateVector<T>>{});
    else by_inputs(std::integral_constant<int, 1>{});
    if (w.parts == nullptr) return;
    __syncthreads();
    const int lines = kThreads / max(w.columns / (w.wide ? kGateVector<T> : 1), 32);
    for (int e = int(threadIdx.x); e < halves * w.columns; e += kThreads) {
        const int half = e / w.columns, of = e % w.columns, channel = int(blockIdx.y) * w.columns + of;
        if (channel >= w.half) continue;
        S total = 0;
#pragma unroll 4
        for (int k = 0; k < lines; ++k) total += sums[k][half * kGateColumns + of];
        w.parts[(int64_t(blockIdx.x) * halves + half) * w.half + channel] = total;
    }
}

// out[outer, e] = sum over count of parts[outer, count, e], e < size; a part has `stride` numbers
template <typename T>
struct Addition {
    const SumOf<T>* parts;
    int64_t outer, count, size, stride;
    T* out;
};
template <typename T>
struct Additions {
    Addition<T> each[4];  // to weight, link_weight, bias (or its halves), condition
    int number = 0;

    void add(const Addition<T>& one) {
        if (one.out != nullptr && one.size > 0) each[number++] = one;
    }
};

// Each warp of a block adds some of the parts, in an order of its own.
template <typename T>
__global__ void __launch_bounds__(kThreads) add_kernel(const __grid_constant__ Additions<T> additions) {
    constexpr int lines = kThreads / 32;
    __shared__ double sums[lines][32];
    const Addition<T>& w = additions.each[blockIdx.y];
    const int lane = int(threadIdx.x) % 32, line = int(threadIdx.x) / 32;
    const int64_t at = int64_t(blockIdx.x) * 32 + lane;
    after_previous();
    double total = 0;  // the parts may be thousands
    if (at < w.outer * w.size) {
        const SumOf<T>* from = w.parts + at / w.size * w.count * w.stride + at % w.size;
#pragma unroll 8
        for (int64_t k = line; k < w.count; k += lines) total += from[k * w.stride];
    }
    sums[line][lane] = total;
    __syncthreads();
    if (line > 0 || at >= w.outer * w.size) return;
    for (int k = 1; k < lines; ++k) total += sums[k][lane];
    w.out[at] = rounded<T>(SumOf<T>(total));
}

int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// What goes wrong first.
struct Errors {
    cudaError_t first = cudaSuccess;
    void operator+=(cudaError_t error) { first = first == cudaSuccess ? error : first; }
};

// A convolution on the way to its kernels.
template <typename T>
class Conv {
public:
    Conv(const MaskedConv& conv, bool exact, cudaStream_t stream) : q(conv), stream_(stream) {
        work_.pixels = q.n * q.h * q.w, work_.h = int(q.h), work_.w = int(q.w), work_.taps = int(q.taps.size());
        work_.groups = int(q.colours.groups), work_.interleaved = q.colours.interleaved, work_.own = q.colours.own;
        work_.exact = exact;
        for (int t = 0; t < work_.taps; ++t) work_.tap[t] = {short(q.taps[t].dy), short(q.taps[t].dx)};
        half_ = int(q.gated ? q.cout / 2 : q.cout);
    }

    cudaError_t forward(const T* x, const T* weight, const Link<T>& link, const T* bias, const T* condition, bool spatial,
                        Gate gate, T* out, T* f) const {
        Work<T> w = work_;
        w.source = x, w.weight = weight, w.link = link.values, w.link_weight = link.weight, w.links = int(link.channels);
        w.bias = bias, w.condition = condition, w.spatial = spatial, w.gate = gate, w.out = out, w.f = f;
        w.in = w.source_channels = w.grouped = int(q.cin), w.out_channels = half_;
        w.wide_source = whole(w.in) && together(w.in) && aligned(x), w.wide_link = whole(w.links) && aligned(link.values);
        w.wide_weight = whole(half_) && together(half_) && aligned(weight) && aligned(link.weight);
        w.wide_out = whole(half_) && together(half_) && aligned(out) && aligned(f) && aligned(bias) && aligned(condition);
        return by_width<false>(w, gate == Gate::none ? 1 : 2);
    }

    // Both halves of f, each beside what is added to it.
    cudaError_t forward(const T* x, const T* weight, const T* bias, const Halves<const T>& added,
                        const Halves<T>& out) const {
        Work<T> w = work_;
        w.source = x, w.weight = weight, w.bias = bias, w.spatial = true, w.gate = Gate::halves;
        w.condition = added.a, w.condition_b = added.b, w.out = out.a, w.out_b = out.b;
        w.in = w.source_channels = w.grouped = int(q.cin), w.out_channels = half_;
        w.wide_source = whole(w.in) && together(w.in) && aligned(x);
        w.wide_weight = whole(half_) && together(half_) && aligned(weight);
        w.wide_out = whole(half_) && together(half_) && aligned(bias) && aligned(added) && aligned(out);
        return by_width<false>(w, 2);
    }

    // The gradient to f is that of .a alone, or of two halves.
    cudaError_t to_x(const Halves<const T>& f_gradient, const T* weight, T* out) const {
        Work<T> w = work_;
        w.source = f_gradient.a, w.source_b = f_gradient.b, w.weight = weight, w.out = out, w.gate = Gate::none;
        w.in = int(q.cout), w.source_channels = f_gradient.b == nullptr ? w.in : half_;
        w.grouped = half_, w.out_channels = int(q.cin);
        w.wide_source = w.wide_weight =
            whole(w.in) && whole(half_) && together(half_) && aligned(f_gradient) && aligned(weight);
        w.wide_out = whole(w.out_channels) && together(w.out_channels) && aligned(out);
        return by_width<true>(w, 1);
    }

    // The rows of a product for gradients to weights: of the weight, of the link's, and one for the bias.
    struct Rows {
        int64_t own, links, one;

        int64_t all() const { return own + links + one; }
    };
    // The link's are of one product with the weight's where both are read alike.
    Rows rows(const ConvGradients<void>& wanted, int64_t links, bool bias) const {
        const bool both = wanted.link_weight != nullptr && whole(q.cin) == whole(links);
        return {wanted.weight != nullptr ? work_.taps * q.cin : 0, both ? links : 0, bias ? 1 : 0};
    }
    // May the gradient to the bias be such a row: is there room in a tile, and do products keep the digits?
    bool room_for_one(const Rows& rows) const {
        return rows.own > 0 && rows.all() % Product<T>::rows != 0 && (work_.exact || sizeof(T) != 4);
    }
    // Elements of `parts` that `to_weights` needs.
    int64_t weight_parts(const Rows& rows, int processors) const {
        return rows.all() > 0 ? segments(rows.all(), processors) * rows.all() * q.cout : 0;
    }

    cudaError_t to_weights(const T* x, const Link<T>& link, const Halves<const T>& f_gradient, const Rows& rows,
                           const ConvGradients<T>& result, SumOf<T>* parts, int processors, Additions<T>& additions) const {
        Work<T> w = work_;
        w.source = x, w.link = rows.links > 0 ? link.values : nullptr;
        w.gradient = f_gradient.a, w.gradient_b = f_gradient.b, w.parts = parts;
        w.taps = rows.own > 0 ? w.taps : 0, w.links = int(rows.links), w.sums = rows.one > 0;
        w.in = w.source_channels = int(q.cin), w.grouped = half_, w.out_channels = int(q.cout);
        w.wide_source = whole(w.in) && whole(w.links) && aligned(x) && aligned(w.link);
        w.wide_weight = whole(f_gradient.b != nullptr ? half_ : w.out_channels) && aligned(f_gradient);
        const int64_t count = segments(rows.all(), processors), stride = rows.all() * q.cout;
        w.segment = parts_of(parts_of(w.pixels, count), Product<T>::depth) * Product<T>::depth;
        const auto add = [&](int64_t some, T* out) {
            additions.add({parts, 1, count, some * q.cout, stride, out}), parts += some * q.cout;
        };
        add(rows.own, result.weight), add(rows.links, result.link_weight), add(rows.one, result.bias);
        const auto run = [&](auto columns) {
            constexpr int NB = decltype(columns)::value;
            const int64_t tiles = parts_of(rows.all(), Product<T>::rows);
            const dim3 grid(unsigned(tiles), unsigned(parts_of(q.cout, NB)), unsigned(count));
            return launch(weight_kernel<T, NB>, grid, kThreads, Room<T, NB>::all, stream_, w);
        };
        return wide(q.cout) ? run(std::integral_constant<int, kMostColumns>{}) : run(std::integral_constant<int, 64>{});
    }

    cudaError_t add(const Additions<T>& additions) const {
        if (additions.number == 0) return cudaSuccess;
        int64_t most = 0;
        for (int k = 0; k < additions.number; ++k) most = std::max(most, additions.each[k].outer * additions.each[k].size);
        const dim3 grid(unsigned(parts_of(most, 32)), unsigned(additions.number));
        return launch(add_kernel<T>, grid, kThreads, 0, stream_, additions);
    }

    // Of an image, for sums: all at once on the GPU.
    int64_t blocks(int processors) const {
        const int64_t at_once = int64_t(processors) * kGateBlocks<T> / (q.n * parts_of(half_, gate_columns()));
        return std::max<int64_t>(1, std::min(at_once, parts_of(q.h * q.w, kGateRows)));
    }

    cudaError_t to_f(const T* f, const T* gradient, const T* extra, T* f_gradient, SumOf<T>* parts, int processors,
                     Gate gate) const {
        const bool wide = whole(half_) && aligned(f) && aligned(gradient) && aligned(extra) && aligned(f_gradient);
        const int columns = gate_columns();
        const int64_t each = blocks(processors);
        const GateWork<T> w{f, gradient, extra, f_gradient, parts, int(q.h * q.w), half_, int(each), columns, wide, gate};
        const dim3 grid(unsigned(q.n * each), unsigned(parts_of(half_, columns)));
        return launch(gate_kernel<T>, grid, kThreads, 0, stream_, w);
    }

private:
    static constexpr int kMostColumns = sizeof(T) == 8 ? 64 : 128;

    const MaskedConv& q;
    cudaStream_t stream_;
    Work<T> work_{};
    int half_;

    static bool whole(int64_t channels) { return channels % kVector<T> == 0; }
    static bool aligned(const T* array) { return reinterpret_cast<uintptr_t>(array) % 16 == 0; }  // a view may not be
    template <typename S>
    static bool aligned(const Halves<S>& two) { return aligned(two.a) && aligned(two.b); }
    // Are vectors of these channels of one group?
    bool together(int channels) const {
        return work_.groups == 1 || (!work_.interleaved && whole(channels / work_.groups));
    }
    static bool wide(int64_t columns) { return columns > 64; }
    int gate_columns() const { return half_ <= kGateColumns / 2 ? kGateColumns / 2 : kGateColumns; }

    template <bool MIRRORED>
    cudaError_t by_width(const Work<T>& w, int halves) const {
        const int64_t part = w.out_channels / w.groups;
        if constexpr (sizeof(T) == 2) {
            // A link would have to fit too, or to be waited for. The gradient to x of one tap has little to keep.
            if (keeps(w) && w.links == 0 && !(MIRRORED && (w.taps == 1 || w.source_b != nullptr))) {
                const Kept kept(w, MIRRORED);
                Limits here;
                if (const cudaError_t error = here.find(); error != cudaSuccess) return error;
                if (const int blocks = kept.blocks_of_processor(here.shared)) {
                    const int64_t columns = parts_of(part * halves, kKeptColumns);
                    const int64_t most = parts_of(here.processors * blocks, columns);
                    const dim3 grid(unsigned(parts_of(kept.tiles, parts_of(kept.tiles, most))), unsigned(columns));
                    const auto run = [&](auto kernel) { return launch(kernel, grid, kKeptThreads, kept.bytes, stream_, w, kept); };
                    if (MIRRORED || w.gate != Gate::halves) return run(kept_kernel<T, MIRRORED, false>);
                    return run(kept_kernel<T, false, true>);
                }
            }
        }
        const auto run = [&](auto columns) {
            constexpr int NB = decltype(columns)::value;
            const dim3 grid(unsigned(parts_of(w.pixels, Product<T>::rows)), unsigned(w.groups * parts_of(part, NB / halves)));
            return launch(conv_kernel<T, NB, MIRRORED>, grid, kThreads, Room<T, NB>::all, stream_, w);
        };
        return wide(part * halves) ? run(std::integral_constant<int, kMostColumns>{}) : run(std::integral_constant<int, 64>{});
    }

    // Of the pixels, for so many rows of the gradients to weights.
    int64_t segments(int64_t rows, int processors) const {
        const int64_t columns = wide(q.cout) ? kMostColumns : 64;
        const int64_t tiles = parts_of(rows, Product<T>::rows) * parts_of(q.cout, columns);
        const int64_t wanted = parts_of(int64_t(processors) * kBlocksPerProcessor, tiles);
        const int64_t segment = parts_of(parts_of(work_.pixels, wanted), Product<T>::depth) * Product<T>::depth;
        return parts_of(work_.pixels, segment);
    }
};

// Where the numbers of the backward pass lie in the workspace; what is not needed has no room.
template <typename T>
struct Plan {
    MaskedConv link_conv;  // one tap
    bool bias_by_weight;  // is the bias's gradient that of a weight
    typename Conv<T>::Rows rows, link_rows;
    size_t f_gradient = 0, sums, weights, link_weights, all;

    // `curved`: f has a gradient of its own, as it goes through a gate.
    Plan(const MaskedConv& conv, bool curved, bool exact, int64_t links, const ConvGradients<void>& wanted, int processors)
        : link_conv{conv.n, conv.h, conv.w, std::max<int64_t>(links, 1), conv.cout, {{0, 0}}, {}, false} {
        const auto room = [](bool needed, int64_t count, size_t each) {
            return needed ? (size_t(count) * each + 255) / 256 * 256 : 0;
        };
        const Conv<T> own(conv, exact, nullptr), linked(link_conv, exact, nullptr);
        bias_by_weight = !curved && wanted.bias != nullptr && wanted.condition == nullptr &&
                         own.room_for_one(own.rows(wanted, links, false));
        rows = own.rows(wanted, links, bias_by_weight);
        link_rows = {wanted.link_weight != nullptr ? links - rows.links : 0, 0, 0};
        sums = f_gradient + room(curved && wanted.f == nullptr, conv.n * conv.h * conv.w * conv.cout, sizeof(T));
        weights = sums + room(wanted.of_pixels() && !bias_by_weight, conv.n * own.blocks(processors) * conv.cout,
                              sizeof(SumOf<T>));
        link_weights = weights + room(true, own.weight_parts(rows, processors), sizeof(SumOf<T>));
        all = link_weights + room(true, linked.weight_parts(link_rows, processors), sizeof(SumOf<T>));
    }
};

template <typename T>
Link<T> link_of(const Link<void>& link) {
    return {static_cast<const T*>(link.values), static_cast<const T*>(link.weight), link.channels};
}

// run(T{}) for the type of the numbers.
template <typename F>
auto by_number(Number number, F run) {
    switch (number) {
        case Number::float16: return run(__half{});
        case Number::bfloat16: return run(__nv_bfloat16{});
        case Number::float32: return run(float{});
        default: return run(double{});
    }
}

const char* too_large(const MaskedConv& conv) {
    if (conv.taps.size() > kMaxTaps || conv.h > 32767 || conv.w > 32767) return "at most 512 taps, and 32767 pixels a side";
    return conv.n * parts_of(conv.h * conv.w, kGateRows) > 0x7fffffff ? "too many pixels" : nullptr;
}

size_t workspace_of(Number number, const MaskedConv& conv, bool curved, int64_t links, const ConvGradients<void>& wanted,
                    int processors) {
    if (too_large(conv) != nullptr) return 0;
    return by_number(number, [&](auto zero) {
        using P = Plan<decltype(zero)>;
        return std::max(P(conv, curved, true, links, wanted, processors).all,
                        P(conv, curved, false, links, wanted, processors).all);
    });
}

// A backward pass: its workspace, and what follows when the gradient to f is known.
template <typename T>
struct Backward {
    Plan<T> plan;
    cudaStream_t stream;
    Conv<T> own, linked;
    ConvGradients<T> result;
    T* f_gradient;
    SumOf<T>* sums;  // over pixels; null: none are wanted, or they come with the weights
    SumOf<T> *weights, *link_weights;
    int processors;

    Backward(const MaskedConv& conv, bool curved, bool exact, int64_t links, const ConvGradients<void>& to, void* workspace,
             int processors, void* queue)
        : plan(conv, curved, exact, links, to, processors),
          stream(static_cast<cudaStream_t>(queue)),
          own(conv, exact, stream),
          linked(plan.link_conv, exact, stream),
          processors(processors) {
        const auto at = [](void* t) { return static_cast<T*>(t); };
        const auto room = [&](size_t from) { return static_cast<char*>(workspace) + from; };
        result = {at(to.x), at(to.weight), at(to.link), at(to.link_weight), at(to.f), at(to.bias), at(to.condition)};
        f_gradient = reinterpret_cast<T*>(room(plan.f_gradient));
        const auto parts = [&](size_t from) { return reinterpret_cast<SumOf<T>*>(room(from)); };
        sums = to.of_pixels() && !plan.bias_by_weight ? parts(plan.sums) : nullptr;
        weights = parts(plan.weights), link_weights = parts(plan.link_weights);
    }

    cudaError_t products(const T* x, const T* weight, const Link<T>& link, const Halves<const T>& g,
                         Additions<T>& additions) const {
        Errors errors;
        if (result.x != nullptr) errors += own.to_x(g, weight, result.x);
        if (result.link != nullptr) errors += linked.to_x(g, link.weight, result.link);
        if (plan.rows.all() > 0) errors += own.to_weights(x, link, g, plan.rows, result, weights, processors, additions);
        if (plan.link_rows.all() > 0) {
            ConvGradients<T> alone{};
            alone.weight = result.link_weight;
            errors += linked.to_weights(link.values, {}, g, plan.link_rows, alone, link_weights, processors, additions);
        }
        errors += own.add(additions);
        return errors.first;
    }
};

}  // namespace

const char* masked_conv_cuda(Number number, bool exact, const MaskedConv& conv, const void* x, const void* weight,
                             const Link<void>& link, const void* bias, const void* condition, bool spatial, Gate gate,
                             void* out, void* f, void* stream) {
    if (const char* error = too_large(conv)) return error;
    return by_number(number, [&](auto zero) {
        using T = decltype(zero);
        const auto in = [](const void* t) { return static_cast<const T*>(t); };
        return text_of(Conv<T>(conv, exact, static_cast<cudaStream_t>(stream))
                           .forward(in(x), in(weight), link_of<T>(link), in(bias), in(condition), spatial, gate,
                                    static_cast<T*>(out), static_cast<T*>(f)));
    });
}

const char* masked_conv_halves_cuda(Number number, bool exact, const MaskedConv& conv, const void* x, const void* weight,
                                    const void* bias, const Halves<const void>& added, const Halves<void>& out, void* stream) {
    if (const char* error = too_large(conv)) return error;
    return by_number(number, [&](auto zero) {
        using T = decltype(zero);
        const auto in = [](const void* t) { return static_cast<const T*>(t); };
        return text_of(Conv<T>(conv, exact, static_cast<cudaStream_t>(stream))
                           .forward(in(x), in(weight), in(bias), {in(added.a), in(added.b)},
                                    {static_cast<T*>(out.a), static_cast<T*>(out.b)}));
    });
}

size_t masked_conv_cuda_workspace(Number number, const MaskedConv& conv, int64_t links, const ConvGradients<void>& wanted,
                                  int processors) {
    return workspace_of(number, conv, conv.gated, links, wanted, processors);
}

size_t masked_conv_halves_cuda_workspace(Number number, const MaskedConv& conv, const ConvGradients<void>& wanted,
                                         int processors) {
    return workspace_of(number, conv, false, 0, wanted, processors);
}

const char* masked_conv_gradients_cuda(Number number, bool exact, const MaskedConv& conv, const void* x, const void* weight,
                                       const Link<void>& link, Gate gate, const void* f, const void* out_gradient,
                                       const void* extra, const ConvGradients<void>& result, void* workspace,
                                       int processors, void* stream) {
    if (const char* error = too_large(conv)) return error;
    return by_number(number, [&](auto zero) {
        using T = decltype(zero);
        const Backward<T> pass(conv, conv.gated, exact, link.channels, result, workspace, processors, stream);
        const auto in = [](const void* t) { return static_cast<const T*>(t); };
        const T* g = in(out_gradient);
        Errors errors;
        Additions<T> additions;
        if (pass.sums != nullptr || conv.gated) {
            T* const f_gradient = !conv.gated ? nullptr : pass.result.f != nullptr ? pass.result.f : pass.f_gradient;
            errors += pass.own.to_f(in(f), g, in(extra), f_gradient, pass.sums, processors, gate);
            const int64_t blocks = pass.own.blocks(processors);
            additions.add({pass.sums, 1, conv.n * blocks, conv.cout, conv.cout, pass.sums ? pass.result.bias : nullptr});
            additions.add({pass.sums, conv.n, blocks, conv.cout, conv.cout, pass.result.condition});
            if (conv.gated) g = f_gradient;
        }
        errors += pass.products(in(x), in(weight), link_of<T>(link), {g, nullptr}, additions);
        return text_of(errors.first);
    });
}

const char* masked_conv_halves_gradients_cuda(Number number, bool exact, const MaskedConv& conv, const void* x,
                                              const void* weight, const Halves<const void>& out_gradient,
                                              const ConvGradients<void>& result, void* workspace, int processors,
                                              void* stream) {
    if (const char* error = too_large(conv)) return error;
    return by_number(number, [&](auto zero) {
        using T = decltype(zero);
        const Backward<T> pass(conv, false, exact, 0, result, workspace, processors, stream);
        const auto in = [](const void* t) { return static_cast<const T*>(t); };
        const Halves<const T> g{in(out_gradient.a), in(out_gradient.b)};
        Errors errors;
        Additions<T> additions;
        if (pass.sums != nullptr) {  // to the bias, a half after the other
            const int64_t half = conv.cout / 2, parts = conv.n * pass.own.blocks(processors);
            for (int k = 0; k < 2; ++k) {
                SumOf<T>* const sums = pass.sums + k * parts * half;
                errors += pass.own.to_f(nullptr, k == 0 ? g.a : g.b, nullptr, nullptr, sums, processors, Gate::none);
                additions.add({sums, 1, parts, half, half, pass.result.bias + k * half});
            }
        }
        errors += pass.products(in(x), in(weight), {}, g, additions);
        return text_of(errors.first);
    });
}

}  // namespace infovae_fast
