// Masked convolution: the same page as infovae_fast/masked_conv.py.
#pragma once

#include <cstdint>
#include <vector>

namespace infovae_fast {

enum class Gate { none, tanh, glu };

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

// f[n, p, :] = sum_t x[n, p + t, :] weight[t] + bias + condition, with zeros outside the image.
struct MaskedConv {
    int64_t n, h, w, cin, cout;
    std::vector<Tap> taps;
    Colours colours;
    bool gated;  // then each half of the output channels is grouped alike

    int64_t input_group(int64_t c) const { return colours.of(c, cin); }
    int64_t output_group(int64_t c) const { return colours.of(gated ? c % (cout / 2) : c, gated ? cout / 2 : cout); }
};

// Arrays are contiguous: images [n, h, w, channels], weight [taps, cin, cout], bias [cout]; condition [n, cout], or
// [n, h, w, cout] if it is spatial; bias and condition may be null. With a gate, out [n, h, w, cout / 2] holds
// tanh(f_a) sigmoid(f_b) or f_a sigmoid(f_b), and f [n, h, w, cout] what goes into it, if not null. Without, out is f.
// The results do not depend on the number of threads.
template <typename T>
void masked_conv(const MaskedConv& conv, const T* x, const T* weight, const T* bias, const T* condition, bool spatial,
                 Gate gate, T* out, T* f);

// From a gradient to out, [n, h, w, cout / 2], and one to f itself, if not null, that to f in all.
template <typename T>
void gate_gradient(int64_t pixels, int64_t cout, Gate gate, const T* f, const T* out_gradient, const T* extra,
                   T* f_gradient);

// From a gradient to f: to x, to weight, and its sum over the pixels of each image [n, cout]. Each may be null.
template <typename T>
void masked_conv_gradients(const MaskedConv& conv, const T* x, const T* weight, const T* f_gradient, T* x_gradient,
                           T* weight_gradient, T* sums);

}  // namespace infovae_fast
