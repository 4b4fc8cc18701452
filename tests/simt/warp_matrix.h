// The instructions of csrc/cuda/products.h, as PTX describes them: which lane has which number in which register. What
// has no part in a product of the GPU has none here: TF32 leaves out the lower 13 bits, as they are.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace simt {

// What the lanes of a warp show each other.
struct Board {
    const void* row[32];
    unsigned left[32][4], right[32][2];
    double left_number[32], right_number[32];
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

// d[c] += sum of left(row, k) right(k, column); in each of 4 numbers, by lane: rows / 4 and 8 more, two columns. Tensor
// cores add all of it up before they make a float of it (and cut the rest off; this rounds).
template <int depth, typename Left, typename Right>
void add_products(float (&d)[4], Left left, Right right) {
    for (int c = 0; c < 4; ++c) {
        double sum = d[c];
        for (int k = 0; k < depth; ++k) {
            sum += double(left(lane() / 4 + c / 2 * 8, k)) * double(right(k, lane() % 4 * 2 + c % 2));
        }
        d[c] = float(sum);
    }
}

inline float number(unsigned word, int upper, __half) {
    const uint16_t bits = uint16_t(word >> 16 * upper);
    __half x;
    std::memcpy(&x, &bits, sizeof x);
    return __half2float(x);
}
inline float number(unsigned word, int upper, __nv_bfloat16) {
    return __bfloat162float({uint16_t(word >> 16 * upper)});
}

template <typename T>
void multiply_16_bits(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], T type, Stop stop) {
    Board& shown = board();
    std::copy_n(a, 4, shown.left[lane()]), std::copy_n(b, 2, shown.right[lane()]);
    meet(stop);
    add_products<16>(
        d, [&](int row, int k) { return number(shown.left[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2, type); },
        [&](int k, int column) { return number(shown.right[column * 4 + k % 8 / 2][k / 8], k % 2, type); });
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
    shown.row[lane] = row;
    simt::meet(stop);
    for (int i = 0; i < 4; ++i) {
        const auto at = [&](int r, int c) { return unsigned(static_cast<const uint16_t*>(shown.row[8 * i + r])[c]); };
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
    std::copy_n(a, 4, shown.left[simt::lane()]), std::copy_n(b, 2, shown.right[simt::lane()]);
    simt::meet(stop);
    const auto cut = [](unsigned word) { return simt::bits<float>(word & ~0x1FFFu); };
    simt::add_products<8>(
        d, [&](int row, int k) { return cut(shown.left[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]); },
        [&](int k, int column) { return cut(shown.right[column * 4 + k % 4][k / 4]); });
}

// mma .m8n8k4 of double
inline void multiply_add(double (&d)[2], double a, double b, simt::Stop stop = simt::here()) {
    simt::Board& shown = simt::board();
    const int lane = simt::lane();
    shown.left_number[lane] = a, shown.right_number[lane] = b;
    simt::meet(stop);
    for (int c = 0; c < 2; ++c) {
        for (int k = 0; k < 4; ++k) {
            d[c] += shown.left_number[lane / 4 * 4 + k] * shown.right_number[(lane % 4 * 2 + c) * 4 + k];
        }
    }
}

inline unsigned to_tf32(float x) {  // to the nearest, ties away from zero
    const unsigned word = simt::bits<unsigned>(x);
    return (word & 0x7F800000u) == 0x7F800000u ? word : (word + 0x1000u) & ~0x1FFFu;
}
