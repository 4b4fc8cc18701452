// Random numbers, and arrays of exactly so many, so that AddressSanitizer sees a step past their ends.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "cpu/vector.h"

using Random = std::mt19937_64;
using Values = std::vector<double>;

// Normal deviates that float holds.
inline Values normal(Random& random, int64_t size, double scale = 1) {
    std::normal_distribution<float> distribution;
    Values values(size);
    for (double& v : values) v = float(scale * distribution(random));
    return values;
}

// Prints the vector unit and how many problems ran; the exit status.
inline int report(int problems, int wrong) {
    std::printf("%s: %d problems\n", infovae_fast::vector_unit(), problems);
    return wrong == 0 ? 0 : 1;
}

// An array of T of exactly these values, or null; without values, `size` NaNs to be written over.
template <typename T>
struct Array {
    std::unique_ptr<T[]> memory;
    explicit Array(const Values& values, bool wanted = true) {
        if (!wanted) return;
        memory.reset(new T[values.size()]);
        std::copy(values.begin(), values.end(), memory.get());
    }
    Array(size_t size, bool wanted) {
        if (!wanted) return;
        memory.reset(new T[size]);
        std::fill_n(memory.get(), size, T(NAN));
    }
    operator T*() const { return memory.get(); }
};
