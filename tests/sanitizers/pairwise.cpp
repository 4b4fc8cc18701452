// Runs `pairwise_by_pairs` and `pairwise_by_fourier` on many problems and compares with the formulas of pairwise.h, pair
// by pair in double. Arrays have the exact size, so that AddressSanitizer sees a step past their ends.
//
//     main threads        prints the vector unit and how many problems ran; 1 if a result is wrong or few were series
#include "cpu/steps.h"
#include "cpu/vector.h"
#include "pairwise.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using infovae_fast::RadialMixture;
using std::abs;

namespace {

using Random = std::mt19937_64;

std::atomic<int64_t> problems{0}, series{0}, wrong{0};

std::vector<RadialMixture> kernels(int64_t d) {
    const double b = std::sqrt(double(d));
    return {{true, {1.3 * b}, {0.9}, 1},
            {true, {0.5 * b, b, 3 * b}, {0.3, 1, 0.5}, 1},
            {false, {0.8 * b}, {1.1}, 1},
            {false, {0.3 * b, 0.5 * b, 0.8 * b, b, 1.4 * b, 2 * b, 5 * b}, {1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4}, 1},
            {false, {1.5 * b, 0.7 * b}, {0.8, 0.6}, 0.5}};
}

// What a call gets, and what it is asked for.
enum : unsigned {
    kY = 1, kV = 2, kA = 4, kB = 8, kEnergy = 16, kXForce = 32, kYForce = 64, kXPotential = 128, kYPotential = 256,
    kAll = 511, kNoXX = 512,  // w_xx = 0
};

unsigned any(Random& random) {
    const unsigned choice = unsigned(random()) & kAll;
    return random() % 8 == 0 ? choice | kNoXX : choice;
}

// n + m points, the kernel of each pair, and its derivative: for many calls.
struct Points {
    int64_t n, m, d;
    RadialMixture radial;
    std::vector<float> z, v, a;
    std::vector<double> phi, slope;

    Points(int64_t n, int64_t m, int64_t d, const RadialMixture& radial, Random& random)
        : n(n), m(m), d(d), radial(radial) {
        std::normal_distribution<float> normal;
        const int64_t N = n + m;
        for (int64_t k = 0; k < N * d; ++k) z.push_back(normal(random) + 3), v.push_back(normal(random));
        for (int64_t k = 0; k < N; ++k) a.push_back(normal(random));
        phi.resize(N * N), slope.resize(N * N);
        for (int64_t i = 0; i < N; ++i) {
            for (int64_t j = 0; j < i; ++j) {
                double d2 = 0, p = 0, s = 0;
                for (int64_t c = 0; c < d; ++c) {
                    const double difference = double(z[i * d + c]) - z[j * d + c];
                    d2 += difference * difference;
                }
                for (size_t k = 0; k < radial.bandwidth.size(); ++k) {
                    const double rate = 0.5 / (radial.bandwidth[k] * radial.bandwidth[k]), alpha = radial.alpha;
                    const double base = radial.rbf ? 1 : 1 + d2 * rate / alpha;
                    const double f = radial.rbf ? std::exp(-d2 * rate) : alpha == 1 ? 1 / base : std::pow(base, -alpha);
                    p += radial.weight[k] * f, s -= radial.weight[k] * f * rate / base;
                }
                phi[i * N + j] = phi[j * N + i] = p, slope[i * N + j] = slope[j * N + i] = s;
            }
        }
    }
};

// A result as the formulas give it.
struct Truth {
    std::vector<double> value;  // empty if not wanted
    double largest = 0;         // sum of absolute terms

    Truth(unsigned wanted, size_t size) : value(wanted ? size : 0) {}
    void set(size_t k, double term, double magnitude) {
        if (value.empty()) return;
        value[k] = term, largest = std::max(largest, magnitude);
    }
};

struct Truths {
    Truth energy, force[2], potential[2];

    Truths(const Points& z, unsigned choice, const double (&w)[3])
        : energy(choice & kEnergy, 1),
          force{{choice & kXForce, size_t(z.n * z.d)}, {choice & kYForce, size_t(z.m * z.d)}},
          potential{{choice & kXPotential, size_t(z.n)}, {choice & kYPotential, size_t(z.m)}} {
        const int64_t n = z.n, N = z.n + z.m, count = choice & kY ? N : n, d = z.d;
        const auto weight = [&](int64_t k) { return choice & (k < n ? kA : kB) ? double(z.a[k]) : 1.0; };
        std::vector<double> F(d), F_size(d);
        double E = 0, E_size = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int own = i < n ? 0 : 1;
            const int64_t row = own == 0 ? i : i - n;
            double P = 0, P_size = 0;
            std::fill(F.begin(), F.end(), 0), std::fill(F_size.begin(), F_size.end(), 0);
            for (int64_t j = 0; j < count; ++j) {
                const double w_ij = weight(j) * w[own + (j < n ? 0 : 1)];
                const double phi = z.phi[i * N + j], slope = 2 * w_ij * z.slope[i * N + j];
                const double carried = (choice & kV) && j < n ? phi : 0;
                P += w_ij * phi, P_size += abs(w_ij * phi);
                for (int64_t c = 0; !force[own].value.empty() && c < d; ++c) {
                    const double pull = slope * (double(z.z[i * d + c]) - z.z[j * d + c]);
                    const double push = carried * z.v[j * d + c];
                    F[c] += pull + push, F_size[c] += abs(pull) + abs(push);
                }
            }
            E += weight(i) * P, E_size += abs(weight(i)) * P_size;
            potential[own].set(row, P, P_size);
            for (int64_t c = 0; c < d; ++c) force[own].set(row * d + c, weight(i) * F[c], abs(weight(i)) * F_size[c]);
        }
        energy.set(0, E, E_size);
    }
};

template <typename T>
struct Result {
    const Truth& truth;
    std::unique_ptr<T[]> memory;

    explicit Result(const Truth& truth) : truth(truth) {
        if (truth.value.empty()) return;
        memory.reset(new T[truth.value.size()]);
        std::fill_n(memory.get(), truth.value.size(), T(NAN));
    }
    void compare(const char* name, const char* problem, double tolerance) const {
        for (size_t k = 0; k < truth.value.size(); ++k) {
            if (abs(memory[k] - truth.value[k]) <= tolerance * truth.largest) continue;
            std::fprintf(stderr, "%s: %s[%zu] is %.17g, not %.17g; largest %g\n", problem, name, k, double(memory[k]),
                         truth.value[k], truth.largest);
            ++wrong;
            return;
        }
    }
};

// The ways to solve a problem.
enum : unsigned { kPairs = 1, kSeries = 2 };

template <typename T>
void run(const Points& z, unsigned choice, unsigned ways, const double (&w)[3], const Truths& truths) {
    const int64_t n = z.n, m = choice & kY ? z.m : 0, d = z.d;
    const auto part = [](unsigned wanted, const std::vector<float>& from, int64_t start, int64_t size) {
        std::unique_ptr<T[]> copy(wanted ? new T[size] : nullptr);
        if (wanted) std::copy_n(from.begin() + start, size, copy.get());
        return copy;
    };
    const auto x = part(1, z.z, 0, n * d), y = part(choice & kY, z.z, n * d, m * d);
    const auto v = part(choice & kV, z.v, 0, n * d);
    const auto a = part(choice & kA, z.a, 0, n), b = part(choice & kB, z.a, n, m);
    const auto solve = [&](const char* name, const auto& way, double tolerance) {
        const Result<double> energy(truths.energy);
        const Result<T> x_force(truths.force[0]), y_force(truths.force[1]);
        const Result<T> x_potential(truths.potential[0]), y_potential(truths.potential[1]);
        const infovae_fast::PairwiseProblem<T> q{
            x.get(), y.get(), v.get(), a.get(), b.get(), n, m, d, z.radial, w[0], w[1], w[2], energy.memory.get(),
            x_force.memory.get(), y_force.memory.get(), x_potential.memory.get(), y_potential.memory.get()};
        if (!way(q)) return false;
        char problem[200];
        std::snprintf(problem, sizeof problem, "%s %s n=%d m=%d d=%d %s scales=%d choice=%#x", name,
                      sizeof(T) == 4 ? "float" : "double", int(n), int(m), int(d), z.radial.rbf ? "rbf" : "rq",
                      int(z.radial.bandwidth.size()), choice);
        energy.compare("energy", problem, tolerance);
        x_force.compare("x_force", problem, tolerance), y_force.compare("y_force", problem, tolerance);
        x_potential.compare("x_potential", problem, tolerance), y_potential.compare("y_potential", problem, tolerance);
        return true;
    };
    const auto by_pairs = [](const auto& q) { return infovae_fast::pairwise_by_pairs(q), true; };
    problems += ways & kPairs && solve("pairs", by_pairs, sizeof(T) == 4 ? 1e-5 : 1e-12);
    const auto by_fourier = [](const auto& q) { return infovae_fast::pairwise_by_fourier(q); };
    series += ways & kSeries && solve("series", by_fourier, sizeof(T) == 4 ? 1e-7 : 1e-12);
}

void run(const Points& points, unsigned choice, unsigned ways = kPairs) {
    if (!(choice & kY)) choice &= ~(kB | kYForce | kYPotential);
    if (choice & kV) choice &= ~kYForce;
    const double w[3] = {choice & kNoXX ? 0 : 0.7, -0.4, 0.3};
    const Truths truths(points, choice, w);
    run<float>(points, choice, ways, w, truths);
    run<double>(points, choice, ways, w, truths);
}

// Whether steps of which an item throws end, with its exception, all threads at the end, and no item of later ones done.
bool steps_end() {
    infovae_fast::Steps<3> steps;
    std::atomic<int> later{0}, through{0};
    at::parallel_for(0, at::threads, 1, [&](int64_t, int64_t) {
        infovae_fast::Steps<3>::Walk walk(steps);
        walk.each(50, [](int64_t k) {
            if (k % 20 == 7) throw std::runtime_error("item");
        });
        walk.once([&] { ++later; });
        walk.each(9, [&](int64_t) { ++later; });
        ++through;
    });
    try {
        steps.rethrow();
    } catch (const std::runtime_error& error) {
        return error.what() == std::string("item") && later == 0 && through == at::threads;
    }
    return false;
}

}  // namespace

int main(int, char** arguments) {
    at::threads = std::atoi(arguments[1]);
    const bool serial = at::threads == 1;
    if (!steps_end()) return std::puts("steps do not end as they should"), 1;
    const std::vector<int64_t> sizes{1, 2, 3, 17, 63, 64, 65, 70, 193, 257, 300, 0};
    const std::vector<int64_t> dims{1, 2, 3, 5, 7, 10, 11, 13, 16, 17, 33, 40, 80, 130};
    Random random(1);

    for (size_t i = 0; i + 1 < sizes.size(); ++i) {
        for (size_t k = 0; k < dims.size(); ++k) {
            const int64_t n = sizes[i], m = sizes[(i + 5 * k) % sizes.size()], d = dims[k];
            if (n + m > 330) continue;
            const auto all = kernels(d);
            const size_t step = n + m < 100 && serial ? 1 : all.size();  // one kernel where there are many pairs
            for (size_t kernel = (i + k) % step; kernel < all.size(); kernel += step) {
                run(Points(n, m, d, all[kernel], random), any(random));
            }
        }
    }
    for (const int64_t d : {2, 11, 17}) {  // whatever can be asked for
        std::vector<Points> points;
        for (const RadialMixture& radial : kernels(d)) points.emplace_back(3, 17, d, radial, random);
        for (unsigned choice = 0; serial && choice <= kAll; ++choice) run(points[(choice + d) % points.size()], choice);
    }
    const unsigned one_side = kY | kA | kB | kXForce | kXPotential;  // 2049 points and more: larger blocks of rows
    run(Points(200, 1900, 2, kernels(2)[0], random), one_side);
    run(Points(17, 1500, 16, kernels(16)[2], random), one_side);
    run(Points(1500, 1, 5, kernels(5)[0], random), kY | kEnergy);
    run(Points(577, 512, 6, kernels(6)[0], random), kY | kEnergy | kXForce | kYForce);  // pairs of one cloud once
    run(Points(640, 70, 3, kernels(3)[3], random), kY | kEnergy | kXForce);
    run(Points(513, 1, 17, kernels(17)[0], random), kY | kV | kXForce);
    Points heavy(520, 40, 6, kernels(6)[0], random);
    for (float& a : heavy.a) a *= 1000;
    run(heavy, kY | kB | kEnergy | kXForce);
    const auto by_series = [&](int64_t n, int64_t m, int64_t d, const RadialMixture& radial, unsigned choice) {
        Points points(n, m, d, radial, random);
        for (float& a : points.a) a = abs(a);
        run(points, choice, kSeries);
    };
    const RadialMixture two_scales{true, {2, 3}, {0.3, 1}, 1}, wide{true, {8}, {0.9}, 1};
    const RadialMixture four_scales{true, {8, 8.1, 8.2, 8.3}, {1, 1, 0, 1}, 1};
    const unsigned x_side = kY | kA | kB | kEnergy | kXForce | kXPotential, y_side = kY | kEnergy | kYForce;
    by_series(600, 257, 1, two_scales, x_side);
    by_series(257, 300, 1, kernels(1)[1], y_side);
    by_series(600, 1, 1, wide, kY | kV | kXForce | kNoXX);
    by_series(513, 300, 2, two_scales, x_side);
    by_series(1, 1000, 2, wide, y_side | kYPotential);
    by_series(1400, 0, 2, wide, kV | kA | kXForce);
    by_series(1700, 10, 3, four_scales, kY | kEnergy | kXForce);  // in float pairs are cheaper
    std::vector<std::thread> callers;  // several calls at once
    for (int caller = 0; caller < at::threads; ++caller) {
        callers.emplace_back([caller] {
            Random mine(caller);
            for (const int64_t d : {3, 40}) {
                for (const RadialMixture& radial : kernels(d)) run(Points(130, 70, d, radial, mine), any(mine));
            }
        });
    }
    for (std::thread& caller : callers) caller.join();

    std::printf("%s: %d problems, %d by series\n", infovae_fast::vector_unit(), int(problems), int(series));
    return wrong == 0 && series >= 12 ? 0 : 1;
}
