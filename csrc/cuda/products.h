// Products of small matrices that a warp does together on the tensor cores; and a tile of them, of a whole block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#ifndef __CUDACC__
#include "warp_matrix.h"  // of tests/simt: the instructions, on the CPU
#endif

namespace infovae_fast {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// There are no such instructions; nothing is launched there.
template <bool TRANSPOSED, typename... Arguments>
__device__ void load_matrices(const Arguments&...) { __trap(); }
template <typename... Arguments>
__device__ void multiply_add(const Arguments&...) { __trap(); }
__device__ inline unsigned to_tf32(float) { return 0; }
#elif defined(__CUDACC__)
// Four 8 x 8 matrices of 16 bit numbers from shared memory: each lane brings the address of a row.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
    const unsigned at = unsigned(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
    }
}

#define MULTIPLY_ADD(type, shape, suffix)                                                                               \
    __device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], type) { \
        asm("mma.sync.aligned." shape ".row.col.f32." suffix "." suffix ".f32 "                                         \
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                           \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                        \
    }
MULTIPLY_ADD(__half, "m16n8k16", "f16")
MULTIPLY_ADD(__nv_bfloat16, "m16n8k16", "bf16")
MULTIPLY_ADD(float, "m16n8k8", "tf32")
#undef MULTIPLY_ADD

__device__ __forceinline__ void multiply_add(double (&d)[2], double a, double b) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(d[0]), "+d"(d[1]) : "d"(a), "d"(b));
}

__device__ __forceinline__ unsigned to_tf32(float x) {
    unsigned word;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
    return word;
}
#endif

// left [m, k] right [k, n], summed in Sum. ROWS: a row lies in one piece, else a column; `pitch` from one to the next. A
// tile has so many rows, and a step of its product such a depth.
template <typename T>
struct Product {  // of 16 bit numbers
    using Sum = float;
    static constexpr int m = 16, n = 16, k = 16, rows = 128, depth = 64;
    struct Left {
        unsigned r[4];
    };
    struct Right {
        unsigned r[2][2];
    };
    struct Sums {
        float x[2][4];
    };

    // The 8 x 8 matrices at (row, k) = (0, 0), (8, 0), (0, 8), (8, 8).
    template <bool ROWS>
    static __device__ __forceinline__ void load(Left& a, const T* at, int pitch) {
        const int lane = int(threadIdx.x) % 32, one = lane % 8, row = lane / 8 % 2 * 8, k = lane / 16 * 8;
        load_matrices<!ROWS>(a.r, ROWS ? at + (row + one) * pitch + k : at + (k + one) * pitch + row);
    }
    // Those at (k, column) = (0, 0), (8, 0), (0, 8), (8, 8).
    template <bool ROWS>
    static __device__ __forceinline__ void load(Right& b, const T* at, int pitch) {
        const int lane = int(threadIdx.x) % 32, one = lane % 8, k = lane / 8 % 2 * 8, column = lane / 16 * 8;
        unsigned r[4];
        load_matrices<ROWS>(r, ROWS ? at + (k + one) * pitch + column : at + (column + one) * pitch + k);
        for (int e = 0; e < 4; ++e) b.r[e / 2][e % 2] = r[e];
    }
    static __device__ __forceinline__ void add(Sums& sums, const Left& a, const Right& b) {
        for (int e = 0; e < 2; ++e) multiply_add(sums.x[e], a.r, b.r[e], T{});
    }
    // visit(row, column, two numbers side by side)
    template <typename Visit>
    static __device__ __forceinline__ void each(const Sums& sums, Visit visit) {
        const int lane = int(threadIdx.x) % 32;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            visit(lane / 4 + e % 2 * 8, e / 2 * 8 + lane % 4 * 2, &sums.x[e / 2][e % 2 * 2]);
        }
    }
};

// float = high + low, both TF32, as far as it has digits. The largest finite numbers round to inf.
template <>
struct Product<float> {
    using Sum = float;
    using Sums = Product<__half>::Sums;
    static constexpr int m = 16, n = 16, k = 8, rows = 64, depth = 16;
    struct Left {
        unsigned high[4], low[4];
    };
    struct Right {
        unsigned high[2][2], low[2][2];
    };

    static __device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
        high = to_tf32(x);
        low = to_tf32(x - __uint_as_float(high));
    }
    template <bool ROWS>
    static __device__ __forceinline__ void load(Left& a, const float* at, int pitch) {
        const int lane = int(threadIdx.x) % 32;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = lane / 4 + e % 2 * 8, k = lane % 4 + e / 2 * 4;
            split(ROWS ? at[row * pitch + k] : at[k * pitch + row], a.high[e], a.low[e]);
        }
    }
    template <bool ROWS>
    static __device__ __forceinline__ void load(Right& b, const float* at, int pitch) {
        const int lane = int(threadIdx.x) % 32;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int k = lane % 4 + e % 2 * 4, column = lane / 4 + e / 2 * 8;
            split(ROWS ? at[k * pitch + column] : at[column * pitch + k], b.high[e / 2][e % 2], b.low[e / 2][e % 2]);
        }
    }
    static __device__ __forceinline__ void add(Sums& sums, const Left& a, const Right& b) {
        for (int e = 0; e < 2; ++e) multiply_add(sums.x[e], a.high, b.high[e], 0.0f);
    }
    static __device__ __forceinline__ void add_low(Sums& sums, const Left& a, const Right& b) {
        for (int e = 0; e < 2; ++e) {
            multiply_add(sums.x[e], a.low, b.low[e], 0.0f);
            multiply_add(sums.x[e], a.low, b.high[e], 0.0f);
            multiply_add(sums.x[e], a.high, b.low[e], 0.0f);
        }
    }
    template <typename Visit>
    static __device__ __forceinline__ void each(const Sums& sums, Visit visit) {
        Product<__half>::each(sums, visit);
    }
};

template <>
struct Product<double> {
    using Sum = double;
    static constexpr int m = 8, n = 8, k = 4, rows = 64, depth = 16;
    struct Left {
        double x;
    };
    struct Right {
        double x;
    };
    struct Sums {
        double x[2];
    };

    template <bool ROWS>
    static __device__ __forceinline__ void load(Left& a, const double* at, int pitch) {
        const int row = int(threadIdx.x) % 32 / 4, k = int(threadIdx.x) % 4;
        a.x = ROWS ? at[row * pitch + k] : at[k * pitch + row];
    }
    template <bool ROWS>
    static __device__ __forceinline__ void load(Right& b, const double* at, int pitch) {
        const int column = int(threadIdx.x) % 32 / 4, k = int(threadIdx.x) % 4;
        b.x = ROWS ? at[k * pitch + column] : at[column * pitch + k];
    }
    static __device__ __forceinline__ void add(Sums& sums, const Left& a, const Right& b) { multiply_add(sums.x, a.x, b.x); }
    template <typename Visit>
    static __device__ __forceinline__ void each(const Sums& sums, Visit visit) {
        visit(int(threadIdx.x) % 32 / 4, int(threadIdx.x) % 4 * 2, sums.x);
    }
};

template <typename T>
using SumOf = typename Product<T>::Sum;

constexpr int kWarpRows = 4, kWarpColumns = 2;  // warps over a tile

// A tile of sums in the registers of a block, [rows, NB].
template <typename T, int NB>
struct Tile {
    using P = Product<T>;
    static constexpr int kRows = P::rows / kWarpRows / P::m, kColumns = NB / kWarpColumns / P::n;
    static constexpr int pitch = NB + 8;  // rows start in other banks
    typename P::Sums sum[kRows][kColumns] = {};
    int row, column;  // of this warp

    __device__ __forceinline__ Tile() {
        const int warp = int(threadIdx.x) / 32;
        row = warp / kWarpColumns * (P::rows / kWarpRows), column = warp % kWarpColumns * (NB / kWarpColumns);
    }

    // += left [rows, depth] right [depth, NB], from shared memory.
    template <bool LEFT_ROWS, bool RIGHT_ROWS>
    __device__ __forceinline__ void multiply(const T* left, int left_pitch, const T* right, int right_pitch, bool exact) {
        constexpr int steps = P::depth / P::k;
        const auto load_left = [&](typename P::Left& a, int i, int s) {
            const int r = row + i * P::m, k = s * P::k;
            P::template load<LEFT_ROWS>(a, left + (LEFT_ROWS ? r * left_pitch + k : k * left_pitch + r), left_pitch);
        };
        const auto load_right = [&](typename P::Right& b, int j, int s) {
            const int c = column + j * P::n, k = s * P::k;
            P::template load<RIGHT_ROWS>(b, right + (RIGHT_ROWS ? k * right_pitch + c : c * right_pitch + k), right_pitch);
        };
        if constexpr (std::is_same_v<T, float>) {
            typename P::Left a[kRows][steps];
#pragma unroll
            for (int e = 0; e < kRows * steps; ++e) load_left(a[e / steps][e % steps], e / steps, e % steps);
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                typename P::Right b[steps];
#pragma unroll
                for (int s = 0; s < steps; ++s) load_right(b[s], j, s);
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    typename P::Sums own{};  // tensor cores cut digits off: over many steps that would add up
                    if (exact) {
#pragma unroll
                        for (int s = 0; s < steps; ++s) P::add_low(own, a[i][s], b[s]);
#pragma unroll
                        for (int e = 0; e < 8; ++e) {  // inf - inf, inf * 0: the products of what is high will tell
                            float& x = own.x[e / 4][e % 4];
                            x = x - x == 0 ? x : 0.0f;
                        }
                    }
#pragma unroll
                    for (int s = 0; s < steps; ++s) P::add(own, a[i][s], b[s]);
#pragma unroll
                    for (int e = 0; e < 8; ++e) sum[i][j].x[e / 4][e % 4] += own.x[e / 4][e % 4];
                }
            }
        } else {
#pragma unroll
            for (int s = 0; s < steps; ++s) {
                typename P::Left a[kRows];
#pragma unroll
                for (int i = 0; i < kRows; ++i) load_left(a[i], i, s);
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
                    typename P::Right b;
                    load_right(b, j, s);
#pragma unroll
                    for (int i = 0; i < kRows; ++i) P::add(sum[i][j], a[i], b);
                }
            }
        }
    }

    struct __align__(2 * sizeof(SumOf<T>)) Two {
        SumOf<T> x[2];
    };
    // To [rows, pitch].
    __device__ __forceinline__ void store(SumOf<T>* to) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                P::each(sum[i][j], [&](int r, int c, const SumOf<T>* two) {
                    SumOf<T>* const at = to + (row + i * P::m + r) * pitch + column + j * P::n + c;
                    *reinterpret_cast<Two*>(at) = {two[0], two[1]};
                });
            }
        }
    }
};

}  // namespace
}  // namespace infovae_fast
