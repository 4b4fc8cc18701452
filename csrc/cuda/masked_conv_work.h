// What the kernels of `masked_conv` share: the problem, numbers side by side, the gate.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda/elementary.h"
#include "cuda/products.h"
#include "masked_conv.h"

namespace infovae_fast {
namespace {

constexpr int kMaxTaps = 512;

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

// V numbers side by side, which are read and written at once.
template <typename T, int V>
struct __align__(V * sizeof(T)) Vector {
    T x[V];
};
template <typename S, int V>
__device__ __forceinline__ void operator+=(Vector<S, V>& to, const Vector<S, V>& more) {
#pragma unroll
    for (int e = 0; e < V; ++e) to.x[e] += more.x[e];
}
template <typename T, int V>
__device__ __forceinline__ Vector<SumOf<T>, V> widened(const Vector<T, V>& some) {
    Vector<SumOf<T>, V> to;
#pragma unroll
    for (int e = 0; e < V; ++e) to.x[e] = widened(some.x[e]);
    return to;
}
template <int V, typename T>
__device__ __forceinline__ Vector<T, V> vector_at(const T* from) {
    return *reinterpret_cast<const Vector<T, V>*>(from);
}
template <typename T, int V>
__device__ __forceinline__ void write(T* to, const Vector<SumOf<T>, V>& numbers) {
    Vector<T, V> some;
#pragma unroll
    for (int e = 0; e < V; ++e) some.x[e] = rounded<T>(numbers.x[e]);
    *reinterpret_cast<Vector<T, V>*>(to) = some;
}

// Numbers side by side as whole words: single ones would be taken apart as soon as they come.
template <typename T, int V>
struct Packed {
    static constexpr bool whole = V * sizeof(T) % sizeof(unsigned) == 0;
    using Word = std::conditional_t<whole, unsigned, T>;
    static constexpr int words = whole ? int(V * sizeof(T) / sizeof(unsigned)) : V;
    Vector<Word, words> bits;

    __device__ __forceinline__ void read(const T* from) { bits = vector_at<words>(reinterpret_cast<const Word*>(from)); }
    __device__ __forceinline__ Vector<SumOf<T>, V> numbers() const {
        Vector<T, V> some;
        std::memcpy(&some, &bits, sizeof bits);
        return widened(some);
    }
};

// A(a) sigmoid(b), A = tanh or the identity, and its derivatives to a and b.
template <typename S>
struct Gated {
    S value, by_a, by_b;
};
// With all digits of S.
template <typename S>
__device__ __forceinline__ Gated<S> gated(Gate gate, S a, S b) {
    const S small = exp(-(b < 0 ? -b : b)), sigmoid = (b < 0 ? small : S(1)) / (1 + small);
    const S slope = small / (1 + small) / (1 + small);
    if (gate != Gate::tanh) return {a * sigmoid, sigmoid, a * slope};
    const S e = exp(-2 * (a < 0 ? -a : a)), A = tanh(a);
    return {A * sigmoid, 4 * e / (1 + e) / (1 + e) * sigmoid, A * slope};
}
// With those of 16 bit numbers and some more: with x = exp(-2 |a|), y = exp(-|b|), for 1 / ((1 + x) (1 + y)) one reciprocal.
__device__ __forceinline__ Gated<float> gated_16(Gate gate, float a, float b) {
    const bool curved = gate == Gate::tanh;
    constexpr float kLog2e = 1.44269504f;
    const float size = fabsf(a), x = curved ? power_of_2(-2 * kLog2e * size) : 0.0f, y = power_of_2(-kLog2e * fabsf(b));
    const float r = near_reciprocal((1 + x) * (1 + y)), of_x = r * (1 + y), of_y = r * (1 + x), up = b < 0 ? y : 1.0f;
    const float A = !curved ? a : copysignf(size < 0x1p-11f ? size * (1 + x) : 1 - x, a);  // times 1 + x; 1 - x loses digits
    return {A * up * r, (curved ? 4 * x * of_x : 1.0f) * up * r, A * y * r * of_y};
}
template <typename T>
__device__ __forceinline__ Gated<SumOf<T>> gated_of(Gate gate, SumOf<T> a, SumOf<T> b) {
    if constexpr (sizeof(T) == 2) {
        return gated_16(gate, a, b);
    } else {
        return gated(gate, a, b);
    }
}

// The value alone.
template <typename T>
__device__ __forceinline__ SumOf<T> gate_value(Gate gate, SumOf<T> a, SumOf<T> b) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return (gate == Gate::tanh ? near_tanh(a) : a) * near_reciprocal(1 + power_of_2(-1.44269504f * b));
    } else {
        return gated_of<T>(gate, a, b).value;
    }
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
    // Of Gate::halves, the second of two images, [n, h, w, out_channels] each as the first: of what is added, the result,
    // the source (`mirrored`) and the gradient to f.
    const T* condition_b;
    T* out_b;
    const T *source_b, *gradient_b;
    SumOf<T>* parts;     // of the gradient to weight, [segments, taps in + links, out]; and in one row more, if `sums`, of f's
    bool sums;
    int64_t pixels, segment;
    int h, w, in, out_channels, links, taps;
    int source_channels;  // of an image of the source: `in`, or half of it where there are two
    int groups, grouped;  // `grouped` channels of the source are grouped together, or of f in the gradient to weight
    bool interleaved, own, spatial, exact;
    bool wide_source, wide_link, wide_weight, wide_out;  // rows may be read and written in vectors
    Gate gate;
    ShortTap tap[kMaxTaps];

    __device__ int group_of(int channel, int channels) const {  // of one half or two
        if (channel >= channels) channel -= channels;
        return interleaved ? channel % groups : channel * groups / channels;
    }
};

// Is y, x of an image?
template <typename T>
__device__ __forceinline__ bool inside(const Work<T>& w, int y, int x) {
    return unsigned(y) < unsigned(w.h) && unsigned(x) < unsigned(w.w);
}

}  // namespace
}  // namespace infovae_fast
