// The discretised logistic mixture: the same page as infovae_fast/logistic_mixture.py.
#pragma once

#include <cstdint>

namespace infovae_fast {

// params [n, pixels, P] and x [n, pixels, channels] if they are interleaved, else [n, P, pixels] and
// [n, channels, pixels]; P = 3 k for 1 channel, 10 k for 3.
template <typename T>
struct LogisticMixture {
    int64_t n, pixels, k, channels, levels;
    bool interleaved;
    const T *params, *x;
    T* gradient;  // of each pixel's -log P to its params, which it is as large as; null if not wanted
    T* nll;       // [n]: sums over the pixels
};

// On the CPU. The results do not depend on the number of threads.
template <typename T>
void logistic_mixture(const LogisticMixture<T>& mixture);

}  // namespace infovae_fast
