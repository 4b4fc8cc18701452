// A gated PixelCNN over whole images that are known: the same page as infovae_fast/models/resident.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace infovae_fast {

struct Resident {
    int64_t n, images;  // n codes; code k is of image k % images
    int64_t channels, height, width, params, layers, maps;
    int64_t first_reach, reach;  // of layer 0 and of the others
    // 16 bit numbers of one type; what is read is aligned to 16 bytes.
    const void* y;          // [images, channels, height, width]
    const void* table;      // all weights: `table` of models/resident.py
    const void* condition;  // [n, layers, 2, 2 maps]: what z adds to V and to T; or null
    const float* biases;    // [layers, 5 maps]: of V, of T, of the step; then [maps] of the skips, [maps], [params]
    void* out;              // [n, height, width, params]
};

struct ResidentNeed {
    int64_t table, biases;  // elements
    int64_t tiles, readers; // of 16 pixels; and how many behind one may read what it overwrites
    size_t shared;          // bytes of shared memory of a block
    const char* error;      // what is accepted, where there are no kernels for this, or null
};

ResidentNeed resident_cuda_need(const Resident& network);

// Queued on the stream; nothing waits. Returns what went wrong, or null.
const char* resident_cuda(bool bfloat16, const Resident& network, void* stream);

}  // namespace infovae_fast
