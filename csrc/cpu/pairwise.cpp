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
#include <vector>

#include "vector.h"

namespace infovae_fast {
namespace {

constexpr int kStrip = 6;     // targets whose products are in registers at once
constexpr int kGroup = 16;    // sources whose phi a lane adds up in T
constexpr int kStep = 64;     // ranges of sources start at multiples of it
constexpr int kChunk = 256;   // sources that stay in the cache; summed in T before they go to double
constexpr int kMaxSmall = 16; // coordinates that fit the registers

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
};
template <typename T>
struct Targets {
    const T *u, *h;  // [n, dp], [n]
};
template <typename T>
struct Sources {
    int64_t d, dp;           // coordinates, and with padding
    const T *u, *h, *a;      // [m, dp], [m], [m]
    const T *ut;             // [m / kChunk, d, kChunk], or null where the coordinates fit the registers
    const T *p, *v;          // [m, dp], what g and phi multiply; v may be null
};

#define VECTOR_CODE "pairwise.inc"
#include "each_unit.inc"

template <typename T>
struct Cloud {
    const T* z = nullptr;  // as given
    int64_t n = 0;
    const T *given_a = nullptr, *given_v = nullptr;
    T *u = nullptr, *h = nullptr, *a = nullptr, *ut = nullptr, *p = nullptr, *v = nullptr;

    void carve(Carver& memory, int64_t d, int64_t dp, bool small, bool fold_v) {
        const int64_t padded = round_up(n, kChunk);
        u = memory.take<T>(padded * dp);
        h = memory.take<T>(padded);
        a = memory.take<T>(padded);
        ut = small ? nullptr : memory.take<T>(padded * d);
        p = given_a != nullptr || fold_v ? memory.take<T>(padded * dp) : u;
        v = given_v != nullptr && !fold_v ? memory.take<T>(padded * dp) : nullptr;
    }

    // p = a u + v_factor v where v is folded in.
    void fill(int64_t d, int64_t dp, const double* mean, double scale, bool fold_v, T v_factor) {
        const int64_t padded = round_up(n, kChunk);
        at::parallel_for(0, padded / kChunk, std::max<int64_t>(1, 65536 / (kChunk * d)), [&](int64_t begin, int64_t end) {
            std::fill_n(u + begin * kChunk * dp, (end - begin) * kChunk * dp, T(0));
            for (int64_t j = begin * kChunk; j < end * kChunk; ++j) {
                a[j] = j >= n ? T(0) : given_a != nullptr ? given_a[j] : T(1);
                T* row = u + j * dp;
                if (j < n) {
                    const T* in = z + j * d;
                    for (int64_t c = 0; c < d; ++c) row[c] = T((double(in[c]) - mean[c]) * scale);  // rounded once
                }
                double squares[2] = {};
                for (int64_t c = 0; c + 1 < dp; c += 2) {  // dp is even
                    squares[0] += double(row[c]) * row[c];
                    squares[1] += double(row[c + 1]) * row[c + 1];
                }
                h[j] = T((squares[0] + squares[1]) / 2);
                if (ut != nullptr) {
                    for (int64_t c = 0; c < d; ++c) ut[(j / kChunk * d + c) * kChunk + j % kChunk] = row[c];
                }
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
        });
    }
};

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
    const Mixture<T> mixture{scales, rate.data(), weight.data(), weighted_rate.data(), T(alpha)};
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

    const auto run = [&](size_t k, double* sums, double* row_totals, T* strip) {
        const Task& task = tasks[k];
        const Cloud<T>&own = clouds[task.cloud], &other = clouds[1 - task.cloud];
        const bool force = forces[task.cloud] != nullptr;
        const int64_t count = task.i1 - task.i0;
        const Targets<T> targets{own.u, own.h};
        const auto sources = [&](const Cloud<T>& z) {
            return Sources<T>{small ? dp : d, dp, z.u, z.h, z.a, z.ut, z.p, z.v};
        };
        double energy_here = 0;
        std::fill_n(row_totals, count * (dp + 2), 0.0);
        // Adds w times the sums over sources j0..j1 to the row totals, and share times their energy.
        const auto visit = [&](const Cloud<T>& z, int64_t j0, int64_t j1, int64_t own_offset, double w, double share) {
            const bool with_v = force && z.v != nullptr;
            if (j0 >= j1 || (w == 0 && !with_v)) return;
            const int64_t stride = dp * (with_v ? 2 : 1) + 2;
            std::fill_n(sums, count * stride, 0.0);
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
        std::vector<T> strip(kStrip * d);
        for (int64_t worker = begin; worker < end; ++worker) {
            for (size_t k; (k = next++) < tasks.size();) run(k, sums.data(), row_totals.data(), strip.data());
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
