// Energy and force on the CPU. Coordinates are centred and scaled so that t = u_i.u_j - h_i - h_j is the exponent:
//
//     rbf: u = (z - mean) sqrt(log2 e) / b_0, phi = 2^t        rational quadratic: u = (z - mean) / b_0, phi = (1 - t / alpha)^-alpha
//
// With g as the vector code computes it, phi' = -g / (2 b_0^2) for both, so that
//
//     F_i = -w / (b_0^2 scale) [ (sum_j a_j g_ij) u_i - sum_j g_ij a_j u_j ] + sum_j phi_ij v_j
//
// A task is a block of rows: it owns their forces and potentials and one slot of the energy, so that the result is
// the same whichever thread runs it. Where only the energy is wanted, pairs of one cloud are visited once.
#include "pairwise.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "vector.h"

namespace infovae_fast {
namespace {

constexpr int kStrip = 6;     // targets whose products are in registers at once
constexpr int kGroup = 16;    // sources whose phi a lane adds up in T
constexpr int kStep = 64;     // ranges of sources start at multiples of it
constexpr int kLine = 16;     // coordinates that are transposed at a time
constexpr int kChunk = 256;   // sources that stay in the cache; summed in T before they go to double
constexpr int kMaxSmall = 16; // coordinates that fit the registers
constexpr int kMostOfQuotient = 3;  // scales; of more the rounding errors would show, as they would where there are
constexpr int kFewestScales = 4;    // fewer in all, which do not average them out
constexpr double kFarthest = 1024;  // h up to which t of close points is right to 1e-4 in float; beyond, all is double

enum class Radial { rbf, rbf_mixture, imq, rational_quadratic };

// Whether the path for few coordinates is compiled; elsewhere the other one serves them as well.
template <typename T>
constexpr bool fits_registers(int vector_bytes) {
    return sizeof(T) == 4 && vector_bytes >= 32;
}

template <typename T>
struct Mixture {  // in units of the first scale
    int scales;
    const T *rate, *weight, *weighted_rate;
    T alpha;
    int quotients;           // of `Quotients`, and how many scales are in each, and their coefficients
    const int* sizes;
    const T* coefficients;
};
template <typename T>
struct Targets {
    const T *u, *h;    // [n, dp], [n]
    const T* typical;  // of each row that is computed: phi at a distance that is usual between it and the sources
};
template <typename T>
struct Sources {
    int64_t d, dp;           // coordinates, and with padding
    const T *u, *h, *a;      // [m, dp], [m], [m]
    const T *ut;             // [m / kChunk, d, kChunk], or null where the coordinates fit the registers
    const T *p, *v;          // [m, dp], what g and phi multiply; v may be null
    const double* a_before;  // [m + 1], sum of a_i over i < j
};

#define VECTOR_CODE "pairwise.inc"
#include "each_unit.inc"

template <typename A, typename B>
double dot(const A* a, const B* b, int64_t n) {
    constexpr int64_t chains = 8;  // of additions, that need not wait for each other
    double sums[chains] = {};
    int64_t c = 0;
    for (; c + chains <= n; c += chains) {
        for (int64_t k = 0; k < chains; ++k) sums[k] += double(a[c + k]) * double(b[c + k]);
    }
    for (; c < n; ++c) sums[0] += double(a[c]) * double(b[c]);
    for (int64_t k = 1; k < chains; ++k) sums[0] += sums[k];
    return sums[0];
}

template <typename T>
struct Cloud {
    const T* z = nullptr;  // as given
    int64_t n = 0;
    const T *given_a = nullptr, *given_v = nullptr;
    T *u = nullptr, *h = nullptr, *a = nullptr, *ut = nullptr, *p = nullptr, *v = nullptr;
    double* a_before = nullptr;

    void carve(Carver& memory, int64_t d, int64_t dp, bool small, bool fold_v) {
        const int64_t padded = round_up(n, kStep);
        u = memory.take<T>(padded * dp);
        h = memory.take<T>(padded);
        a = memory.take<T>(padded);
        a_before = memory.take<double>(padded + 1);
        ut = small ? nullptr : memory.take<T>(round_up(n, kChunk) * d);
        p = given_a != nullptr || fold_v ? memory.take<T>(padded * dp) : u;
        v = given_v != nullptr && !fold_v ? memory.take<T>(padded * dp) : nullptr;
    }

    // p = a u + v_factor v where v is folded in.
    void fill(int64_t d, int64_t dp, const double* mean, double scale, bool fold_v, T v_factor) {
        const int64_t steps = round_up(n, kStep) / kStep;
        at::parallel_for(0, steps, std::max<int64_t>(1, 16384 / (kStep * d)), [&](int64_t begin, int64_t end) {
            std::fill_n(u + begin * kStep * dp, (end - begin) * kStep * dp, T(0));
            for (int64_t j = begin * kStep; j < end * kStep; ++j) {
                a[j] = j >= n ? T(0) : given_a != nullptr ? given_a[j] : T(1);
                T* row = u + j * dp;
                if (j < n) {
                    const T* in = z + j * d;
                    for (int64_t c = 0; c < d; ++c) row[c] = T((double(in[c]) - mean[c]) * scale);  // rounded once
                }
                h[j] = j < n ? T(dot(row, row, d) / 2) : T(0);
                const auto given = [&](int64_t c) {
                    return given_v != nullptr && j < n && c < d ? given_v[j * d + c] : T(0);
                };
                if (p != u) {
                    for (int64_t c = 0; c < dp; ++c) {
                        p[j * dp + c] = a[j] * row[c] + (fold_v ? v_factor * given(c) : T(0));
                    }
                }
                if (v != nullptr) {
                    for (int64_t c = 0; c < dp; ++c) v[j * dp + c] = given(c);
                }
            }
            for (int64_t j = begin * kStep; ut != nullptr && j < end * kStep; j += kStep) {
                T* const to = ut + j / kChunk * kChunk * d + j % kChunk;
                for (int64_t c0 = 0; c0 < d; c0 += kLine) {  // so that what is read and written stays in the cache
                    const int64_t c1 = std::min(c0 + kLine, d);
                    for (int64_t k = 0; k < kStep; ++k) {
                        for (int64_t c = c0; c < c1; ++c) to[c * kChunk + k] = u[(j + k) * dp + c];
                    }
                }
            }
        });
        a_before[0] = 0;
        for (int64_t j = 0; j < n; ++j) a_before[j + 1] = a_before[j] + double(a[j]);
    }
};

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
    // s is at most `farthest`.
    Quotients(const std::vector<T>& rate, const std::vector<T>& weight, double farthest) {
        const int scales = int(rate.size());
        const bool share = sizeof(T) == 4 && kUnit != Unit::baseline && scales >= kFewestScales;
        const int most = share ? kMostOfQuotient : 1;
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

// As the vector code has it, of the exponent t in units of the first scale.
double phi_of(Radial kind, const RadialMixture& radial, double t) {
    if (kind == Radial::rbf) return std::exp2(t);
    double phi = 0;
    for (size_t k = 0; k < radial.bandwidth.size(); ++k) {
        const double ratio = radial.bandwidth[0] / radial.bandwidth[k], s = t * ratio * ratio;
        phi += radial.weight[k] * (radial.rbf            ? std::exp2(s)
                                   : kind == Radial::imq ? 1 / (1 - s)
                                                         : std::pow(1 - s / radial.alpha, -radial.alpha));
    }
    return phi;
}

// The means of h and u over a cloud's points, each as often as |a| says: with them the mean t between a point and those.
struct Usual {
    double a = 0, h = 0;
    std::vector<double> u;

    template <typename T>
    Usual(const Cloud<T>& cloud, int64_t d, int64_t dp) : u(d, 0.0) {
        for (int64_t i = 0; i < cloud.n; ++i) {
            const double weight = std::abs(double(cloud.a[i]));
            a += weight, h += weight * double(cloud.h[i]);
            for (int64_t c = 0; c < d; ++c) u[c] += weight * double(cloud.u[i * dp + c]);
        }
        h /= a;
        for (double& mean : u) mean /= a;
    }

    // Of point i of its own cloud without that point itself, or of another's. At most 0; NaN where there are no points.
    template <typename T>
    double t(const Cloud<T>& cloud, int64_t i, int64_t dp, bool own) const {
        const double mean = dot(cloud.u + i * dp, u.data(), int64_t(u.size())) - h - double(cloud.h[i]);
        const double others = a - (own ? std::abs(double(cloud.a[i])) : 0);
        return std::min(mean * (a / others), 0.0);
    }
};

// The same problem, its arrays and results copied to and from double.
void in_double(const PairwiseProblem<float>& q) {
    std::vector<std::vector<double>> copies;
    const auto in = [&](const float* array, int64_t size) -> const double* {
        if (array == nullptr) return nullptr;
        return copies.emplace_back(array, array + size).data();
    };
    const auto out = [&](const float* array, int64_t size) -> double* {
        return array == nullptr ? nullptr : copies.emplace_back(size).data();
    };
    const auto round = [](const double* from, int64_t size, float* to) {
        if (to != nullptr) std::copy_n(from, size, to);
    };
    const int64_t n = q.n, m = q.m, d = q.d;
    const PairwiseProblem<double> exact{in(q.x, n * d), in(q.y, m * d), in(q.v, n * d), in(q.a, n), in(q.b, m), n, m, d,
                                        q.radial, q.w_xx, q.w_xy, q.w_yy, q.energy, out(q.x_force, n * d),
                                        out(q.y_force, m * d), out(q.x_potential, n), out(q.y_potential, m)};
    pairwise(exact);
    round(exact.x_force, n * d, q.x_force), round(exact.y_force, m * d, q.y_force);
    round(exact.x_potential, n, q.x_potential), round(exact.y_potential, m, q.y_potential);
}

}  // namespace

const char* vector_unit() {
    return kUnit == Unit::avx512 ? "avx512" : kUnit == Unit::avx2 ? "avx2" : "baseline";
}

template <typename T>
void pairwise(const PairwiseProblem<T>& q) {
    const int64_t d = q.d;
    const int scales = int(q.radial.bandwidth.size());
    const double b0 = q.radial.bandwidth[0], alpha = q.radial.alpha;
    const Radial kind = q.radial.rbf     ? scales == 1 ? Radial::rbf : Radial::rbf_mixture
                        : alpha == 1 ? Radial::imq
                                     : Radial::rational_quadratic;
    std::vector<T> rate, weight, weighted_rate;
    for (int k = 0; k < scales; ++k) {
        const double r = b0 * b0 / (q.radial.bandwidth[k] * q.radial.bandwidth[k]);
        rate.push_back(T(r));
        weight.push_back(T(q.radial.weight[k]));
        weighted_rate.push_back(T(q.radial.weight[k] * r));
    }
    const double outer = kind == Radial::rbf ? q.radial.weight[0] : 1;  // the vector code's rbf has no weight
    const double scale = (q.radial.rbf ? std::sqrt(1.4426950408889634074) : 1) / b0;
    const double slope = outer / (b0 * b0 * scale);

    const bool fold_v = q.v != nullptr && kind == Radial::rbf && q.w_xx != 0;
    const bool small = d <= kMaxSmall && fits_registers<T>(kUnit == Unit::baseline ? 16 : 32) &&
                       (kind == Radial::rbf || kind == Radial::imq) && (q.v == nullptr || fold_v);
    const int64_t dp = !small ? round_up(d, 64 / int64_t(sizeof(T))) : d <= 10 ? round_up(d, 2) : kMaxSmall;

    Cloud<T> clouds[2];
    clouds[0].z = q.x, clouds[0].n = q.n, clouds[0].given_a = q.a, clouds[0].given_v = q.v;
    clouds[1].z = q.y, clouds[1].n = q.y == nullptr ? 0 : q.m, clouds[1].given_a = q.b;
    Workspace workspace;
    Carver measure{nullptr};
    for (Cloud<T>& cloud : clouds) cloud.carve(measure, d, dp, small, fold_v && &cloud == clouds);
    Carver memory{workspace.reserve(measure.used)};
    for (Cloud<T>& cloud : clouds) cloud.carve(memory, d, dp, small, fold_v && &cloud == clouds);

    std::vector<double> mean(d, 0.0);
    for (const Cloud<T>& cloud : clouds) {
        for (int64_t i = 0; i < cloud.n; ++i) {
            for (int64_t c = 0; c < d; ++c) mean[c] += double(cloud.z[i * d + c]);
        }
    }
    for (double& sum : mean) sum /= double(clouds[0].n + clouds[1].n);
    for (Cloud<T>& cloud : clouds) {
        const bool folded = fold_v && &cloud == clouds;
        if (cloud.n > 0) cloud.fill(d, dp, mean.data(), scale, folded, folded ? T(outer / (slope * q.w_xx)) : T(0));
    }

    T farthest = 0;  // h of that point
    for (const Cloud<T>& cloud : clouds) {
        for (int64_t i = 0; i < cloud.n; ++i) farthest = std::max(farthest, cloud.h[i]);
    }
    if constexpr (sizeof(T) == 4) {
        if (double(farthest) > kFarthest) return in_double(q);
    }
    const Quotients<T> quotients = kind == Radial::imq ? Quotients<T>(rate, weight, 4 * double(farthest)) : Quotients<T>();
    const Mixture<T> mixture{scales, rate.data(), weight.data(), weighted_rate.data(), T(alpha),
                             int(quotients.sizes.size()), quotients.sizes.data(), quotients.coefficients.data()};
    const Usual usual[2] = {Usual(clouds[0], d, dp), Usual(clouds[1], d, dp)};
    // Not of double, which would gain nothing, nor of a phi that may change its sign.
    const bool subtract = sizeof(T) == 4 && std::all_of(weight.begin(), weight.end(), [](T w) { return w >= 0; });

    // A cloud is `full` if its rows need forces or potentials. Pairs of both clouds are visited by the full ones;
    // if there is none, by x.
    const bool full[2] = {q.x_force != nullptr || q.x_potential != nullptr,
                          q.y_force != nullptr || q.y_potential != nullptr};
    const bool energy = q.energy != nullptr, both = clouds[1].n > 0;
    const bool between[2] = {both && (full[0] || (energy && !full[1])), both && full[1]};
    const double w_within[2] = {q.w_xx, q.w_yy};
    T* const forces[2] = {q.x_force, q.y_force};
    T* const potentials[2] = {q.x_potential, q.y_potential};
    const int64_t pairs = (clouds[0].n + clouds[1].n) * (clouds[0].n + clouds[1].n);
    const int64_t block = pairs > (int64_t(1) << 22) ? 3 * kStep : kStep;

    struct Task {
        int cloud;
        int64_t i0, i1;
    };
    std::vector<Task> tasks;
    for (const int cloud : {0, 1}) {
        if (!full[cloud] && !energy) continue;
        for (int64_t i = 0; i < clouds[cloud].n; i += block) {
            tasks.push_back({cloud, i, std::min(i + block, clouds[cloud].n)});
        }
    }
    std::vector<double> energies(tasks.size(), 0.0);
    const auto rows = BEST(rows<T>);

    const auto run = [&](size_t k, double* sums, double* row_totals, T* strip, T* typical) {
        const Task& task = tasks[k];
        const Cloud<T>&own = clouds[task.cloud], &other = clouds[1 - task.cloud];
        const bool force = forces[task.cloud] != nullptr;
        const int64_t count = task.i1 - task.i0;
        const Targets<T> targets{own.u, own.h, typical};
        const auto sources = [&](const Cloud<T>& z) {
            return Sources<T>{small ? dp : d, dp, z.u, z.h, z.a, z.ut, z.p, z.v, z.a_before};
        };
        double energy_here = 0;
        std::fill_n(row_totals, count * (dp + 2), 0.0);
        // Adds w times the sums over sources j0..j1 to the row totals, and share times their energy.
        const auto visit = [&](const Cloud<T>& z, int64_t j0, int64_t j1, int64_t own_offset, double w, double share) {
            const bool with_v = force && z.v != nullptr;
            if (j0 >= j1 || (w == 0 && !with_v)) return;
            const int64_t stride = dp * (with_v ? 2 : 1) + 2;
            std::fill_n(sums, count * stride, 0.0);
            // phi is convex: its mean over the sources is at least phi of their mean distance, so that no digits are lost.
            for (int64_t r = 0; r < count; ++r) {
                const double t = usual[&z - clouds].t(own, task.i0 + r, dp, &z == &own);
                const T phi = subtract ? T(phi_of(kind, q.radial, t)) : T(0);
                typical[r] = std::isfinite(phi) ? phi : T(0);
            }
            rows(kind, force, targets, sources(z), mixture, task.i0, task.i1, j0, j1, own_offset, sums, strip);
            for (int64_t r = 0; r < count; ++r) {
                const double* in = sums + r * stride;
                double* out = row_totals + r * (dp + 2);
                out[0] += w * outer * in[0];
                energy_here += share * w * outer * in[0] * double(own.a[task.i0 + r]);
                if (!force) continue;
                out[1] += w * slope * in[1];
                for (int64_t c = 0; c < dp; ++c) out[2 + c] += w * slope * in[2 + c];
                if (with_v) {
                    for (int64_t c = 0; c < dp; ++c) out[2 + c] += outer * in[2 + dp + c];
                }
            }
        };
        constexpr int64_t kNowhere = -(int64_t(1) << 60);
        const double w = w_within[task.cloud];
        if (full[task.cloud]) {
            visit(own, 0, own.n, 0, w, 1);
        } else {
            visit(own, task.i0, task.i1, 0, w, 1);
            visit(own, task.i1, own.n, 0, w, 2);
        }
        if (between[task.cloud]) {
            visit(other, 0, other.n, kNowhere, q.w_xy, between[0] && between[1] ? 1 : 2);
        }
        energies[k] = energy_here;
        for (int64_t r = 0; r < count; ++r) {
            const double* in = row_totals + r * (dp + 2);
            const T* u = own.u + (task.i0 + r) * dp;
            if (potentials[task.cloud] != nullptr) potentials[task.cloud][task.i0 + r] = T(in[0]);
            if (!force) continue;
            const double a = own.given_a == nullptr ? 1 : double(own.given_a[task.i0 + r]);
            T* out = forces[task.cloud] + (task.i0 + r) * d;
            for (int64_t c = 0; c < d; ++c) out[c] = T(a * (in[2 + c] - in[1] * double(u[c])));
        }
    };

    std::atomic<size_t> next{0};
    const int64_t workers = pairs * d < 100000 ? 1 : std::min<int64_t>(at::get_num_threads(), int64_t(tasks.size()));
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
        std::vector<double> sums(block * (2 * dp + 2)), row_totals(block * (dp + 2));
        std::vector<T> strip(kStrip * d), typical(block);
        for (int64_t worker = begin; worker < end; ++worker) {
            for (size_t k; (k = next++) < tasks.size();) run(k, sums.data(), row_totals.data(), strip.data(), typical.data());
        }
    });
    if (energy) {
        *q.energy = 0;
        for (const double e : energies) *q.energy += e;
    }
}

template void pairwise<float>(const PairwiseProblem<float>&);
template void pairwise<double>(const PairwiseProblem<double>&);

}  // namespace infovae_fast
