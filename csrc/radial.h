// Radial kernels: phi and its derivative phi' to the squared distance d2, for a mixture of S scales
// with bandwidths b_s (lengths in the units of the samples) and weights w_s. With r_s = 1 / (2 b_s^2), the rate:
//
//     rbf    phi = sum_s w_s exp(-r_s d2)                    phi' = -sum_s w_s r_s exp(-r_s d2)
//     rq     phi = sum_s w_s (1 + r_s d2 / alpha)^-alpha     phi' = -sum_s w_s r_s (1 + r_s d2 / alpha)^(-alpha - 1)
//
// The inverse multiquadric is rq with alpha = 1. Once for CPU and CUDA; the same page as infovae_fast/radial.py.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define INFOVAE_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define INFOVAE_FAST_HOST_DEVICE inline
#endif

namespace infovae_fast {

enum class Kind { rbf, rq };

template <typename T>
struct Radial {
    T phi, dphi;
};

// (1 + u)^-alpha. log1p keeps the digits of u that 1 + u drops: the error of pow grows like alpha * eps.
template <typename T>
INFOVAE_FAST_HOST_DEVICE T inverse_power(T u, T alpha) {
    if (alpha == T(1)) return T(1) / (T(1) + u);
    if (alpha == T(0.5)) return T(1) / std::sqrt(T(1) + u);
    return std::exp(-alpha * std::log1p(u));
}

// Both values from one evaluation: phi' costs one multiplication more (rbf) or one division (rq). d2 >= 0.
template <Kind kind, typename T>
INFOVAE_FAST_HOST_DEVICE Radial<T> radial(T d2, const T* rate, const T* weight, int scales, T alpha) {
    Radial<T> sum{T(0), T(0)};
    for (int s = 0; s < scales; ++s) {
        if constexpr (kind == Kind::rbf) {
            const T phi = weight[s] * std::exp(-rate[s] * d2);
            sum.phi += phi;
            sum.dphi -= rate[s] * phi;
        } else {
            const T u = rate[s] * d2 / alpha;
            const T phi = weight[s] * inverse_power(u, alpha);
            sum.phi += phi;
            sum.dphi -= rate[s] * phi / (T(1) + u);
        }
    }
    return sum;
}

}  // namespace infovae_fast
