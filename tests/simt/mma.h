// CUDA's header of the products of small matrices that a warp does together: those of 16 bit numbers, of TF32 and of double.
//
// Lane 0 holds the whole of a fragment and does all of the work, the others have as many elements, which are poison.
// What has no part in a product of the GPU has none here: TF32 leaves out the lower 13 bits, as they are.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32;
}

template <typename T>
struct Stored {
    using type = T;
};
template <>
struct Stored<precision::tf32> {
    using type = float;
};

template <typename Use, int m, int n, int k, typename T, typename Layout = void>
struct fragment {
    using element_type = typename Stored<T>::type;
    static constexpr int rows = std::is_same_v<Use, matrix_b> ? k : m, columns = std::is_same_v<Use, matrix_a> ? k : n;
    static constexpr int num_elements = rows * columns;
    element_type x[num_elements];
    fragment() { std::memset(static_cast<void*>(x), 0xFF, sizeof x); }
};

template <typename Use, int m, int n, int k, typename T, typename Layout, typename U>
void fill_fragment(fragment<Use, m, n, k, T, Layout>& f, U value) {
    for (auto& x : f.x) x = value;
}

template <typename T>
void check_fragment(const T* at, unsigned pitch) {
    if (uintptr_t(at) % 32 || pitch * sizeof(T) % 16) {
        std::fprintf(stderr, "simt: a fragment at %p with a pitch of %u; accepted: 32 bytes aligned, a multiple of 16\n",
                     static_cast<const void*>(at), pitch);
        std::abort();
    }
}

template <typename Use, int m, int n, int k, typename T, typename Layout>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& f, const typename Stored<T>::type* from, unsigned pitch,
                      simt::Stop stop = simt::here()) {
    using F = fragment<Use, m, n, k, T, Layout>;
    check_fragment(from, pitch);
    simt::with_lanes(~0u, 0, simt::kVotes, stop);
    for (int i = 0; simt::lane() == 0 && i < F::rows; ++i) {
        for (int j = 0; j < F::columns; ++j) {
            f.x[i * F::columns + j] = from[std::is_same_v<Layout, row_major> ? i * pitch + j : j * pitch + i];
        }
    }
}

template <int m, int n, int k, typename T>
void store_matrix_sync(T* to, const fragment<accumulator, m, n, k, T>& f, unsigned pitch, layout_t layout,
                       simt::Stop stop = simt::here()) {
    check_fragment(to, pitch);
    simt::with_lanes(~0u, 0, simt::kVotes, stop);
    for (int i = 0; simt::lane() == 0 && i < m; ++i) {
        for (int j = 0; j < n; ++j) to[layout == mem_row_major ? i * pitch + j : j * pitch + i] = f.x[i * n + j];
    }
}

inline double factor(double x) { return x; }
inline float factor(__half x) { return __half2float(x); }
inline float factor(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float factor(float x) { return simt::bits<float>(simt::bits<unsigned>(x) & ~0x1FFFu); }

template <int m, int n, int k, typename T, typename A, typename B, typename Sum>
void mma_sync(fragment<accumulator, m, n, k, Sum>& d, const fragment<matrix_a, m, n, k, T, A>& a,
              const fragment<matrix_b, m, n, k, T, B>& b, const fragment<accumulator, m, n, k, Sum>& c,
              simt::Stop stop = simt::here()) {
    simt::with_lanes(~0u, 0, simt::kVotes, stop);
    if (simt::lane() != 0) return;
    Sum right[k][n];
    for (int e = 0; e < k * n; ++e) right[e / n][e % n] = factor(b.x[e]);
    for (int i = 0; i < m; ++i) {
        Sum row[n];
        for (int j = 0; j < n; ++j) row[j] = c.x[i * n + j];
        for (int e = 0; e < k; ++e) {
            const Sum left = factor(a.x[i * k + e]);
            for (int j = 0; j < n; ++j) row[j] += left * right[e][j];
        }
        for (int j = 0; j < n; ++j) d.x[i * n + j] = row[j];
    }
}

inline float __float_to_tf32(float x) {  // to the nearest, ties away from zero
    const unsigned word = simt::bits<unsigned>(x);
    return (word & 0x7F800000u) == 0x7F800000u ? x : simt::bits<float>((word + 0x1000u) & ~0x1FFFu);
}

}  // namespace nvcuda::wmma
