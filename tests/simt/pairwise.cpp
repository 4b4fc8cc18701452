// csrc/cuda/pairwise.cu by plain pointers, for tests/simt/pairwise.py.
#include "pairwise.h"

namespace {

template <typename T>
const char* run(const T* x, const T* y, const T* v, const T* a, const T* b, int64_t n, int64_t m, int64_t d, bool rbf,
                const double* bandwidth, const double* lengths, const double* weight, int scales, double alpha,
                const double* w, double* energy, T* x_force, T* y_force, T* x_potential, T* y_potential, int64_t clouds,
                int processors) {
    const infovae_fast::PairwiseProblem<T> problem{
        x, y, v, a, b, n, m, d,
        {rbf, lengths ? std::vector<double>() : std::vector<double>(bandwidth, bandwidth + scales),
         std::vector<double>(weight, weight + scales), alpha},
        w[0], w[1], w[2], energy, x_force, y_force, x_potential, y_potential};
    const size_t bytes = infovae_fast::pairwise_cuda_workspace(problem, clouds, processors);
    std::vector<unsigned char> workspace(bytes, 0xff);
    return infovae_fast::pairwise_cuda(problem, clouds, lengths, workspace.data(), processors, nullptr);
}

}  // namespace

#define ENTRY(name, T)                                                                                                 \
    extern "C" const char* name(const T* x, const T* y, const T* v, const T* a, const T* b, int64_t n, int64_t m,      \
                                int64_t d, bool rbf, const double* bandwidth, const double* lengths,                   \
                                const double* weight, int scales, double alpha, const double* w, double* energy,       \
                                T* x_force, T* y_force, T* x_potential, T* y_potential, int64_t clouds,                \
                                int processors) {                                                                      \
        return run<T>(x, y, v, a, b, n, m, d, rbf, bandwidth, lengths, weight, scales, alpha, w, energy, x_force,      \
                      y_force, x_potential, y_potential, clouds, processors);                                          \
    }
ENTRY(pairwise_float, float)
ENTRY(pairwise_double, double)
