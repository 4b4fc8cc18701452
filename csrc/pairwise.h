// Energy and force of a point cloud: the same page as infovae_fast/pairwise.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace infovae_fast {

// phi(d2) = sum_k weight_k f(d2 / (2 bandwidth_k^2)):  rbf f(s) = exp(-s), else f(s) = (1 + s / alpha)^-alpha.
struct RadialMixture {
    bool rbf;
    std::vector<double> bandwidth, weight;
    double alpha;
};

template <typename T>
struct PairwiseProblem {
    const T *x, *y;            // [n, d], [m, d], contiguous; y may be null
    const T *v;                // [n, d] or null
    const T *a, *b;            // weights of the points of x and y, [n] and [m], or null for ones
    int64_t n, m, d;
    RadialMixture radial;
    double w_xx, w_xy, w_yy;
    double* energy;            // each result only if its pointer is not null
    T *x_force, *y_force;      // [n, d], [m, d]; that of point i times its weight
    T *x_potential, *y_potential;  // P_i = sum_{j != i} w_ij a_j phi_ij, [n], [m]: dE/da_i = 2 P_i
};

// On the CPU. Computes in float or double with the best vector unit at hand. The results do not depend on the number of threads.
template <typename T>
void pairwise_by_pairs(const PairwiseProblem<T>& problem);
// By the Fourier series of an RBF, where that is cheaper: for many points of few coordinates. Whether it was.
template <typename T>
bool pairwise_by_fourier(const PairwiseProblem<T>& problem);
template <typename T>
void pairwise(const PairwiseProblem<T>& problem) {
    if (!pairwise_by_fourier(problem)) pairwise_by_pairs(problem);
}

// On a GPU, for `clouds` problems at once whose arrays follow one another; everything is queued on the stream, nothing
// waits. `lengths`: the bandwidths in the memory of the GPU, or null: those of the problem. `processors`: of the GPU,
// to divide the work. Returns what went wrong, or null. The bits do not depend on the order of the blocks.
constexpr int64_t kCudaMaxDim = 18;           // coordinates that fit the registers
constexpr int64_t kCudaMaxProductsDim = 128;  // of float; with v for one RBF scale and without weights of points
constexpr int kCudaMaxScales = 32;
template <typename T>
struct Affine {  // *value = factor energy + constant, in T, where it is not null; the energy must be wanted
    T* value = nullptr;
    double factor = 1, constant = 0;
};
template <typename T>
size_t pairwise_cuda_workspace(const PairwiseProblem<T>& problem, int64_t clouds, int processors,  // bytes
                               const Affine<T>& affine = {});
template <typename T>
const char* pairwise_cuda(const PairwiseProblem<T>& problem, int64_t clouds, const double* lengths, void* workspace,
                          int processors, void* stream, const Affine<T>& affine = {});

}  // namespace infovae_fast
