// Masked convolution of 16 bit numbers whose weights fit shared memory, or its gradient to x: the formulas are those of
// masked_conv.cu.
//
// A block brings the weights of its 64 columns once, and then takes one tile of 256 pixels after the other. What a tile
// reads lies in one piece: pixels in one row, from the first tap of the first to the last of the last. So it is brought
// once for all taps, and a tap is an offset to where its rows begin; where it leads out of the image, a row of zeros.
// While a tile goes from registers to memory, through bias, condition and gate, the next one comes.
//
// A warp has 32 pixels x 64 columns of the result. Column 32 s + 8 t + 2 q + e is channel 8 q + 2 t + e of 32: then what
// a lane has of a pixel are 8 channels that lie together, of each side s. Of a gate, the sides are the two halves.
#pragma once
#include <cuda_pipeline.h>

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/masked_conv_work.h"
#include "cuda/products.h"
#include "cuda/shared_memory.h"

namespace infovae_fast {
namespace {

constexpr int kKeptThreads = 256, kKeptRows = 256, kKeptColumns = 64, kSide = kKeptColumns / 2;
constexpr int kKeptMostTaps = 32;  // bits of a word
constexpr int kKeptLeastSize = 32;  // pixels of an image
constexpr int64_t kKeptMostPixels = 1 << 30;

static_assert(kKeptRows == kKeptThreads);  // a thread tells which taps of a row lead into the image

// What a block may have of the GPU at hand.
struct Limits {
    int processors = 0, shared = 0;  // shared: bytes

    cudaError_t find() {
        int device = 0;
        cudaError_t error = cudaGetDevice(&device);
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        return error;
    }
};

// The division of the work, and of shared memory. In numbers, one after the other:
//
//     weights       [depth, pitch], mirrored [columns, pitch]
//     source        [rows, pitch]
//     zeros         [8]
//     bias          [columns]
//     conditions    [2 tiles, images, columns], of Gate::halves [rows, columns + 8] of a tile's two images
//     rows          [2 tiles, rows], of two words: the taps that lead into the image, and which image of the tile it is
struct Kept {
    int depth;          // of the product
    int begin, reach;   // the first tap of all, in pixels, and how far it is to the last
    int weight_pitch, pitch;  // of rows, whose 16 bytes more keep lanes from meeting in a bank
    int source, zeros, bias, conditions, rows;
    int images, tiles;  // `images` that a tile may touch
    size_t bytes;

    template <typename T>
    Kept(const Work<T>& w, bool mirrored) : depth(w.taps * w.in) {
        int first = w.taps > 0 ? w.h * w.w : 0, last = -first;
        for (int t = 0; t < w.taps; ++t) {
            const int at = (mirrored ? -1 : 1) * (w.tap[t].dy * w.w + w.tap[t].dx);
            first = std::min(first, at), last = std::max(last, at);
        }
        begin = first, reach = std::max(last - first, 0);
        weight_pitch = (mirrored ? depth : kKeptColumns) + 8, pitch = w.in + 8;
        images = (kKeptRows + w.h * w.w - 2) / (w.h * w.w) + 1;
        const bool added = w.condition != nullptr || w.condition_b != nullptr;
        const int64_t of_conditions = w.gate != Gate::halves ? 2 * images * kKeptColumns
                                      : added                ? kKeptRows * (kKeptColumns + 8)
                                                             : 0;
        const int64_t of_weights = int64_t(mirrored ? kKeptColumns : depth) * weight_pitch;
        const int64_t of_source = int64_t(kKeptRows + reach) * pitch;
        const int64_t to_rows = of_weights + of_source + 8 + kKeptColumns + of_conditions;
        bytes = size_t(to_rows) * sizeof(T) + 2 * kKeptRows * sizeof(int2);
        source = int(of_weights), zeros = int(of_weights + of_source), bias = zeros + 8, conditions = bias + kKeptColumns;
        rows = int(to_rows), tiles = int((w.pixels + kKeptRows - 1) / kKeptRows);
    }

    // 0: it does not fit what a block may have.
    int blocks_of_processor(int shared) const {
        return bytes > size_t(shared) ? 0 : 2 * (bytes + 1024) <= size_t(shared) + 1024 ? 2 : 1;
    }
};

template <typename T>
bool keeps(const Work<T>& w) {
    const bool wide = w.wide_source && w.wide_weight && w.wide_out && w.in % 16 == 0;
    return wide && w.groups == 1 && w.taps <= kKeptMostTaps && w.pixels <= kKeptMostPixels && w.h * w.w >= kKeptLeastSize;
}

template <typename T, bool MIRRORED, bool SPLIT>
__global__ void __launch_bounds__(kKeptThreads, 2)
    kept_kernel(const __grid_constant__ Work<T> w, const __grid_constant__ Kept s) {
    using P = Product<T>;
    T* const weights = shared_memory<T>();
    T *const source = weights + s.source, *const zeros = weights + s.zeros, *const bias = weights + s.bias;
    int2* const rows = reinterpret_cast<int2*>(weights + s.rows);
    const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const bool halves = SPLIT || (!MIRRORED && w.gate != Gate::none);
    const int width = halves ? 2 * w.out_channels : w.out_channels, pixels = int(w.pixels);
    const int first_channel = int(blockIdx.y) * (halves ? kSide : kKeptColumns), size = w.h * w.w;
    const auto channel_of = [&](int side, int of_side) {  // of f; -1: there is none
        const int channel = first_channel + (halves ? 0 : side * kSide) + of_side;
        return channel < w.out_channels ? channel + (halves ? side * w.out_channels : 0) : -1;
    };

    if (thread < 8) zeros[thread] = rounded<T>(0);
    after_previous();
    if constexpr (MIRRORED) {  // a row of weights for each column
        for (int column = warp; column < kKeptColumns; column += kKeptThreads / 32) {
            const int channel = channel_of(column / kSide, column % 8 / 2 * 8 + column % kSide / 8 * 2 + column % 2);
            for (int k = lane * 8; k < s.depth; k += 32 * 8) {
                T* const to = weights + column * s.weight_pitch + k;
                const T* const from = w.weight + (int64_t(k / w.in) * w.out_channels + channel) * w.in + k % w.in;
                if (channel < 0) *reinterpret_cast<int4*>(to) = int4{0, 0, 0, 0};
                else __pipeline_memcpy_async(to, from, 16);
            }
        }
    } else {  // two columns of it
        const int channel = channel_of(lane / 16, lane % 4 * 8 + lane % 16 / 4 * 2);
        T* to = weights + warp * s.weight_pitch + lane * 2;
        const T* from = w.weight + int64_t(warp) * width + channel;
        constexpr int kWarps = kKeptThreads / 32;
#pragma unroll 4
        for (int k = warp; k < s.depth; k += kWarps, to += kWarps * s.weight_pitch, from += kWarps * width) {
            if (channel < 0) *reinterpret_cast<int*>(to) = 0;
            else __pipeline_memcpy_async(to, from, 4);
        }
        for (int e = thread; e < kKeptColumns; e += kKeptThreads) {
            const int channel = channel_of(e / kSide, e % kSide);
            bias[e] = w.bias != nullptr && channel >= 0 ? w.bias[channel] : rounded<T>(0);
        }
    }

    const int across = w.in / 8, rows_apart = kKeptThreads / across, places_apart = kKeptThreads % across;
    const int first_row = thread / across, first_place = thread % across;
    const auto load = [&](int tile, int slot) {
        const int first = tile * kKeptRows, pixel = first + thread, image = pixel / size, first_image = first / size;
        const int y = (pixel - image * size) / w.w, x = pixel - image * size - y * w.w;
        {
            const int start = first + s.begin, begin = max(0, -start), end = min(kKeptRows + s.reach, pixels - start);
            const T* from = w.source + int64_t(start) * w.in + thread * 8;  // vector after vector, of which a row has `across`
            T* to = source + thread * 8;
            int row = first_row, place = first_place;
            for (; row < end; row += rows_apart, place += places_apart, from += kKeptThreads * 8, to += kKeptThreads * 8) {
                if (place >= across) place -= across, ++row;
                if (row >= begin && row < end) __pipeline_memcpy_async(to + row * 8, from, 16);  // 8 behind every row
            }
        }
        if constexpr (SPLIT) {
            for (int e = thread; e < kKeptRows * (kKeptColumns / 8); e += kKeptThreads) {
                const int row = e / 8, channel = channel_of(0, e % 4 * 8);
                const T* const added = e % 8 < 4 ? w.condition : w.condition_b;
                if (added == nullptr || first + row >= pixels || channel < 0) continue;
                T* const to = weights + s.conditions + row * (kKeptColumns + 8) + e % 8 * 8;
                __pipeline_memcpy_async(to, added + int64_t(first + row) * w.out_channels + channel, 16);
            }
        } else if constexpr (!MIRRORED) {
            const int images = min((pixels - 1) / size - first_image + 1, s.images);
            for (int e = thread; e < images * (kKeptColumns / 8) && w.condition != nullptr && !w.spatial; e += kKeptThreads) {
                const int channel = channel_of(e % 8 / 4, e % 4 * 8), of = e / 8;
                if (channel < 0) continue;
                T* const to = weights + s.conditions + (slot * s.images + of) * kKeptColumns + e % 8 * 8;
                __pipeline_memcpy_async(to, w.condition + int64_t(first_image + of) * width + channel, 16);
            }
        }
        __pipeline_commit();
        unsigned seen = 0;
        for (int t = 0; t < w.taps; ++t) {
            const int dy = MIRRORED ? -w.tap[t].dy : w.tap[t].dy, dx = MIRRORED ? -w.tap[t].dx : w.tap[t].dx;
            seen |= unsigned(pixel < pixels && inside(w, y + dy, x + dx)) << t;
        }
        rows[slot * kKeptRows + thread] = int2{int(seen), image - first_image};
    };

    const int row0 = warp * 32 + lane % 16, ahead = lane / 16 * 8;  // of what this lane shows the warp of the source
    const int place = lane % 4 * 8;  // the first of its 8 channels of a side
    int tile = int(blockIdx.x);
    load(tile, 0);
    for (int slot = 0; tile < s.tiles; tile += int(gridDim.x), slot ^= 1) {
        __pipeline_wait_prior(0);
        __syncthreads();
        typename P::Sums sum[2][4] = {};
        unsigned seen[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) seen[i] = unsigned(rows[slot * kKeptRows + row0 + 16 * i].x);
#pragma unroll 1
        for (int t = 0, k = 0; t < w.taps; ++t) {
            const int at = w.tap[t].dy * w.w + w.tap[t].dx, offset = (MIRRORED ? -at : at) - s.begin;
            const T* from[2];
            int step[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool there = seen[i] >> t & 1;
                from[i] = there ? source + (row0 + 16 * i + offset) * s.pitch + ahead : zeros, step[i] = there ? 16 : 0;
            }
#pragma unroll 2
            for (int c = 0; c < w.in; c += 16, k += 16) {
                typename P::Left a[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) load_matrices<false>(a[i].r, from[i]), from[i] += step[i];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    typename P::Right b;
                    const int pitch = MIRRORED ? s.weight_pitch : kKeptColumns + 8;
                    P::template load<!MIRRORED>(b, weights + (MIRRORED ? 16 * j * pitch + k : k * pitch + 16 * j), pitch);
#pragma unroll
                    for (int i = 0; i < 2; ++i) P::add(sum[i][j], a[i], b);
                }
            }
        }
        if constexpr (SPLIT) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int i = e / 4, below = e / 2 % 2, side = e % 2, row = warp * 32 + i * 16 + lane / 4 + 8 * below;
                if ((side == 0 ? w.condition : w.condition_b) == nullptr) continue;
                const auto added = widened(vector_at<8>(weights + s.conditions + row * (kKeptColumns + 8) + side * kSide + place));
#pragma unroll
                for (int k = 0; k < 8; ++k) sum[i][side * 2 + k / 4].x[k / 2 % 2][below * 2 + k % 2] += added.x[k];
            }
        }
        __syncthreads();  // all are done with the source, and with the rows of the tile before
        if (tile + int(gridDim.x) < s.tiles) load(tile + int(gridDim.x), slot ^ 1);

        const int channel = first_channel + place, apart = halves ? w.out_channels : kSide;  // of side 0; to side 1, in f
        const bool there[2] = {channel < w.out_channels, channel + (halves ? 0 : kSide) < w.out_channels};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int i = k / 2, below = k % 2, row = warp * 32 + i * 16 + lane / 4 + 8 * below;
            const int64_t pixel = tile * kKeptRows + row, at = pixel * width + channel, of_image = pixel * w.out_channels + channel;
            if (pixel >= pixels || !there[0]) continue;
            Vector<float, 8> value[2];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
#pragma unroll
                for (int e = 0; e < 8; ++e) value[side].x[e] = sum[i][side * 2 + e / 4].x[e / 2 % 2][below * 2 + e % 2];
                if (!there[side]) continue;
                if constexpr (!MIRRORED) {
                    const auto add = [&](const T* numbers) {
                        Packed<T, 8> packed;
                        packed.read(numbers);
                        value[side] += packed.numbers();
                    };
                    if (w.bias != nullptr) add(bias + side * kSide + place);
                    if (!SPLIT && w.condition != nullptr) {
                        const int image = slot * s.images + rows[slot * kKeptRows + row].y;
                        if (w.spatial) add(w.condition + at + side * apart);
                        else add(weights + s.conditions + image * kKeptColumns + side * kSide + place);
                    }
                    if (w.f != nullptr) write(w.f + at + side * apart, value[side]);
                }
                if (SPLIT) write((side == 0 ? w.out : w.out_b) + of_image, value[side]);
                else if (!halves) write(w.out + at + side * apart, value[side]);
            }
            if constexpr (!MIRRORED && !SPLIT) {
                if (!halves) continue;
#pragma unroll
                for (int e = 0; e < 8; ++e) value[0].x[e] = gate_value<T>(w.gate, value[0].x[e], value[1].x[e]);
                write(w.out + of_image, value[0]);
            }
        }
    }
}

}  // namespace
}  // namespace infovae_fast
