// The scales of an IMQ mixture as few fractions.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vector.h"

namespace infovae_fast {

constexpr int kMostOfQuotient = 7;       // scales: m of them take some 4 m + 3 operations;
constexpr int kMostOfSmallQuotient = 3;  // where there are more coordinates than
constexpr int kFewCoordinates = 16;      // these, whose products take most of the time and whose distances are alike
constexpr int kFewestScales = 4;         // of fewer in all rounding errors would show, as nothing averages them out

// IMQ scales over a common denominator, in s = -t >= 0: their phi = P / Q and g = G / Q^2 with
//
//     Q = prod_k (1 + r_k s)     P = sum_k w_k prod_{l != k} (1 + r_l s)     G = sum_k w_k r_k prod_{l != k} (1 + r_l s)^2
//
// One reciprocal in place of one for each scale. All terms are positive, so that few digits are lost.
template <typename T>
struct Quotients {
    std::vector<int> sizes;
    std::vector<T> coefficients;  // by falling powers of s: P, Q, G, G of each; then of the next; Q ends with 1

    Quotients() = default;
    // s is at most `farthest`, of points of d coordinates.
    Quotients(const std::vector<T>& rate, const std::vector<T>& weight, double farthest, int64_t d) {
        const int scales = int(rate.size());
        const bool share = sizeof(T) == 4 && kUnit != Unit::baseline && scales >= kFewestScales;
        const int most = !share ? 1 : d <= kFewCoordinates ? kMostOfQuotient : kMostOfSmallQuotient;
        for (int k = 0; k < scales;) {
            const int groups = (scales - k + most - 1) / most;
            int size = (scales - k + groups - 1) / groups;
            while (!add(rate.data() + k, weight.data() + k, size, farthest)) --size;
            k += size;
        }
    }

private:
    using Polynomial = std::vector<double>;  // the coefficient of s^0 first

    static Polynomial product(const Polynomial& a, const Polynomial& b) {
        Polynomial c(a.size() + b.size() - 1, 0.0);
        for (size_t i = 0; i < a.size(); ++i) {
            for (size_t j = 0; j < b.size(); ++j) c[i + j] += a[i] * b[j];
        }
        return c;
    }

    bool add(const T* rate, const T* weight, int size, double farthest) {
        Polynomial P(size, 0.0), Q{1.0}, G(2 * size - 1, 0.0);
        for (int k = 0; k < size; ++k) {
            Polynomial others{1.0};
            for (int l = 0; l < size; ++l) {
                if (l != k) others = product(others, {1.0, double(rate[l])});
            }
            const Polynomial squared = product(others, others);
            for (size_t c = 0; c < others.size(); ++c) P[c] += double(weight[k]) * others[c];
            for (size_t c = 0; c < squared.size(); ++c) G[c] += double(weight[k]) * double(rate[k]) * squared[c];
            Q = product(Q, {1.0, double(rate[k])});
        }
        for (const Polynomial* polynomial : {&P, &Q, &G}) {  // nothing may overflow, vanish or be negative
            double sum = 0;
            for (size_t c = polynomial->size(); c-- > 0;) {
                if (size > 1 && !((*polynomial)[c] >= double(std::numeric_limits<T>::min()))) return false;
                sum = sum * std::max(farthest, 1.0) + (*polynomial)[c];
            }
            if (size > 1 && !(sum <= double(std::numeric_limits<T>::max()) / 100)) return false;
        }
        sizes.push_back(size);
        for (int k = size - 1; k >= 0; --k) {
            for (const double c : {P[k], Q[k + 1]}) coefficients.push_back(T(c));
            if (k < size - 1) coefficients.push_back(T(G[2 * k + 1]));
            coefficients.push_back(T(G[2 * k]));
        }
        return true;
    }
};

}  // namespace infovae_fast
