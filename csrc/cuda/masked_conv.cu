// Masked convolution on a GPU, as products of matrices on its tensor cores. With pixels p in one row, channels last, and
// zeros outside the image,
//
//     f[p]      = sum_k columns[p, k] matrix[k] + bias + condition     k: (tap, input channel), then the link's channels
//     dx[p]     = sum_k df[p - t] weight[t]^T                          k: (tap, output channel): the same kernel, mirrored
//     dweight_k = sum_p columns[p, k] df[p]                            a segment of the pixels for each block
//
// A block has a tile of the result in the registers of its warps. What it multiplies comes through shared memory, some
// steps ahead; no column is ever in memory as a whole. Then the tile goes through shared memory to those who add bias
// and condition and compute the gate. Columns of a block are of one group of colours, the same in both halves of a gate.
// What an output may not see is zero where it is loaded, data and weights both: 0 * NaN never happens.
//
// 16 bit numbers are multiplied as they are and summed in float; float as four products of TF32, which keep its digits,
// or one where that is allowed. There are no atomics: the bits do not change from run to run.
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/products.h"
#include "masked_conv.h"

namespace infovae_fast {
namespace {

constexpr int kThreads = 32 * kWarpRows * kWarpColumns;
constexpr int kStages = 3;  // steps of a product in shared memory
constexpr int kMaxTaps = 512;
constexpr int kBlocksPerProcessor = 4;  // of the gradient to weight, wanted
constexpr int kGateRows = 128, kGateColumns = 32;
constexpr int kNoRow = -(1 << 20);  // where no tap leads back into the image

#ifdef __CUDACC__
template <typename T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return reinterpret_cast<T*>(bytes);
}
#endif

template <typename T>
constexpr int kVector = 16 / int(sizeof(T));  // numbers that are copied at a time

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ __forceinline__ T rounded(SumOf<T> x) {
    if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(x);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16_rn(x);
    } else {
        return x;
    }
}

// sigmoid(b) and its derivative, both with all their digits.
template <typename S>
__device__ __forceinline__ S sigmoid(S b, S& slope) {
    const S e = exp(b < 0 ? b : -b);
    slope = e / ((1 + e) * (1 + e));
    return (b < 0 ? e : S(1)) / (1 + e);
}
template <typename S>
__device__ __forceinline__ S slope_of_tanh(S a) {
    const S e = exp(a < 0 ? 2 * a : -2 * a);
    return 4 * e / ((1 + e) * (1 + e));
}
template <typename S>
__device__ __forceinline__ S gated(Gate gate, S a, S b) {
    S slope;
    return (gate == Gate::tanh ? tanh(a) : a) * sigmoid(b, slope);
}

struct ShortTap {
    short dy, dx;
};

// One product: of the convolution, or of its gradient to x (`mirrored`), or of that to weight.
template <typename T>
struct Work {
    const T *source, *weight, *bias, *condition, *link, *link_weight;  // see MaskedConv; the last four may be null
    const T* gradient;   // to f, for that to weight
    T *out, *f;          // f may be null
    SumOf<T>* parts;     // of the gradient to weight, [segments, taps in, out]
    int64_t pixels, segment;
    int h, w, in, out_channels, links, taps;
    int groups, grouped;  // `grouped` channels of the source are grouped together, or of f in the gradient to weight
    bool interleaved, own, spatial, exact;
    bool wide_source, wide_weight;  // rows may be read in vectors
    Gate gate;
    ShortTap tap[kMaxTaps];

    __device__ int group_of(int channel, int channels) const {
        return interleaved ? channel % groups : channel % channels / (channels / groups);
    }
};

// Number k of the sum over (tap, channel, link): where it lies from a pixel on, or nowhere.
template <typename T>
struct Column {
    const T* base = nullptr;  // at a first pixel
    int dy = 0, dx = 0, stride = 0, tap = 0, channel = 0;
};

// `group` of the outputs; negative: whatever it is.
template <typename T, bool MIRRORED>
__device__ __forceinline__ Column<T> column_of(const Work<T>& w, int k, int group, int64_t first) {
    Column<T> c;
    const int own = w.taps * w.in;
    if (k >= own) {
        if (k >= own + w.links) return c;
        c.channel = k - own, c.stride = w.links, c.base = w.link + first * c.stride + c.channel;
        return c;
    }
    c.tap = k / w.in, c.channel = k % w.in, c.stride = w.in;
    if (w.groups > 1 && c.tap == w.taps - 1 && group >= 0) {
        const int other = w.group_of(c.channel, w.grouped);
        if (MIRRORED ? group >= other + w.own : other >= group + w.own) return c;
    }
    c.dy = MIRRORED ? -w.tap[c.tap].dy : w.tap[c.tap].dy;
    c.dx = MIRRORED ? -w.tap[c.tap].dx : w.tap[c.tap].dx;
    c.base = w.source + first * c.stride + c.channel;
    return c;
}

// V numbers to shared memory, or as many zeros. More than one come later, when the pipeline says so.
template <int V, typename T>
__device__ __forceinline__ void bring(T* to, const T* from) {
    if constexpr (V == 1) {
        *to = from != nullptr ? *from : rounded<T>(0);
    } else if (from != nullptr) {
        __pipeline_memcpy_async(to, from, V * sizeof(T));
    } else {
        *reinterpret_cast<int4*>(to) = int4{0, 0, 0, 0};
    }
}

// Calls visit(row, place) for rows of `size` numbers in vectors of V; a thread's place in the row is always the same.
template <int V, typename Start, typename Visit>
__device__ __forceinline__ void each_vector(int rows, int size, Start start, Visit visit) {
    const int across = size / V, place = int(threadIdx.x) % across * V;
    const auto column = start(place);
#pragma unroll 1
    for (int row = int(threadIdx.x) / across; row < rows; row += kThreads / across) visit(row, place, column);
}

// Shared memory: the steps of a product, or afterwards the tile; then y and x of the rows.
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
    static constexpr size_t steps = kStages * step * sizeof(T);
    static constexpr size_t tile = rows * Tile<T, NB>::pitch * sizeof(SumOf<T>);
    static constexpr size_t all = (steps > tile ? steps : tile) + 2 * rows * sizeof(int);
    static_assert(left * sizeof(T) % 16 == 0 && step * sizeof(T) % 16 == 0);
};

// load(step, slot) for all steps, some ahead of compute(slot).
template <typename Load, typename Compute>
__device__ __forceinline__ void pipeline(int steps, Load load, Compute compute) {
    for (int s = 0; s < kStages - 1; ++s) {
        if (s < steps) load(s, s);
        __pipeline_commit();
    }
    for (int s = 0; s < steps; ++s) {
        __pipeline_wait_prior(kStages - 2);
        __syncthreads();  // what all have brought is there, and all are done with the slot that comes next
        const int next = s + kStages - 1;
        if (next < steps) load(next, next % kStages);
        __pipeline_commit();
        compute(s % kStages);
    }
    __pipeline_wait_prior(0);
    __syncthreads();
}

// A tile of pixels x channels of one group, with a gate in both halves: the convolution, or its gradient to x.
template <typename T, int NB, bool MIRRORED>
__global__ void __launch_bounds__(kThreads, 2) conv_kernel(const __grid_constant__ Work<T> w) {
    using P = Product<T>;
    using R = Room<T, NB>;
    T* const memory = shared_memory<T>();
    int* const row_y = reinterpret_cast<int*>(shared_memory<unsigned char>() + R::all) - 2 * P::rows;
    int* const row_x = row_y + P::rows;
    const int halves = w.gate == Gate::none ? 1 : 2, columns = NB / halves, width = halves * w.out_channels;
    const int part = w.out_channels / w.groups, tiles = (part + columns - 1) / columns;
    const int group = int(blockIdx.y) / tiles, first_column = int(blockIdx.y) % tiles * columns;
    const int64_t first = int64_t(blockIdx.x) * P::rows;
    const auto place = [&](int j) { return w.groups > 1 && w.interleaved ? j * w.groups + group : group * part + j; };

    for (int row = int(threadIdx.x); row < P::rows; row += kThreads) {
        const int local = int((first + row) % (int64_t(w.h) * w.w));
        row_y[row] = first + row < w.pixels ? local / w.w : kNoRow;
        row_x[row] = local % w.w;
    }
    __syncthreads();

    const int own = w.taps * w.in, steps = (own + w.links + P::depth - 1) / P::depth;
    const auto load = [&](int step, int slot) {
        T* const left = memory + slot * R::step;
        T* const right = left + R::left;
        const auto column = [&](int k) { return column_of<T, MIRRORED>(w, step * P::depth + k, group, first); };
        const auto pixels = [&](auto vector) {
            constexpr int V = decltype(vector)::value;
            each_vector<V>(P::rows, P::depth, column, [&](int row, int k, const Column<T>& c) {
                const int y = row_y[row] + c.dy, x = row_x[row] + c.dx;
                const bool inside = c.base != nullptr && y >= 0 && y < w.h && x >= 0 && x < w.w;
                bring<V>(left + row * R::narrow + k,
                         inside ? c.base + (int64_t(c.dy) * w.w + c.dx + row) * c.stride : nullptr);
            });
        };
        const auto weights = [&](auto vector) {
            constexpr int V = decltype(vector)::value;
            if constexpr (MIRRORED) {
                each_vector<V>(NB, P::depth, column, [&](int row, int k, const Column<T>& c) {
                    const int j = first_column + row;
                    const bool known = c.base != nullptr && j < part;
                    bring<V>(right + row * R::narrow + k,
                             known ? w.weight + (int64_t(c.tap) * w.out_channels + place(j)) * w.in + c.channel : nullptr);
                });
            } else {
                const auto output = [&](int c) {
                    const int j = first_column + c % columns;
                    return j < part ? place(j) + c / columns * w.out_channels : -1;
                };
                each_vector<V>(P::depth, NB, output, [&](int row, int c, int channel) {
                    const int k = step * P::depth + row;
                    bool known = channel >= 0 && k < own + w.links;
                    if (w.groups > 1 && k >= own - w.in && k < own) {
                        known = known && w.group_of(k - (own - w.in), w.grouped) < group + w.own;
                    }
                    const T* const matrix = k < own ? w.weight + int64_t(k) * width : w.link_weight + int64_t(k - own) * width;
                    bring<V>(right + row * R::wide + c, known ? matrix + channel : nullptr);
                });
            }
        };
        using One = std::integral_constant<int, 1>;
        using Many = std::integral_constant<int, kVector<T>>;
        w.wide_source ? pixels(Many{}) : pixels(One{});
        w.wide_weight ? weights(Many{}) : weights(One{});
    };
    Tile<T, NB> tile;
    pipeline(steps, load, [&](int slot) {
        const T* const left = memory + slot * R::step;
        tile.template multiply<true, !MIRRORED>(left, R::narrow, left + R::left, MIRRORED ? R::narrow : R::wide, w.exact);
    });
    SumOf<T>* const sums = shared_memory<SumOf<T>>();
    tile.store(sums);
    __syncthreads();

    const int64_t image_size = int64_t(w.h) * w.w;
    for (int e = int(threadIdx.x); e < P::rows * columns; e += kThreads) {
        const int row = e / columns, c = e % columns, j = first_column + c;
        const int64_t pixel = first + row;
        if (pixel >= w.pixels || j >= part) continue;
        const int channel = place(j);
        SumOf<T> value[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (half >= halves) continue;
            const int at = channel + half * w.out_channels;
            value[half] = sums[row * Tile<T, NB>::pitch + c + half * columns];
            if (w.bias != nullptr) value[half] += widened(w.bias[at]);
            const int64_t row_of_condition = w.spatial ? pixel : pixel / image_size;
            if (w.condition != nullptr) value[half] += widened(w.condition[row_of_condition * width + at]);
            if (w.f != nullptr) w.f[pixel * width + at] = rounded<T>(value[half]);
        }
        w.out[pixel * w.out_channels + channel] =
            rounded<T>(halves == 1 ? value[0] : gated(w.gate, value[0], value[1]));
    }
}

// The gradient to rows (tap, input channel) x NB columns of weight, from a segment of the pixels.
template <typename T, int NB>
__global__ void __launch_bounds__(kThreads, 2) weight_kernel(const __grid_constant__ Work<T> w) {
    using P = Product<T>;
    using R = Room<T, NB>;
    T* const memory = shared_memory<T>();
    const int first_row = int(blockIdx.x) * P::rows, first_column = int(blockIdx.y) * NB, rows = w.taps * w.in;
    const int64_t begin = int64_t(blockIdx.z) * w.segment;
    const int pixels = int(begin + w.segment < w.pixels ? w.segment : w.pixels - begin);
    const unsigned start_y = unsigned(begin % (int64_t(w.h) * w.w)) / unsigned(w.w), start_x = unsigned(begin % w.w);

    const auto load = [&](int step, int slot) {
        T* const left = memory + slot * R::step;
        T* const right = left + R::left;
        const auto columns = [&](auto vector) {
            constexpr int V = decltype(vector)::value;
            const auto column = [&](int k) {
                return first_row + k < rows ? column_of<T, false>(w, first_row + k, -1, begin) : Column<T>{};
            };
            each_vector<V>(P::depth, P::rows, column, [&](int row, int k, const Column<T>& c) {
                const int pixel = step * P::depth + row;
                const unsigned along = start_x + unsigned(pixel);
                const int y = int((start_y + along / unsigned(w.w)) % unsigned(w.h)) + c.dy;
                const int x = int(along % unsigned(w.w)) + c.dx;
                const bool inside = c.base != nullptr && pixel < pixels && y >= 0 && y < w.h && x >= 0 && x < w.w;
                bring<V>(left + row * R::tall + k,
                         inside ? c.base + (int64_t(c.dy) * w.w + c.dx + pixel) * c.stride : nullptr);
            });
        };
        const auto gradients = [&](auto vector) {
            constexpr int V = decltype(vector)::value;
            const auto column = [&](int c) {
                const int channel = first_column + c;
                return channel < w.out_channels ? w.gradient + begin * w.out_channels + channel : nullptr;
            };
            each_vector<V>(P::depth, NB, column, [&](int row, int c, const T* base) {
                const int pixel = step * P::depth + row;
                const bool there = pixel < pixels && base != nullptr;
                bring<V>(right + row * R::wide + c, there ? base + int64_t(pixel) * w.out_channels : nullptr);
            });
        };
        using One = std::integral_constant<int, 1>;
        using Many = std::integral_constant<int, kVector<T>>;
        w.wide_source ? columns(Many{}) : columns(One{});
        w.wide_weight ? gradients(Many{}) : gradients(One{});
    };
    Tile<T, NB> tile;
    pipeline((pixels + P::depth - 1) / P::depth, load, [&](int slot) {
        const T* const left = memory + slot * R::step;
        tile.template multiply<false, true>(left, R::tall, left + R::left, R::wide, w.exact);
    });
    SumOf<T>* const sums = shared_memory<SumOf<T>>();
    tile.store(sums);
    __syncthreads();
    for (int e = int(threadIdx.x); e < P::rows * NB; e += kThreads) {
        const int row = first_row + e / NB, column = first_column + e % NB;
        if (row >= rows || column >= w.out_channels) continue;
        const bool last = row / w.in == w.taps - 1;
        const bool hidden = w.groups > 1 && last && w.group_of(row % w.in, w.in) >= w.group_of(column, w.grouped) + w.own;
        w.parts[(int64_t(blockIdx.z) * rows + row) * w.out_channels + column] =
            hidden ? SumOf<T>(0) : sums[e / NB * Tile<T, NB>::pitch + e % NB];
    }
}

// The gradient to f from those to out and, if there is one, to f itself; and its sums over blocks of pixels of an image.
template <typename T>
struct GateWork {
    const T *f, *gradient, *extra;  // f: null without a gate
    T* f_gradient;                  // null without a gate
    SumOf<T>* parts;                // [n, blocks, width] or null
    int size, half, blocks;         // pixels of an image, channels of out
    Gate gate;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) gate_kernel(const __grid_constant__ GateWork<T> w) {
    using S = SumOf<T>;
    constexpr int kLines = kThreads / kGateColumns;
    __shared__ S lines[2][kLines][kGateColumns];
    const int64_t image = int64_t(blockIdx.x) / w.blocks;
    const int block = int(int64_t(blockIdx.x) % w.blocks), halves = w.gate == Gate::none ? 1 : 2;
    const int lane = int(threadIdx.x) % kGateColumns, line = int(threadIdx.x) / kGateColumns;
    const int column = int(blockIdx.y) * kGateColumns + lane;
    S sum[2] = {S(0), S(0)};
    for (int row = line; row < kGateRows && column < w.half; row += kLines) {
        const int local = block * kGateRows + row;
        if (local >= w.size) break;
        const int64_t pixel = image * w.size + local, at = pixel * halves * w.half + column;
        const S g = widened(w.gradient[pixel * w.half + column]);
        S to[2] = {g, S(0)};
        if (w.gate != Gate::none) {
            const S a = widened(w.f[at]), b = widened(w.f[at + w.half]);
            S slope;
            const S s = sigmoid(b, slope);
            to[0] = w.gate == Gate::tanh ? g * s * slope_of_tanh(a) : g * s;
            to[1] = g * (w.gate == Gate::tanh ? tanh(a) : a) * slope;
            for (int half = 0; half < 2; ++half) {
                if (w.extra != nullptr) to[half] += widened(w.extra[at + half * w.half]);
                w.f_gradient[at + half * w.half] = rounded<T>(to[half]);
            }
        }
        sum[0] += to[0], sum[1] += to[1];
    }
    if (w.parts == nullptr) return;
    for (int half = 0; half < 2; ++half) lines[half][line][lane] = sum[half];
    __syncthreads();
    if (line >= halves || column >= w.half) return;
    S total = 0;
    for (int k = 0; k < kLines; ++k) total += lines[line][k][lane];
    w.parts[int64_t(blockIdx.x) * halves * w.half + line * w.half + column] = total;
}

// out[outer, e] = sum over count of parts[outer, count, e], in order.
template <typename T, typename S>
__global__ void __launch_bounds__(kThreads) add_kernel(const S* parts, int64_t outer, int64_t count, int64_t size, T* out) {
    const int64_t at = int64_t(blockIdx.x) * kThreads + int(threadIdx.x);
    if (at >= outer * size) return;
    const S* from = parts + at / size * count * size + at % size;
    S total = 0;
    for (int64_t k = 0; k < count; ++k) total += from[k * size];
    if constexpr (std::is_same_v<T, S>) {
        out[at] = total;
    } else {
        out[at] = rounded<T>(total);
    }
}

int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, size_t shared, cudaStream_t stream,
                   const Arguments&... arguments) {
    if (shared > (48 << 10)) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(kThreads), config.dynamicSmemBytes = shared, config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

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
        w.in = w.grouped = int(q.cin), w.out_channels = half_;
        w.wide_source = whole(w.in) && whole(w.links) && together(w.in) && aligned(x) && aligned(link.values);
        w.wide_weight = whole(half_) && together(half_) && aligned(weight) && aligned(link.weight);
        return by_width<false>(w, gate == Gate::none ? 1 : 2);
    }

    cudaError_t to_x(const T* f_gradient, const T* weight, T* out) const {
        Work<T> w = work_;
        w.source = f_gradient, w.weight = weight, w.out = out, w.gate = Gate::none;
        w.in = int(q.cout), w.grouped = half_, w.out_channels = int(q.cin);
        const bool wide = whole(w.in) && whole(half_) && together(half_);
        w.wide_source = wide && aligned(f_gradient), w.wide_weight = wide && aligned(weight);
        return by_width<true>(w, 1);
    }

    // Elements of `parts` that to_weight needs.
    int64_t weight_parts(int processors) const { return segments(processors) * work_.taps * q.cin * q.cout; }

    cudaError_t to_weight(const T* x, const T* f_gradient, T* out, SumOf<T>* parts, int processors) const {
        Work<T> w = work_;
        w.source = x, w.gradient = f_gradient, w.parts = parts;
        w.in = int(q.cin), w.grouped = half_, w.out_channels = int(q.cout);
        w.wide_source = whole(w.in) && aligned(x), w.wide_weight = whole(w.out_channels) && aligned(f_gradient);
        const int64_t count = segments(processors), rows = w.taps * q.cin;
        w.segment = parts_of(parts_of(w.pixels, count), Product<T>::depth) * Product<T>::depth;
        const auto run = [&](auto columns) {
            constexpr int NB = decltype(columns)::value;
            const dim3 grid(unsigned(parts_of(rows, Product<T>::rows)), unsigned(parts_of(q.cout, NB)), unsigned(count));
            return launch(weight_kernel<T, NB>, grid, Room<T, NB>::all, stream_, w);
        };
        Errors errors;
        errors += wide(q.cout) ? run(std::integral_constant<int, kMostColumns>{}) : run(std::integral_constant<int, 64>{});
        errors += add(parts, 1, count, rows * q.cout, out);
        return errors.first;
    }

    template <typename To>
    cudaError_t add(const SumOf<T>* parts, int64_t outer, int64_t count, int64_t size, To* out) const {
        const dim3 grid(unsigned(parts_of(outer * size, kThreads)));
        return launch(add_kernel<To, SumOf<T>>, grid, 0, stream_, parts, outer, count, size, out);
    }

    int64_t blocks() const { return parts_of(q.h * q.w, kGateRows); }  // of an image, for sums

    cudaError_t to_f(const T* f, const T* gradient, const T* extra, T* f_gradient, SumOf<T>* parts, Gate gate) const {
        const GateWork<T> w{f, gradient, extra, f_gradient, parts, int(q.h * q.w), half_, int(blocks()), gate};
        const dim3 grid(unsigned(q.n * blocks()), unsigned(parts_of(half_, kGateColumns)));
        return launch(gate_kernel<T>, grid, 0, stream_, w);
    }

private:
    static constexpr int kMostColumns = sizeof(T) == 8 ? 64 : 128;

    const MaskedConv& q;
    cudaStream_t stream_;
    Work<T> work_{};
    int half_;

    static bool whole(int64_t channels) { return channels % kVector<T> == 0; }
    static bool aligned(const T* array) { return reinterpret_cast<uintptr_t>(array) % 16 == 0; }  // a view may not be
    // Are vectors of these channels of one group?
    bool together(int channels) const {
        return work_.groups == 1 || (!work_.interleaved && whole(channels / work_.groups));
    }
    static bool wide(int64_t columns) { return columns > 64; }

    template <bool MIRRORED>
    cudaError_t by_width(const Work<T>& w, int halves) const {
        const int64_t part = w.out_channels / w.groups;
        const auto run = [&](auto columns) {
            constexpr int NB = decltype(columns)::value;
            const dim3 grid(unsigned(parts_of(w.pixels, Product<T>::rows)), unsigned(w.groups * parts_of(part, NB / halves)));
            return launch(conv_kernel<T, NB, MIRRORED>, grid, Room<T, NB>::all, stream_, w);
        };
        return wide(part * halves) ? run(std::integral_constant<int, kMostColumns>{}) : run(std::integral_constant<int, 64>{});
    }

    // Of the pixels, for the gradient to weight.
    int64_t segments(int processors) const {
        const int64_t columns = wide(q.cout) ? kMostColumns : 64;
        const int64_t tiles = parts_of(work_.taps * q.cin, Product<T>::rows) * parts_of(q.cout, columns);
        const int64_t wanted = parts_of(int64_t(processors) * kBlocksPerProcessor, tiles);
        const int64_t segment = parts_of(parts_of(work_.pixels, wanted), 4 * Product<T>::depth) * 4 * Product<T>::depth;
        return parts_of(work_.pixels, segment);
    }
};

// Where the numbers of the backward pass lie in the workspace; what is not needed has no room.
template <typename T>
struct Plan {
    MaskedConv link_conv;  // one tap
    size_t f_gradient = 0, sums, weight, link_weight, all;

    Plan(const MaskedConv& conv, int64_t links, const ConvGradients<void>& result, int processors)
        : link_conv{conv.n, conv.h, conv.w, std::max<int64_t>(links, 1), conv.cout, {{0, 0}}, {}, false} {
        const auto room = [](bool needed, int64_t count, size_t each) {
            return needed ? (size_t(count) * each + 255) / 256 * 256 : 0;
        };
        const Conv<T> own(conv, true, nullptr), linked(link_conv, true, nullptr);
        const int64_t f_size = conv.n * conv.h * conv.w * conv.cout;
        sums = f_gradient + room(conv.gated && result.f == nullptr, f_size, sizeof(T));
        weight = sums + room(result.sums != nullptr, conv.n * own.blocks() * conv.cout, sizeof(SumOf<T>));
        link_weight = weight + room(result.weight != nullptr, own.weight_parts(processors), sizeof(SumOf<T>));
        all = link_weight + room(result.link_weight != nullptr, linked.weight_parts(processors), sizeof(SumOf<T>));
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

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

const char* too_large(const MaskedConv& conv) {
    if (conv.taps.size() > kMaxTaps || conv.h > 32767 || conv.w > 32767) return "at most 512 taps, and 32767 pixels a side";
    return conv.n * parts_of(conv.h * conv.w, kGateRows) > 0x7fffffff ? "too many pixels" : nullptr;
}

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

size_t masked_conv_cuda_workspace(Number number, const MaskedConv& conv, int64_t links, const ConvGradients<void>& result,
                                  int processors) {
    if (too_large(conv) != nullptr) return 0;
    return by_number(number, [&](auto zero) { return Plan<decltype(zero)>(conv, links, result, processors).all; });
}

const char* masked_conv_gradients_cuda(Number number, bool exact, const MaskedConv& conv, const void* x, const void* weight,
                                       const Link<void>& link, Gate gate, const void* f, const void* out_gradient,
                                       const void* extra, const ConvGradients<void>& result, void* workspace,
                                       int processors, void* stream) {
    if (const char* error = too_large(conv)) return error;
    return by_number(number, [&](auto zero) {
        using T = decltype(zero);
        const Plan<T> plan(conv, link.channels, result, processors);
        const cudaStream_t queue = static_cast<cudaStream_t>(stream);
        const Conv<T> own(conv, exact, queue), linked(plan.link_conv, exact, queue);
        const auto in = [](const void* t) { return static_cast<const T*>(t); };
        const auto to = [](void* t) { return static_cast<T*>(t); };
        const auto room = [&](size_t at) { return static_cast<char*>(workspace) + at; };
        const auto parts = [&](size_t at) { return reinterpret_cast<SumOf<T>*>(room(at)); };
        const T* g = in(out_gradient);
        Errors errors;
        if (conv.gated || result.sums != nullptr) {
            T* const f_gradient = !conv.gated ? nullptr : result.f != nullptr ? to(result.f)
                                                     : reinterpret_cast<T*>(room(plan.f_gradient));
            SumOf<T>* const sums = result.sums != nullptr ? parts(plan.sums) : nullptr;
            errors += own.to_f(in(f), g, in(extra), f_gradient, sums, gate);
            if (sums != nullptr) errors += own.add(sums, conv.n, own.blocks(), conv.cout, static_cast<SumOf<T>*>(result.sums));
            if (conv.gated) g = f_gradient;
        }
        const auto products = [&](const Conv<T>& c, const void* source, const void* matrix, void* to_source, void* to_matrix,
                                  size_t at) {
            if (to_source != nullptr) errors += c.to_x(g, in(matrix), to(to_source));
            if (to_matrix != nullptr) errors += c.to_weight(in(source), g, to(to_matrix), parts(at), processors);
        };
        products(own, x, weight, result.x, result.weight, plan.weight);
        products(linked, link.values, link.weight, result.link, result.link_weight, plan.link_weight);
        return text_of(errors.first);
    });
}

}  // namespace infovae_fast
