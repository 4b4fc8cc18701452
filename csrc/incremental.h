// A gated PixelCNN at one pixel after another: the same page as infovae_fast/models/incremental.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace infovae_fast {

// Channels of h, o and params are sorted by their G groups; matrices are [G, inputs, outputs / G].
template <typename T>
struct PixelRow {
    struct Layer {
        const T* base;        // [n, width, 2 maps]: all of the gate's input but W_h * h
        T* state;             // [n, stride]: the row of y or h so far, after `reach` columns of zeros at the left end
        int64_t stride, channels, reach, taps;
        const T *horizontal;  // [G, taps channels, 2 maps / G]
        const T *step, *step_bias;  // [G, maps, maps / G] and [maps], or null in the last layer
    };
    int64_t n, width, maps, groups, params;
    std::vector<Layer> layers;
    const T *skip, *skip_bias, *hidden, *hidden_bias, *output, *output_bias;
    T* memory;  // [n, (layers + 2) maps]: o of each layer, then the head's two
};

// The vertical stack of a row: each layer's base. A ring holds the last reach + 1 rows of the layer's input, row i in
// place i % (reach + 1), with `reach` columns of zeros at both ends; this writes row i of all but the first.
template <typename T>
struct VerticalRow {
    struct Layer {
        T* ring;  // [n, reach + 1, reach + width + reach, channels]
        T* base;  // [n, width, 2 maps]
        int64_t channels, reach;
        bool first;  // window V0, else V
        const T *vertical, *vertical_bias, *link, *link_bias;  // [taps channels, 2 maps], [2 maps], [2 maps, 2 maps]
        // What z adds to V and to the base, [2 maps] at image s and column j: above + s above_image + j above_column.
        const T *above, *beside;
        int64_t above_image, above_column, beside_image, beside_column;
    };
    int64_t n, width, maps, row;
    std::vector<Layer> layers;
};

template <typename T>
void vertical_row(const VerticalRow<T>& row);

// What to do with params [n, params / G] of a pixel's group: draw bits, x = (u < sigmoid(params / temperature)).
template <typename T>
struct Bits {
    const float* uniforms;  // [n, channels, width]
    const T* known;         // [n, channels, width], where
    const bool* mask;       // [n, channels, width] says so
    T* x;                   // [n, channels, width]
    int64_t channels;
    T temperature;
};

// params [n, params / G] of column j and one group.
template <typename T>
void pixel_params(const PixelRow<T>& row, int64_t j, int64_t group, T* params);

// The whole row, every pixel drawn and put into the state of layer 0 as 2 x - 1.
template <typename T>
void draw_bits(const PixelRow<T>& row, const Bits<T>& bits);

// Whole images on a GPU. Layer 0 has reach `first_reach` and reads the image, the others `reach` and the maps.
constexpr int kImageThreads = 256, kImageMaxLayers = 32;  // of a block, as the tape is made for
template <typename T>
struct PixelImages {
    int64_t n, channels, height, width, maps, groups, params, layers, first_reach, reach;
    const T* table;  // all weights: `table` of models/incremental.py; aligned to 16 bytes
    // What z adds to V and to the base of each layer at image s, row i and column j starts at above[layer] + s
    // condition_image + i condition_row + j condition_column: 2 maps numbers, and zeros up to a multiple of 16 bytes.
    std::vector<const T*> above, beside;
    int64_t condition_image, condition_row, condition_column;
    // What is drawn: bits (levels = 0), levels by a softmax, or by a mixture of so many logistics: see
    // infovae_fast/likelihoods.py. The uniforms are [n, U, height, width], U = channels, and one more for a mixture;
    // without them everything is known, and any number of params does. All else is [n, channels, height, width].
    int64_t levels, mixtures;
    const float* uniforms;
    const T* known;    // where
    const bool* mask;  // says so
    T temperature;
    T* x;
    T* out;  // params of every pixel, [n, params, height, width], or null
};

struct ImagesNeed {
    int64_t table;             // elements
    size_t workspace, shared;  // bytes; the workspace aligned to 128
    const char* error;         // what there is no room for, or null
};

// Everything is queued on the stream, nothing waits. `processors` of the GPU, and the bytes of shared memory that a
// block may have, divide the work; the images do not depend on them. Returns what went wrong, or null.
template <typename T>
ImagesNeed images_cuda_need(const PixelImages<T>& images, int processors, size_t shared);
template <typename T>
const char* images_cuda(const PixelImages<T>& images, void* workspace, int processors, size_t shared, void* stream);

}  // namespace infovae_fast
