// csrc/cuda/masked_conv.cu by plain pointers, for tests/simt/masked_conv.py.
#include "masked_conv.h"

#include <cuda_runtime.h>

namespace {

using namespace infovae_fast;

// Memory that holds NaN, from a multiple of 256 on, as an allocator of a GPU has it.
struct Workspace {
    std::vector<unsigned char> bytes;

    explicit Workspace(size_t count) : bytes(count + 256, 0xff) {}
    void* start() { return bytes.data() + (256 - uintptr_t(bytes.data()) % 256) % 256; }
};

// sizes: n, h, w, cin, cout, links, groups, interleaved, own, gate; taps: dy, dx of each.
MaskedConv conv_of(const int64_t* sizes, const int64_t* taps, int64_t count) {
    const Colours colours{sizes[6], sizes[7] != 0, sizes[8] != 0};
    MaskedConv conv{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], {}, colours, sizes[9] != 0};
    for (int64_t t = 0; t < count; ++t) conv.taps.push_back({taps[2 * t], taps[2 * t + 1]});
    return conv;
}

}  // namespace

extern "C" const char* conv_forward(int number, bool exact, const int64_t* sizes, const int64_t* taps, int64_t count,
                                    const void* x, const void* weight, const void* bias, const void* condition, bool spatial,
                                    const void* link, const void* link_weight, void* out, void* f) {
    const Link<void> linked{link, link_weight, sizes[5]};
    return masked_conv_cuda(Number(number), exact, conv_of(sizes, taps, count), x, weight, linked, bias, condition, spatial,
                            Gate(sizes[9]), out, f, nullptr);
}

// results: to x, weight, link, link_weight, f, bias and condition; each may be null.
extern "C" const char* conv_backward(int number, bool exact, const int64_t* sizes, const int64_t* taps, int64_t count,
                                     const void* x, const void* weight, const void* link, const void* link_weight,
                                     const void* f, const void* gradient, const void* extra, void* const* results,
                                     int processors) {
    const MaskedConv conv = conv_of(sizes, taps, count);
    const Link<void> linked{link, link_weight, sizes[5]};
    const ConvGradients<void> wanted{results[0], results[1], results[2], results[3], results[4], results[5], results[6]};
    const size_t bytes = masked_conv_cuda_workspace(Number(number), conv, linked.channels, wanted, processors);
    return masked_conv_gradients_cuda(Number(number), exact, conv, x, weight, linked, Gate(sizes[9]), f, gradient, extra,
                                      wanted, Workspace(bytes).start(), processors, nullptr);
}

extern "C" const char* halves_forward(int number, bool exact, const int64_t* sizes, const int64_t* taps, int64_t count,
                                      const void* x, const void* weight, const void* bias, const void* added,
                                      const void* added_b, void* out, void* out_b) {
    return masked_conv_halves_cuda(Number(number), exact, conv_of(sizes, taps, count), x, weight, bias, {added, added_b},
                                   {out, out_b}, nullptr);
}

// results: to x, weight and bias; each may be null.
extern "C" const char* halves_backward(int number, bool exact, const int64_t* sizes, const int64_t* taps, int64_t count,
                                       const void* x, const void* weight, const void* gradient, const void* gradient_b,
                                       void* const* results, int processors) {
    const MaskedConv conv = conv_of(sizes, taps, count);
    const ConvGradients<void> wanted{results[0], results[1], nullptr, nullptr, nullptr, results[2], nullptr};
    const size_t bytes = masked_conv_halves_cuda_workspace(Number(number), conv, wanted, processors);
    return masked_conv_halves_gradients_cuda(Number(number), exact, conv, x, weight, {gradient, gradient_b}, wanted,
                                             Workspace(bytes).start(), processors, nullptr);
}

// Blocks along the pixels of the kernel that ran last: by this one tells which it was.
extern "C" unsigned last_grid() { return gridDim.x; }
