// Masked convolution: the same page as infovae_fast/masked_conv.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace infovae_fast {

enum class Gate { none, tanh, glu, halves };  // halves: none, but two results

struct Tap {
    int64_t dy, dx;
};

// The order of channels in a pixel: the last tap joins an input channel to the outputs of later groups, and of its own.
struct Colours {
    int64_t groups = 1;
    bool interleaved = true, own = true;

    int64_t of(int64_t c, int64_t channels) const { return interleaved ? c % groups : c * groups / channels; }
    bool sees(int64_t output_group, int64_t input_group) const {
        return groups == 1 || input_group < output_group + (own ? 1 : 0);
    }
};

// f[n, p, :] = sum_t x[n, p + t, :] weight[t] + link[n, p, :] link_weight + bias + condition, with zeros outside the image.
struct MaskedConv {
    int64_t n, h, w, cin, cout;
    std::vector<Tap> taps;
    Colours colours;
    bool gated;  // or Gate::halves: then each half of the output channels is grouped alike

    int64_t input_group(int64_t c) const { return colours.of(c, cin); }
    int64_t output_group(int64_t c) const { return colours.of(gated ? c % (cout / 2) : c, gated ? cout / 2 : cout); }
};

// A second input [n, h, w, channels] that is read at its own pixel, without a mask: f += values weight; or nothing.
template <typename T>
struct Link {
    const T* values = nullptr;
    const T* weight = nullptr;  // [channels, cout]
    int64_t channels = 0;
};

// Arrays are contiguous: images [n, h, w, channels], weight [taps, cin, cout], bias [cout]; condition [n, cout], or
// [n, h, w, cout] if it is spatial; bias and condition may be null. With a gate, out [n, h, w, cout / 2] holds
// tanh(f_a) sigmoid(f_b) or f_a sigmoid(f_b), and f [n, h, w, cout] what goes into it, if not null. Without, out is f.
// The results do not depend on the number of threads.
template <typename T>
void masked_conv(const MaskedConv& conv, const T* x, const T* weight, const Link<T>& link, const T* bias,
                 const T* condition, bool spatial, Gate gate, T* out, T* f);

// Each may be null.
template <typename T>
struct ConvGradients {
    T *x, *weight, *link, *link_weight;
    T* f;     // [n, h, w, cout]
    T *bias, *condition;  // [cout], [n, cout]: the sums of those to f over all pixels, over those of each image

    bool of_pixels() const { return bias != nullptr || condition != nullptr; }
};

// From a gradient to out, [n, h, w, cout / 2] with a gate, and one to f itself, if not null.
template <typename T>
void masked_conv_gradients(const MaskedConv& conv, const T* x, const T* weight, const Link<T>& link, Gate gate,
                           const T* f, const T* out_gradient, const T* extra, const ConvGradients<T>& result);

// On a GPU from sm_80 on, arrays of such numbers; the sums are float32 of 16 bit numbers, f and its gradient are rounded
// to 16 bits between kernels. `exact`: else float32 is multiplied as TF32.
// Everything is queued on the stream, nothing waits. `processors` of the GPU divide the work of the gradients to weight.
// Returns what went wrong, or null. The bits do not change from run to run.
enum class Number { float16, bfloat16, float32, float64 };
const char* masked_conv_cuda(Number number, bool exact, const MaskedConv& conv, const void* x, const void* weight,
                             const Link<void>& link, const void* bias, const void* condition, bool spatial, Gate gate,
                             void* out, void* f, void* stream);
// Bytes for what is not null in `result`.
size_t masked_conv_cuda_workspace(Number number, const MaskedConv& conv, int64_t links, const ConvGradients<void>& result,
                                  int processors);
const char* masked_conv_gradients_cuda(Number number, bool exact, const MaskedConv& conv, const void* x, const void* weight,
                                       const Link<void>& link, Gate gate, const void* f, const void* out_gradient,
                                       const void* extra, const ConvGradients<void>& result, void* workspace,
                                       int processors, void* stream);

// The halves of f as images of their own, [n, h, w, cout / 2], each with such an image added that may be null; and from
// gradients to both those to x, weight and bias, which may be null.
template <typename T>
struct Halves {
    T *a, *b;
};
const char* masked_conv_halves_cuda(Number number, bool exact, const MaskedConv& conv, const void* x, const void* weight,
                                    const void* bias, const Halves<const void>& added, const Halves<void>& out, void* stream);
size_t masked_conv_halves_cuda_workspace(Number number, const MaskedConv& conv, const ConvGradients<void>& result,
                                         int processors);
const char* masked_conv_halves_gradients_cuda(Number number, bool exact, const MaskedConv& conv, const void* x,
                                              const void* weight, const Halves<const void>& out_gradient,
                                              const ConvGradients<void>& result, void* workspace, int processors,
                                              void* stream);

}  // namespace infovae_fast
