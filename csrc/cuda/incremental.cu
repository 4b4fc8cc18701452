// Whole images of a gated PixelCNN on a GPU, in one launch.
//
// A block owns up to 8 images (float64: 2) from the first to the last pixel and waits for no other block:
//
//     row     the vertical stack: products of matrices [images width, K] x [K, 2C], tiles in registers. The rings and
//             the bases of the images are in the block's part of the workspace; tiles and weights come through shared
//             memory, the next while one is multiplied
//     pixel   the horizontal stack and the head: products [images, K] x [K, M]. The inputs are in shared memory, the
//             images side by side. A thread has a few columns of M and every S-th row of K; the S sums of a column are
//             added in their order. Each weight is read once a pixel, by one thread, for all images
//
// The weights of a pixel are a tape in the order in which the threads use them, the same for each pixel: a thread
// copies ahead what it alone will read, through barriers and to the next pixel, so that no product waits for memory.
// Sums do not depend on the number of images: each has its own, in the same order.
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "cuda/launch.h"
#include "cuda/shared_memory.h"
#include "incremental.h"

namespace infovae_fast {
namespace {

constexpr int kThreads = kImageThreads;
constexpr int kAhead = 8;      // steps of the tape in shared memory; cuda_pipeline.h waits for no more
constexpr int kDeep = 16;      // rows of a vertical matrix in shared memory at once
constexpr int kColumns = 8;    // of a vertical product that a thread has
constexpr int kMaxSlices = 32; // of the rows of a horizontal matrix: more cost more to add up than they save
constexpr int kMaxLayers = kImageMaxLayers;
template <typename T>
constexpr int kLanes = 16 / int(sizeof(T));
template <typename T>
constexpr int kMaxImages = sizeof(T) == 4 ? 8 : 2;  // of a block

// Brings a line of memory near that will be read soon.
__device__ __forceinline__ void expect([[maybe_unused]] const void* at) {
#ifdef __CUDA_ARCH__
    asm volatile("prefetch.global.L1 [%0];" ::"l"(at));
#endif
}

template <typename T, int count>
struct alignas(count * sizeof(T) < 16 ? count * sizeof(T) : 16) Pack {
    T at[count];
};
template <int count, typename T>
__device__ __forceinline__ const Pack<T, count>& pack(const T* from) {
    return *reinterpret_cast<const Pack<T, count>*>(from);
}

template <typename T>
__device__ __forceinline__ T gate(T a, T b) {
    return tanh(a) / (T(1) + exp(-b));
}

// The k at which the cumulated softmax of `count` logits / temperature passes u, found by a warp; -1 where one is NaN.
template <typename T, typename F>
__device__ __forceinline__ int choose(int count, T u, T temperature, F logit) {
    const int lane = int(threadIdx.x) % 32, each = (count + 31) / 32;
    const int begin = min(lane * each, count), end = min(begin + each, count);
    constexpr unsigned all = 0xffffffffu;
    T most = T(-INFINITY), own = 0;
    for (int k = begin; k < end; ++k) most = max(most, logit(k));
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) most = max(most, __shfl_xor_sync(all, most, offset));
    for (int k = begin; k < end; ++k) own += exp((logit(k) - most) / temperature);
    T sum = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const T before = __shfl_up_sync(all, sum, offset);
        if (lane >= offset) sum += before;
    }
    const T total = __shfl_sync(all, sum, 31), before = __shfl_up_sync(all, sum, 1);
    sum = lane == 0 ? T(0) : before;
    int passed = 0;
    for (int k = begin; k < end; ++k) {
        sum += exp((logit(k) - most) / temperature);
        passed += k + 1 < count && sum <= u * total;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) passed += __shfl_xor_sync(all, passed, offset);
    return total == total ? passed : -1;
}

// A horizontal product with so many columns: thread t has lanes of columns t % quads, rows t / quads + v slices.
struct Split {
    int columns, quads, slices, pitch;  // pitch: of the sums of a slice and image
};
template <typename T>
Split split(int columns) {
    const int quads = (columns + kLanes<T> - 1) / kLanes<T>;
    return {columns, quads, std::min(kThreads / quads, kMaxSlices), (quads + 1) * kLanes<T>};
}
inline int steps(const Split& s, int rows) { return (rows + s.slices - 1) / s.slices; }

template <typename T>
struct Work {
    int64_t n;
    int channels, height, width, maps, groups, params, layers, first_reach, reach;
    const T *above[kMaxLayers], *beside[kMaxLayers];
    int64_t condition_image, condition_row, condition_column;
    int levels, mixtures, draws;
    const float* uniforms;
    const T* known;
    const bool* mask;
    T temperature, *x, *out;
    // Matrices of the vertical stack: rows of `wide`; inputs of `first_depth` and `depth` channels.
    const T *vertical, *tape, *biases, *tape_end;
    int wide, first_depth, depth;
    // The workspace of an image: the rings, then the bases [width, layers, wide].
    T* workspace;
    int first_ring, ring, rings, image_size;
    // The division of the work.
    int images;                // of a block
    Split gates, own, logits;  // products with two columns for each map of a group, with one, with the params
    int across, tile;          // threads that share the columns of a vertical tile, and its rows
    // Shared memory, in elements after the steps of the tape.
    int bias_count, bias_room;
    int state, memory, head, drawn, sums;   // of a pixel
    int left, right, below, offsets;        // of a row
};

// What the threads read of the horizontal weights, kAhead - 1 steps ahead.
template <typename T>
struct Tape {
    using Lane = Pack<T, kLanes<T>>;
    Lane* slots;  // [kAhead, threads], of this thread
    const Lane *next, *end;
    int64_t size;
    unsigned step = 0;

    __device__ Tape(T* memory, const Work<T>& w)
        : slots(reinterpret_cast<Lane*>(memory) + threadIdx.x),
          next(reinterpret_cast<const Lane*>(w.tape) + threadIdx.x),
          end(reinterpret_cast<const Lane*>(w.tape_end)), size(end - reinterpret_cast<const Lane*>(w.tape)) {
        for (int k = 0; k < kAhead - 1; ++k) bring(k);
    }
    __device__ __forceinline__ void bring(unsigned k) {
        __pipeline_memcpy_async(slots + k % kAhead * kThreads, next, sizeof(Lane));
        __pipeline_commit();
        next += kThreads;
        if (next >= end) next -= size;
    }
    __device__ __forceinline__ Lane take() {
        __pipeline_wait_prior(kAhead - 2);
        const Lane lane = slots[step % kAhead * kThreads];
        bring(step + kAhead - 1);  // in the place of the one before, which is used
        ++step;
        return lane;
    }
};

// The vertical stack of row i: bases, and row i of all rings but the first. R rows of a tile are a thread's.
template <typename T, int R>
__device__ __forceinline__ void vertical_row(const Work<T>& w, int i, int64_t first, int count, T* workspace,
                                             T* scratch) {
    constexpr int V = kLanes<T>, Q = kColumns / V, pieces = kDeep / V;
    using Lane = Pack<T, V>;
    const int thread = int(threadIdx.x), wide = w.wide, left_stride = kDeep + V, below_stride = wide + V;
    const int high = kThreads / w.across, tx = thread % w.across, y = thread / w.across, ty = y < high ? y : high - 1;
    T *const left = scratch + w.left, *const right = scratch + w.right, *const below = scratch + w.below;
    int *const row_at = reinterpret_cast<int*>(scratch + w.offsets), *const tap_at = row_at + w.tile;
    int column[Q];
#pragma unroll
    for (int q = 0; q < Q; ++q) column[q] = min((q * w.across + tx) * V, wide - V);

    const T* matrix = w.vertical;
    T* ring = workspace;
    for (int l = 0; l < w.layers; ++l) {
        const int reach = l == 0 ? w.first_reach : w.reach, depth = l == 0 ? w.first_depth : w.depth;
        const int side = 2 * reach + 1, taps = (l == 0 ? reach : reach + 1) * side, K = taps * depth;
        const int ring_row = (w.width + 2 * reach) * depth, next_row = (w.width + 2 * w.reach) * w.depth;
        T* const next_ring = ring + (l == 0 ? w.first_ring : w.ring);
        const T *const bias = matrix + int64_t(K) * wide, *const link = bias + wide;
        for (int start = 0; start < count * w.width; start += w.tile) {
            const int rows = min(w.tile, count * w.width - start);
            for (int k = thread; k < rows; k += kThreads) {
                row_at[k] = (start + k) / w.width * w.image_size + (start + k) % w.width * depth;
            }
            for (int k = thread; k < taps; k += kThreads) {
                tap_at[k] = (i + k / side + 1) % (reach + 1) * ring_row + k % side * depth;  // row i + k / side - reach
            }
            int row[R];
            T acc[R][kColumns];
#pragma unroll
            for (int r = 0; r < R; ++r) row[r] = min(ty + r * high, rows - 1);

            // acc = the tile's rows of `input`, `stride` apart, by the matrix; null: what the taps see of the ring.
            const auto multiply = [&](const T* input, int stride, const T* weights, int inputs) {
#pragma unroll
                for (int r = 0; r < R; ++r) {
#pragma unroll
                    for (int c = 0; c < kColumns; ++c) acc[r][c] = T(0);
                }
                const auto bring = [&](int from, int stage) {
                    const int piece = thread % pieces * V, k = from + piece;
                    const int many = min(kDeep, inputs - from) * wide / V;
                    if (input == nullptr && k < inputs) {
                        const T* at = ring + tap_at[k / depth] + k % depth;
                        for (int r = thread / pieces; r < rows; r += kThreads / pieces) {
                            T* const to = left + (stage * w.tile + r) * left_stride + piece;
                            __pipeline_memcpy_async(to, at + row_at[r], 16);
                        }
                    }
                    for (int e = thread; e < many; e += kThreads) {
                        const T* at = weights + int64_t(from) * wide + e * V;
                        __pipeline_memcpy_async(right + stage * kDeep * wide + e * V, at, 16);
                    }
                    __pipeline_commit();
                };
                __syncthreads();  // the offsets, or the rows, are there; nobody reads the last tile
                bring(0, 0);
                for (int from = 0, stage = 0; from < inputs; from += kDeep, stage ^= 1) {
                    __pipeline_wait_prior(0);
                    __syncthreads();
                    if (from + kDeep < inputs) bring(from + kDeep, stage ^ 1);
                    const T* a = input == nullptr ? left + stage * w.tile * left_stride : input + from;
                    const T* b = right + stage * kDeep * wide;
                    const int end = min(kDeep, inputs - from);
                    for (int k = 0; k < end; k += V) {
                        Lane x[R];
#pragma unroll
                        for (int r = 0; r < R; ++r) x[r] = pack<V>(a + row[r] * stride + k);
#pragma unroll
                        for (int m = 0; m < V; ++m) {
#pragma unroll
                            for (int q = 0; q < Q; ++q) {
                                const Lane u = pack<V>(b + (k + m) * wide + column[q]);
#pragma unroll
                                for (int r = 0; r < R; ++r) {
#pragma unroll
                                    for (int c = 0; c < V; ++c) {
                                        acc[r][q * V + c] = fma(x[r].at[m], u.at[c], acc[r][q * V + c]);
                                    }
                                }
                            }
                        }
                    }
                }
            };
            // put(row, image, pixel of the row, column, sums + added + condition), V sums of this thread at once.
            const auto each = [&](const T* added, const T* condition, auto put) {
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    const int at = ty + r * high, image = (start + at) / w.width, j = (start + at) % w.width;
                    if (y >= high || at >= rows) continue;
                    const T* of_pixel = condition + (first + image) * w.condition_image + i * w.condition_row +
                                        j * w.condition_column;
#pragma unroll
                    for (int q = 0; q < Q; ++q) {
                        const int c = (q * w.across + tx) * V;
                        if (c >= wide) continue;
                        Lane value = pack<V>(added + c);
                        const Lane more = pack<V>(of_pixel + c);
#pragma unroll
                        for (int k = 0; k < V; ++k) value.at[k] += acc[r][q * V + k] + more.at[k];
                        put(at, image, j, c, value);
                    }
                }
            };
#pragma unroll 1
            for (int pass = 0; pass < 2; ++pass) {  // what the taps see, then the link
                const bool linked = pass == 1;
                multiply(linked ? below : nullptr, linked ? below_stride : left_stride, linked ? link : matrix,
                         linked ? wide : K);
                each(linked ? link + int64_t(wide) * wide : bias, linked ? w.beside[l] : w.above[l],
                     [&](int at, int image, int j, int c, const Lane& value) {
                         T* base = workspace + image * w.image_size + w.rings + (j * w.layers + l) * wide;
                         *reinterpret_cast<Lane*>(linked ? base + c : below + at * below_stride + c) = value;
                     });
            }
            for (int e = thread; l + 1 < w.layers && e < rows * w.maps; e += kThreads) {
                const int at = e / w.maps, c = e % w.maps, image = (start + at) / w.width, j = (start + at) % w.width;
                const T* f = below + at * below_stride + c;
                next_ring[image * w.image_size + i % (w.reach + 1) * next_row + (w.reach + j) * w.depth + c] =
                    gate(f[0], f[w.maps]);
            }
            __syncthreads();
        }
        ring = next_ring;
        matrix = link + int64_t(wide + 1) * wide;
    }
}

// The horizontal stack, the head and the draw, for the pixels of row i one after the other.
template <typename T, int I>
__device__ __forceinline__ void horizontal_row(const Work<T>& w, int i, int64_t first, int count, T* workspace,
                                               T* scratch, const T* biases, Tape<T>& tape) {
    constexpr int V = kLanes<T>;
    using Lane = Pack<T, V>;
    const int thread = int(threadIdx.x), maps = w.maps, own = maps / w.groups;
    const int first_size = (2 * w.first_reach + 1) * w.channels * I, size = (2 * w.reach + 1) * maps * I;
    T *const state = scratch + w.state, *const memory = scratch + w.memory, *const head = scratch + w.head;
    T *const drawn = scratch + w.drawn, *const sums = scratch + w.sums;
    for (int k = thread; k < w.sums; k += kThreads) scratch[k] = T(0);  // left of the row; groups that come later
    __syncthreads();

    // sums = x [K, I] by the next matrix of the tape.
    const auto product = [&](const Split& s, const T* x, int K) {
        const int quad = thread % s.quads, slice = thread / s.quads;
        T acc[I][V] = {};
        for (int k = slice, v = 0; v < K; k += s.slices, v += s.slices) {
            const Lane u = tape.take();
            const Pack<T, I> a = pack<I>(x + min(k, K - 1) * I);  // behind the end the weights are zeros
#pragma unroll
            for (int image = 0; image < I; ++image) {
#pragma unroll
                for (int c = 0; c < V; ++c) acc[image][c] = fma(a.at[image], u.at[c], acc[image][c]);
            }
        }
        if (slice < s.slices) {
#pragma unroll
            for (int image = 0; image < I; ++image) {
                Lane lane;
#pragma unroll
                for (int c = 0; c < V; ++c) lane.at[c] = acc[image][c];
                *reinterpret_cast<Lane*>(sums + (slice * I + image) * s.pitch + quad * V) = lane;
            }
        }
        __syncthreads();
    };
    const auto sum = [&](const Split& s, int image, int column, T value) {
        const T* at = sums + image * s.pitch + column;
#pragma unroll 4
        for (int slice = 0; slice < s.slices; ++slice) value += at[slice * I * s.pitch];
        return value;
    };
    // Of a row of inputs the last reach + 1 columns, each twice, so that any reach + 1 of them lie side by side: those
    // of column j start at place (j + 1) % (reach + 1).
    const auto put = [&](T* row, int place, int reach, int channels, int c, int image, T value) {
        row[((place + reach) * channels + c) * I + image] = value;
        if (place > 0) row[((place - 1) * channels + c) * I + image] = value;
    };

    for (int j = 0; j < w.width; ++j) {
        const int first_place = (j + 1) % (w.first_reach + 1), place = (j + 1) % (w.reach + 1);
        const int bases = w.layers * w.wide, line = 128 / int(sizeof(T)), lines = (bases + line - 1) / line;
        const auto base_of = [&](int image, int column) {
            return workspace + image * w.image_size + w.rings + column * bases;
        };
        for (int k = thread; j + 1 < w.width && k < count * lines; k += kThreads) {
            expect(base_of(k / lines, j + 1) + k % lines * line);
        }
        const int64_t pixels = int64_t(w.height) * w.width, pixel = int64_t(i) * w.width + j;
        if (w.groups > 1) {  // what is left of another pixel has no weight, but NaN times that is NaN
            for (int k = w.memory + thread; k < w.drawn; k += kThreads) scratch[k] = T(0);
            for (int e = thread; e < w.channels * I; e += kThreads) {
                put(state, first_place, w.first_reach, w.channels, e / I, e % I, T(0));
            }
            for (int e = thread; e < (w.layers - 1) * maps * I; e += kThreads) {
                put(state + first_size + e / (maps * I) * size, place, w.reach, maps, e / I % maps, e % I, T(0));
            }
            __syncthreads();
        }
        for (int group = 0; group < w.groups; ++group) {
            // The products: gate 0, step 0, gate 1, .., gate L - 1, then the head's three.
            for (int p = 0; p < 2 * w.layers + 2; ++p) {
                const int l = p / 2, k = p - (2 * w.layers - 1);  // k: of the head
                const bool gates = k < 0 && p % 2 == 0;
                const int here = l == 0 ? first_place : place, reach = l == 0 ? w.first_reach : w.reach;
                const int channels = l == 0 ? w.channels : maps, taps = l == 0 && w.groups == 1 ? reach : reach + 1;
                T* const row = l == 0 ? state : state + first_size + (l - 1) * size;
                const Split s = gates ? w.gates : k == 2 ? w.logits : w.own;
                const T* const x = gates   ? row + here * channels * I
                                   : k > 0 ? head + (k - 1) * maps * I
                                           : memory + (k < 0 ? l * maps * I : 0);
                product(s, x, gates ? taps * channels : k == 0 ? w.layers * maps : maps);
                const T* const bias = biases + (k < 0 ? l : w.layers - 1 + k) * maps + group * s.columns;
                for (int e = thread; e < (gates ? own : s.columns) * I; e += kThreads) {
                    const int image = e % I, c = e / I, m = group * own + c;
                    if (gates) {
                        const T* base = base_of(image, j) + l * w.wide + group * 2 * own + c;
                        const T a = sum(s, image, c, image < count ? base[0] : T(0));
                        const T b = sum(s, image, own + c, image < count ? base[own] : T(0));
                        memory[(l * maps + m) * I + image] = gate(a, b);
                        continue;
                    }
                    const T value = sum(s, image, c, bias[c]);
                    if (k < 0) {
                        const T before = l == 0 ? T(0) : row[((place + w.reach) * maps + m) * I + image];
                        put(state + first_size + l * size, place, w.reach, maps, m, image, value + before);
                    } else if (k < 2) {
                        head[(k * maps + m) * I + image] = value < 0 ? T(0) : value;
                    } else {
                        drawn[e] = value;
                        if (w.out != nullptr && image < count) {
                            w.out[((first + image) * w.params + c * w.groups + group) * pixels + pixel] = value;
                        }
                    }
                }
                __syncthreads();
            }
            const auto place_of = [&](int image, int c, int channels) {
                return ((first + image) * channels + c) * pixels + pixel;
            };
            const auto set = [&](int image, int c, T x) {
                const T value = T(2) * x - T(1);
                w.x[place_of(image, c, w.channels)] = x;
                put(state, first_place, w.first_reach, w.channels, c, image, value);
                workspace[image * w.image_size + (i % (w.first_reach + 1) * (w.width + 2 * w.first_reach) +
                          w.first_reach + j) * w.first_depth + c] = value;
            };
            const auto known = [&](int image, int c) {
                return w.uniforms == nullptr || w.mask[place_of(image, c, w.channels)];
            };
            const int colours = w.channels / w.groups;
            for (int e = thread; (w.uniforms == nullptr || w.levels == 0) && e < colours * I; e += kThreads) {  // bits
                const int image = e % I, c = e / I * w.groups + group;
                if (image >= count) continue;
                const int64_t at = place_of(image, c, w.channels);
                if (known(image, c)) set(image, c, w.known[at]);
                else {
                    const T p = T(1) / (T(1) + exp(-drawn[e] / w.temperature));
                    set(image, c, T(w.uniforms[at]) < p ? T(1) : p == p ? T(0) : p);
                }
            }
            // Levels: a warp for each image, and colour if they do not depend on each other.
            const int tasks = w.uniforms == nullptr || w.levels == 0 ? 0 : w.mixtures > 0 ? I : colours * I;
            for (int task = thread / 32; task < tasks; task += kThreads / 32) {
                const int image = task % I, own_c = task / I, c = own_c * w.groups + group;
                if (image >= count) continue;
                if (known(image, c)) {
                    for (int k = c; k < (w.mixtures > 0 ? w.channels : c + 1); ++k) {
                        if (thread % 32 == 0) set(image, k, w.known[place_of(image, k, w.channels)]);
                    }
                    continue;
                }
                const T last = T(w.levels - 1);
                const auto noise = [&](int k) { return T(w.uniforms[place_of(image, k, w.draws)]); };
                const int choices = w.mixtures > 0 ? w.mixtures : w.levels, stride = w.mixtures > 0 ? 1 : colours;
                const int chosen = choose(choices, noise(c), T(w.temperature), [&](int k) {
                    return drawn[(k * stride + own_c) * I + image];
                });
                if (thread % 32 != 0) continue;
                if (chosen < 0) {
                    for (int k = c; k < (w.mixtures > 0 ? w.channels : c + 1); ++k) set(image, k, T(NAN));
                    continue;
                }
                if (w.mixtures == 0) {
                    set(image, c, T(chosen) / last);
                    continue;
                }
                const auto param = [&](int row) { return drawn[(row * w.mixtures + chosen) * I + image]; };
                T y[3];
#pragma unroll
                for (int k = 0; k < 3; ++k) {
                    if (k >= w.channels) continue;
                    T mean = param(3 * k + 1);
#pragma unroll
                    for (int b = 0; b < k; ++b) mean += tanh(param(3 * (k * (k - 1) / 2 + b) + 3)) * y[b];
                    const T u = noise(1 + k), spread = exp(param(3 * k + 2)) * (w.temperature * log(u / (T(1) - u)));
                    const T level = rint((mean + spread + T(1)) * (last / T(2)));
                    const T kept = level < 0 ? T(0) : level > last ? last : level;  // NaN stays
                    y[k] = kept / (last / T(2)) - T(1);
                    set(image, k, kept / last);
                }
            }
            __syncthreads();
        }
    }
}

template <typename T, int I, int R>
__global__ void __launch_bounds__(kThreads, 1) images_kernel(const __grid_constant__ Work<T> w) {
    T* const shared = shared_memory<T>();
    T* const biases = shared + kAhead * kThreads * kLanes<T>;
    T* const scratch = biases + w.bias_room;
    T* const workspace = w.workspace + int64_t(blockIdx.x) * w.images * w.image_size;
    Tape<T> tape(shared, w);
    const int thread = int(threadIdx.x);
    for (int k = thread; k < w.bias_count; k += kThreads) biases[k] = w.biases[k];
    for (int64_t first = int64_t(blockIdx.x) * w.images; first < w.n; first += int64_t(gridDim.x) * w.images) {
        const int count = int(w.n - first < w.images ? w.n - first : w.images);
        for (int image = 0; image < count; ++image) {
            for (int k = thread; k < w.rings; k += kThreads) workspace[image * w.image_size + k] = T(0);
        }
        for (int i = 0; i < w.height; ++i) {
            vertical_row<T, R>(w, i, first, count, workspace, scratch);
            horizontal_row<T, I>(w, i, first, count, workspace, scratch, biases, tape);
        }
    }
    __pipeline_wait_prior(0);
}

template <typename T>
struct Plan {
    Work<T> work{};
    int images = 0;  // of the kernel: a power of 2
    int64_t blocks = 0, elements = 0, table = 0;
    size_t shared = 0;
    const char* error = nullptr;
};

constexpr int rows_of_thread(int images) {  // of a vertical tile; as many as the registers hold
    return images == 1 ? 2 : images == 8 ? 8 : 4;
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The kernel for so many images, and its shared memory.
template <typename T>
void divide(Plan<T>& p, int images) {
    constexpr int V = kLanes<T>;
    Work<T>& w = p.work;
    const int logits = w.params / w.groups, side = 2 * std::max(w.first_reach, w.reach) + 1;
    p.images = images;
    w.state = 0;
    w.memory = (2 * w.first_reach + 1) * w.channels * images + (w.layers - 1) * (2 * w.reach + 1) * w.maps * images;
    w.head = w.memory + w.layers * w.maps * images;
    w.drawn = w.head + 2 * w.maps * images;
    w.sums = int(round_up(w.drawn + logits * images, V));
    const auto room = [&](const Split& s) { return s.slices * images * s.pitch; };
    const int most = std::max({room(w.gates), room(w.own), room(w.logits)});
    w.tile = std::min(kThreads / w.across * rows_of_thread(images), images * w.width);
    w.left = 0;
    w.right = w.left + 2 * w.tile * (kDeep + V);
    w.below = w.right + 2 * kDeep * w.wide;
    w.offsets = w.below + w.tile * (w.wide + V);
    const int64_t row = int64_t(w.offsets) * int64_t(sizeof(T)) + (w.tile + side * side) * int64_t(sizeof(int));
    const int64_t pixel = int64_t(w.sums + most) * int64_t(sizeof(T));
    p.shared = size_t((kAhead * kThreads * V + w.bias_room) * int64_t(sizeof(T)) + std::max(row, pixel));
}

template <typename T>
Plan<T> plan(const PixelImages<T>& q, int processors, size_t shared) {
    constexpr int V = kLanes<T>;
    Plan<T> p;
    if (q.layers > kMaxLayers || 2 * q.maps > kThreads * kColumns || q.params / q.groups > kThreads * V ||
        2 * q.maps / q.groups > kThreads * V) {
        p.error = "at most 32 layers, 1024 maps, and 1024 (in float64 512) columns of a group";
        return p;
    }
    Work<T>& w = p.work;
    w.n = q.n, w.channels = int(q.channels), w.height = int(q.height), w.width = int(q.width), w.maps = int(q.maps);
    w.groups = int(q.groups), w.params = int(q.params), w.layers = int(q.layers);
    w.first_reach = int(q.first_reach), w.reach = int(q.reach);
    std::copy(q.above.begin(), q.above.end(), w.above), std::copy(q.beside.begin(), q.beside.end(), w.beside);
    w.condition_image = q.condition_image, w.condition_row = q.condition_row, w.condition_column = q.condition_column;
    w.levels = int(q.levels), w.mixtures = int(q.mixtures), w.draws = w.channels + (w.mixtures > 0 ? 1 : 0);
    w.uniforms = q.uniforms, w.known = q.known, w.mask = q.mask, w.temperature = q.temperature;
    w.x = q.x, w.out = q.out;

    const int own = w.maps / w.groups, side = 2 * w.first_reach + 1, other_side = 2 * w.reach + 1;
    w.wide = int(round_up(2 * w.maps, V));
    w.first_depth = int(round_up(w.channels, V)), w.depth = int(round_up(w.maps, V));
    w.gates = split<T>(2 * own), w.own = split<T>(own), w.logits = split<T>(w.params / w.groups);
    w.across = (w.wide + kColumns - 1) / kColumns;
    const auto vertical = [&](int64_t taps, int64_t depth) { return (taps * depth + w.wide + 2) * w.wide; };
    const int64_t others = w.layers - 1, first_taps = w.groups == 1 ? w.first_reach : w.first_reach + 1;
    const int64_t group_steps =
        steps(w.gates, int(first_taps * w.channels)) + steps(w.own, w.layers * w.maps) + steps(w.own, w.maps) +
        steps(w.logits, w.maps) + others * (steps(w.gates, (w.reach + 1) * w.maps) + steps(w.own, w.maps));
    w.vertical = q.table;
    w.tape = w.vertical + vertical(w.first_reach * side, w.first_depth) +
             others * vertical((w.reach + 1) * other_side, w.depth);
    w.tape_end = w.biases = w.tape + w.groups * group_steps * kThreads * V;
    w.bias_count = (w.layers + 1) * w.maps + w.params;
    w.bias_room = int(round_up(w.bias_count, V));
    p.table = w.biases - q.table + w.bias_count;

    const int64_t first_ring = (w.first_reach + 1) * int64_t(w.width + 2 * w.first_reach) * w.first_depth;
    const int64_t ring = (w.reach + 1) * int64_t(w.width + 2 * w.reach) * w.depth;
    const int64_t rings = round_up(first_ring + others * ring, 32);  // lines of memory
    const int64_t image_size = round_up(rings + int64_t(w.width) * w.layers * w.wide, 32);
    if (image_size * kMaxImages<T> > int64_t(1) << 30) p.error = "an image of fewer columns: offsets have 32 bits";
    if (p.error != nullptr) return p;
    w.first_ring = int(first_ring), w.ring = int(ring), w.rings = int(rings), w.image_size = int(image_size);

    const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    int64_t each = std::clamp<int64_t>(ceil(w.n, processors), 1, kMaxImages<T>);
    const auto fit = [&] {
        int images = 1;
        while (images < each) images *= 2;
        divide(p, images);
    };
    for (fit(); p.shared > shared && each > 1; fit()) each = p.images / 2;
    if (p.shared > shared) {
        p.error = "more shared memory: the maps, layers or colours are too many";
        return p;
    }
    const int64_t rounds = std::max<int64_t>(1, ceil(w.n, processors * each));
    each = std::max<int64_t>(1, ceil(w.n, processors * rounds));  // as many in each round
    fit();
    w.images = int(each);
    p.blocks = std::min<int64_t>(processors, ceil(w.n, each));
    p.elements = p.blocks * each * image_size;
    return p;
}

template <typename T, int I>
cudaError_t launch_images(const Plan<T>& p, cudaStream_t stream) {
    if constexpr (I > 1) {
        if (p.images < I) return launch_images<T, I / 2>(p, stream);
    }
    const auto kernel = images_kernel<T, I, rows_of_thread(I)>;
    if (const cudaError_t error = allow_shared(kernel, p.shared)) return error;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(p.blocks), 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.dynamicSmemBytes = p.shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, p.work);
}

}  // namespace

template <typename T>
ImagesNeed images_cuda_need(const PixelImages<T>& images, int processors, size_t shared) {
    const Plan<T> p = plan(images, processors, shared);
    return {p.table, size_t(p.elements) * sizeof(T), p.shared, p.error};
}

template <typename T>
const char* images_cuda(const PixelImages<T>& images, void* workspace, int processors, size_t shared, void* stream) {
    Plan<T> p = plan(images, processors, shared);
    if (p.error != nullptr || p.blocks == 0) return p.error;
    p.work.workspace = static_cast<T*>(workspace);
    const auto queue = static_cast<cudaStream_t>(stream);
    return text_of(launch_images<T, kMaxImages<T>>(p, queue));
}

#define INSTANTIATE(T)                                                                    \
    template ImagesNeed images_cuda_need<T>(const PixelImages<T>&, int, size_t);          \
    template const char* images_cuda<T>(const PixelImages<T>&, void*, int, size_t, void*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace infovae_fast
