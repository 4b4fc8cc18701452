// The instructions of csrc/cuda/products.h, as PTX describes them: which lane has which number in which register. What
// has no part in a product of the GPU has none here: TF32 leaves out the lower 13 bits, as they are.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace simt {

// What the lanes of a warp show each other: addresses, or two matrices.
struct Board {
    const void* address[32];
    double left[16][16], right[8][16];  // [row, k], [column, k]
};
inline Board boards[kMaxThreads / 32][2];
inline bool second[kMaxThreads];
// In turn one of two, so that nobody writes where others still read: they meet once for each.
inline Board& board() {
    bool& turn = second[running - threads];
    turn = !turn;
    return boards[(running - threads) / warpSize][turn];
}
inline void meet(Stop stop) { with_lanes(~0u, 0, kVotes, stop); }

// d[c] += sum of left[row][k] right[column][k]; in each of the numbers, by lane: rows / 4 and 8 more, two columns. Tensor
// cores add all of it up before they make a float of it (and cut the rest off; this rounds).
template <int depth, typename T, int numbers>
void add_products(const Board& shown, T (&d)[numbers]) {
    for (int c = 0; c < numbers; ++c) {
        const double *left = shown.left[lane() / 4 + c / 2 * 8], *right = shown.right[lane() % 4 * 2 + c % 2];
        double sum = d[c];
        for (int k = 0; k < depth; ++k) sum += left[k] * right[k];
        d[c] = T(sum);
    }
}

inline double number(unsigned word, int upper, __half) {
    const uint16_t bits = uint16_t(word >> 16 * upper);
    __half x;
    std::memcpy(&x, &bits, sizeof x);
    return __half2float(x);
}
inline double number(unsigned word, int upper, __nv_bfloat16) {
    return __bfloat162float({uint16_t(word >> 16 * upper)});
}

template <typename T>
void multiply_16_bits(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], T type, Stop stop) {
    Board& shown = board();
    const int near = lane() / 4, along = lane() % 4 * 2;
    for (int upper = 0; upper < 2; ++upper) {
        for (int i = 0; i < 4; ++i) shown.left[near + i % 2 * 8][along + i / 2 * 8 + upper] = number(a[i], upper, type);
        for (int i = 0; i < 2; ++i) shown.right[near][along + i * 8 + upper] = number(b[i], upper, type);
    }
    meet(stop);
    add_products<16>(shown, d);
}

}  // namespace simt

// ldmatrix .x4: lane l brings the address of row l % 8 of matrix l / 8.
template <bool TRANSPOSED>
void load_matrices(unsigned (&to)[4], const void* row, simt::Stop stop = simt::here()) {
    if (uintptr_t(row) % 16) {
        std::fprintf(stderr, "simt: ldmatrix from %p, which is not aligned to 16 bytes\n", row);
        std::abort();
    }
    simt::Board& shown = simt::board();
    const int lane = simt::lane();
    shown.address[lane] = row;
    simt::meet(stop);
    for (int i = 0; i < 4; ++i) {
        const auto at = [&](int r, int c) { return unsigned(static_cast<const uint16_t*>(shown.address[8 * i + r])[c]); };
        const int near = lane / 4, along = lane % 4 * 2;
        to[i] = TRANSPOSED ? at(along, near) | at(along + 1, near) << 16 : at(near, along) | at(near, along + 1) << 16;
    }
}

// mma .m16n8k16 of 16 bit numbers
inline void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half type,
                         simt::Stop stop = simt::here()) {
    simt::multiply_16_bits(d, a, b, type, stop);
}
inline void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], __nv_bfloat16 type,
                         simt::Stop stop = simt::here()) {
    simt::multiply_16_bits(d, a, b, type, stop);
}

// mma .m16n8k8 of TF32
inline void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], float,
                         simt::Stop stop = simt::here()) {
    simt::Board& shown = simt::board();
    const auto cut = [](unsigned word) { return simt::bits<float>(word & ~0x1FFFu); };
    const int near = simt::lane() / 4, along = simt::lane() % 4;
    for (int i = 0; i < 4; ++i) shown.left[near + i % 2 * 8][along + i / 2 * 4] = cut(a[i]);
    for (int i = 0; i < 2; ++i) shown.right[near][along + i * 4] = cut(b[i]);
    simt::meet(stop);
    simt::add_products<8>(shown, d);
}

// mma .m8n8k4 of double
inline void multiply_add(double (&d)[2], double a, double b, simt::Stop stop = simt::here()) {
    simt::Board& shown = simt::board();
    const int near = simt::lane() / 4, along = simt::lane() % 4;
    shown.left[near][along] = a, shown.right[near][along] = b;
    simt::meet(stop);
    simt::add_products<4>(shown, d);
}

inline unsigned to_tf32(float x) {  // to the nearest, ties away from zero
    const unsigned word = simt::bits<unsigned>(x);
    return (word & 0x7F800000u) == 0x7F800000u ? word : (word + 0x1000u) & ~0x1FFFu;
}
