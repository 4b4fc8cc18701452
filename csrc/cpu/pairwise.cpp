// Energy and force on the CPU. Coordinates are centred and scaled so that t = u_i.u_j - h_i - h_j is the exponent:
//
//     rbf:                 u = (z - centre) sqrt(log2 e) / b_0,  phi = 2^t
//     rational quadratic:  u = (z - centre) / b_0,               phi = (1 - t / alpha)^-alpha
//
// (where coordinates are few, by sqrt(1/2) more: then t is -|u_i - u_j|^2, without a factor)
//
// With g as the vector code computes it, phi' = -g / (2 b_0^2) for both, so that
//
//     F_i = -w / (b_0^2 scale) [ (sum_j a_j g_ij) u_i - sum_j g_ij a_j u_j ] + sum_j phi_ij v_j
//
// A task is a block of rows: it owns their forces and potentials and one slot of the energy, so that the result is
// the same whichever thread runs it. Pairs of one cloud are visited once where only the energy is wanted; in AVX-512 and
// float also where forces of many equal points are, but no potentials. What rows do to each other is then added up in
// integers, by each worker for itself: their total does not depend on who did what.
#include "pairwise.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "quotients.h"
#include "steps.h"
#include "vector.h"

namespace infovae_fast {
namespace {

constexpr int kStep = 64;     // sources of a tile
constexpr int kFewest = 4;    // coordinates up to which distances are sums of squared differences
constexpr int kDepth = 129;   // coordinates whose products are summed in registers; a multiple of 3
constexpr int kChunk = 256;   // sources whose forces, with signs that differ, are summed in T
constexpr int kLine = 16;     // coordinates that are transposed at a time; rows that are added and centred as one
constexpr int kFill = 2048;     // numbers that are centred at a time
constexpr int kPart = 1 << 17;  // numbers of the sources that stay in the cache for all targets of a task
constexpr int64_t kLeastOnce = 512;     // points of a cloud whose pairs are visited once although forces are wanted,
constexpr int64_t kMostOnce = 1 << 20;  // its sums, as every worker has them all,
constexpr double kFarthestOnce = 10;    // and its average h, in units of the smallest scale: g is not lost beside g(0)
// Forces are sums of products of pairs where phi less the usual one and coordinates of sources are of one size, or digits
// would be lost: an average h, a largest |u| of 64 sources, and coordinates' mean squares in units of the mean of those.
// And of phi a usual one.
constexpr double kFarthestOfPairs = 1.25, kLargestOfPairs = 3, kSmallestOfPairs = 1.0 / 1024, kLeastOfPairs = 1.0 / 16;
// h or excess, in units of the smallest scale, up to which t of close points is right to 1e-5 in float; beyond, all is
// double. Of differences more: their rounding errors grow as the distance from the centre, those of products as its square.
constexpr double kFarthest = 48, kFarthestOfDifferences = 128;
// And up to which products of double keep t to 1e-12; beyond, the centre is another, and if that does not help, t is a sum
// of squared differences.
constexpr double kFarthestOfDouble = 1e4;
// What v is multiplied with so that it can be added to what g multiplies: without overflow, and without loss of either.
constexpr double kMostOfV = 1e10;

enum class Radial { rbf, rbf_mixture, imq, rational_quadratic };

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
    const T *ut, *h, *a, *excess;  // [n / lanes, d, lanes], [n] each, with padding to whole groups of lanes
};
template <typename T>
struct Sources {
    int64_t d;
    const T *u, *a, *excess;  // [m, d], [m], [m]
    const T *p, *v;          // [m, d], what g and phi multiply; v may be null
    const double* a_before;  // [m + 1], sum of a_i over i < j; null if all a are 1
    const T* average;        // [d], of u, each point as often as |a| says; null: no usual phi is left out of the sums
    T average_h;             // likewise
    double total_a;          // sum of |a|
    const T* p_products;     // [groups, d], see `sums_of_group`; null: forces are not by products of pairs
    const double* p_sums;    // [groups, d], likewise
    const bool* pairs;       // [groups], those of which they may be
    bool far;                // points may be too far from the centre for products
};

struct Factors {
    double g, v;
};
// Where pairs of one cloud are visited once: what targets do to sources, sums of g times `g_factor` and of g p times
// `p_factor`, are added to `sums` [n / kStep, 1 + d, kStep].
template <typename T>
struct Reactions {
    const T *p, *usual;  // [n, d] and [n], the usual g
    double g_factor, p_factor;
    int64_t* sums;  // null: they are not
};

// Targets i0..i1 and sources j0..j1 of a call of the vector code.
template <typename T>
struct Visit {
    Targets<T> x;
    Sources<T> z;
    Mixture<T> mixture;
    Factors factor;
    int64_t i0, i1, j0, j1;
    int64_t own;  // target i is source i + own itself; far below 0 where clouds differ
    Reactions<T> reactions;
    double *sums, *p_sum;
    T* scratch;
};

// Targets that the vector code has in its lanes at once.
template <typename T>
int64_t targets_at_once() {
    return lanes<T>() * (kUnit >= Unit::avx512 ? 4 : 2);
}
// And lanes that it uses for the last ones.
template <typename T>
int64_t lanes_of(int64_t targets) {
    const int64_t W = lanes<T>();
    return targets <= W ? W : targets <= 2 * W ? 2 * W : targets_at_once<T>();
}

#define VECTOR_CODE "pairwise.inc"
#include "each_unit.inc"

// The sums of all kLine rows go to the first.
inline void fold(double* sums, int64_t d) {
    for (int64_t row = 1; row < kLine; ++row) {
        for (int64_t c = 0; c < d; ++c) sums[c] += sums[row * d + c];
    }
}

template <typename T>
struct Cloud {
    const T* z = nullptr;  // as given
    int64_t n = 0;
    const T *given_a = nullptr, *given_v = nullptr;
    T *u = nullptr, *h = nullptr, *a = nullptr, *ut = nullptr, *p = nullptr, *average = nullptr, *usual = nullptr;
    T* excess = nullptr;  // what products of pairs are more than t because of this point; h where there are none
    const T* v = nullptr;
    // Where its forces may be sums of products of pairs: of its groups; and [groups + 1, 1 + d], sums of usual g and of
    // usual g p of those before whose are.
    T* p_products = nullptr;
    double *p_sums = nullptr, *squares = nullptr, *usual_before = nullptr;
    bool* pairs = nullptr;
    bool by_pairs = false;
    double *sum = nullptr, *a_before = nullptr;  // sum [kLine, d]: of z after `add_up`, then of u; in row 0
    double average_h = 0, total_a = 0;

    void carve(Carver& memory, int64_t d, bool fold_v, bool may_pair, bool may_once) {
        const int64_t padded = round_up(n, targets_at_once<T>());
        u = memory.take<T>(n * d);
        h = memory.take<T>(padded);
        a = memory.take<T>(padded);
        usual = memory.take<T>(padded);
        excess = kUnit == Unit::zen4 && d > kFewest && n > 0 ? memory.take<T>(padded) : h;
        average = memory.take<T>(d);
        sum = memory.take<double>(kLine * d);
        a_before = given_a != nullptr ? memory.take<double>(n + 1) : nullptr;
        ut = memory.take<T>(padded * d);
        p = given_a != nullptr || fold_v ? memory.take<T>(n * d) : u;
        v = fold_v ? nullptr : given_v;
        if (may_pair && given_a == nullptr && given_v == nullptr) {
            p_products = memory.take<T>(groups() * d);
            p_sums = memory.take<double>(groups() * d);
            squares = memory.take<double>(groups() * d);
            pairs = memory.take<bool>(groups());
            usual_before = may_once ? memory.take<double>((groups() + 1) * (1 + d)) : nullptr;
        }
    }

    void add_up(int64_t d) {
        std::fill_n(sum, kLine * d, 0.0);
        BEST(add_rows<T>)(z, n, d, sum);
        fold(sum, d);
    }

    int64_t groups() const { return round_up(n, targets_at_once<T>()) / targets_at_once<T>(); }

    // Groups begin..end of points. p = a u + v_factor v where v is folded in. `centre`: [kLine, d].
    void fill(int64_t begin, int64_t end, int64_t d, const double* centre, double scale, bool fold_v, T v_factor) {
        const int64_t L = targets_at_once<T>();
        for (int64_t group = begin; group < end; ++group) {
            const int64_t first = group * L, last = std::min(first + L, n);
            T* const transposed = ut + first * d;
            BEST(centre<T>)(z + first * d, last - first, d, centre, scale, u + first * d);
            BEST(transpose<T>)(u + first * d, d, last - first, lanes_of<T>(last - first), transposed);
            BEST(norms<T>)(transposed, d, h + first, excess + first);
            if (p_products != nullptr) {
                pairs[group] = BEST(sums_of_group<T>)(u + first * d, d, last - first, p_sums + group * d,
                                                      squares + group * d, p_products + group * d) <= T(kLargestOfPairs);
            }
            if (given_a == nullptr) {
                std::fill(a + first, a + last, T(1));
            } else {
                std::copy(given_a + first, given_a + last, a + first);
            }
            std::fill(a + last, a + first + L, T(0));
            for (int64_t j = first; p != u && j < last; ++j) {
                for (int64_t c = 0; c < d; ++c) {
                    p[j * d + c] = a[j] * u[j * d + c] + (fold_v ? v_factor * given_v[j * d + c] : T(0));
                }
            }
        }
    }

    // With the averages of u and h comes the average t between a point and those of this cloud.
    void take_averages(int64_t d, const double* centre, double scale) {
        double sum_h = 0;
        total_a = double(n);
        if (given_a == nullptr) {
            double sums_of_h[kLine] = {};
            BEST(add_rows<T>)(h, n, 1, sums_of_h);
            for (const double one : sums_of_h) sum_h += one;
            for (int64_t c = 0; c < d; ++c) sum[c] = (sum[c] - centre[c] * total_a) * scale;
        } else {
            std::fill_n(sum, d, 0.0);
            total_a = 0, a_before[0] = 0;
            for (int64_t i = 0; i < n; ++i) {
                const double weight = std::abs(double(a[i]));
                a_before[i + 1] = a_before[i] + double(a[i]);
                total_a += weight, sum_h += weight * double(h[i]);
                for (int64_t c = 0; c < d; ++c) sum[c] += weight * double(u[i * d + c]);
            }
        }
        average_h = sum_h / total_a;
        for (int64_t c = 0; c < d; ++c) average[c] = T(sum[c] / total_a);
    }

    // Mean square of a coordinate.
    double mean_square(int64_t d, int64_t c) const {
        double sum = 0;
        for (int64_t group = 0; group < groups(); ++group) sum += squares[group * d + c];
        return sum / double(n);
    }

    void take_usual_g(Radial kind, const Mixture<T>& mixture, int64_t d, bool subtract) {
        BEST(usual_g<T>)(kind, mixture, targets(), sources(d, subtract, false), n, usual);
        if (!by_pairs) return;
        std::fill_n(usual_before, 1 + d, 0.0);
        for (int64_t group = 0; group < groups(); ++group) {
            double* const sums = usual_before + (group + 1) * (1 + d);
            std::copy_n(sums - (1 + d), 1 + d, sums);
            const int64_t first = group * kStep, last = std::min(first + kStep, n);
            pairs[group] = pairs[group] && BEST(are_close<T>)(usual + first, last - first);
            for (int64_t i = first; pairs[group] && i < last; ++i) {
                sums[0] += double(usual[i]);
                for (int64_t c = 0; c < d; ++c) sums[1 + c] += double(usual[i]) * double(u[i * d + c]);
            }
        }
    }

    Targets<T> targets() const { return {ut, h, a, excess}; }

    // `subtract`: whether a usual phi may be left out of the sums.
    Sources<T> sources(int64_t d, bool subtract, bool far) const {
        return {d, u, a, excess, p, v, a_before, subtract ? average : nullptr, T(average_h), total_a,
                by_pairs ? p_products : nullptr, p_sums, pairs, far};
    }
};

// What one thread needs.
template <typename T>
struct Worker {
    double *sums, *p_sum, *potential, *energy;
    int64_t* fixed[2];  // sums of the clouds whose pairs are visited once, [n / kStep, 1 + d, kStep]
    T* tiles;
    bool began;  // a task

    void carve(Carver& memory, int64_t rows, int64_t d, bool with_v, const int64_t (&n_once)[2]) {
        const int64_t L = targets_at_once<T>(), forces = d * (with_v || n_once[0] + n_once[1] > 0 ? 2 : 1) * L;
        for (const int k : {0, 1}) {
            fixed[k] = n_once[k] > 0 ? memory.take<int64_t>(round_up(n_once[k], kStep) * (1 + d)) : nullptr;
        }
        sums = memory.take<double>(round_up(rows, L) * (2 + d));
        p_sum = memory.take<double>(d);
        potential = memory.take<double>(round_up(rows, L));
        energy = memory.take<double>(L);
        tiles = memory.take<T>(2 * kStep * L + forces);
        if (tiles != nullptr) std::fill_n(tiles + 2 * kStep * L, forces, T(0));  // sums, which end as they start
        began = false;
    }
};

// One call: `Workspace` and plan, and the steps of its workers.
template <typename T>
class Call {
public:
    // The centre is the mean, or the median of each coordinate, which a few points that are far away do not move.
    Call(const PairwiseProblem<T>& q, bool by_median)
        : q(q),
          by_median(by_median),
          d(q.d),
          kind(q.radial.rbf          ? q.radial.bandwidth.size() == 1 ? Radial::rbf : Radial::rbf_mixture
               : q.radial.alpha == 1 ? Radial::imq
                                     : Radial::rational_quadratic),
          v_factor(q.v != nullptr && kind == Radial::rbf && q.w_xx != 0 ? factor_of_v(q) : 0),
          fold_v(std::abs(v_factor) >= 1 / kMostOfV && std::abs(v_factor) <= kMostOfV),
          forces{q.x_force, q.y_force},
          potentials{q.x_potential, q.y_potential},
          full{q.x_force != nullptr || q.x_potential != nullptr, q.y_force != nullptr || q.y_potential != nullptr},
          w_within{q.w_xx, q.w_yy} {
        const double b0 = q.radial.bandwidth[0];
        for (size_t k = 0; k < q.radial.bandwidth.size(); ++k) {
            const double r = b0 * b0 / (q.radial.bandwidth[k] * q.radial.bandwidth[k]);
            rate.push_back(T(r));
            weight.push_back(T(q.radial.weight[k]));
            weighted_rate.push_back(T(q.radial.weight[k] * r));
        }
        subtract = sizeof(T) == 4 && std::all_of(weight.begin(), weight.end(), [](T w) { return w >= 0; });
        may_pair = subtract && kUnit == Unit::zen4 && d > kFewest && kind == Radial::rbf &&
                   (forces[0] != nullptr || forces[1] != nullptr);
        outer = kind == Radial::rbf ? q.radial.weight[0] : 1;
        scale = scale_of(q);
        slope = outer / (b0 * b0 * scale);

        clouds[0].z = q.x, clouds[0].n = q.n, clouds[0].given_a = q.a, clouds[0].given_v = q.v;
        clouds[1].z = q.y, clouds[1].n = q.y == nullptr ? 0 : q.m, clouds[1].given_a = q.b;
        for (const int k : {0, 1}) {
            const Cloud<T>& cloud = clouds[k];
            const bool sums_only = forces[k] != nullptr && potentials[k] == nullptr && cloud.given_a == nullptr &&
                                   (cloud.given_v == nullptr || fold_v) && w_within[k] != 0;
            if (sums_only && L == kStep && cloud.n >= kLeastOnce && cloud.n * (1 + d) <= kMostOnce) n_once[k] = cloud.n;
        }
        const int64_t total = clouds[0].n + clouds[1].n, pairs = total * total;
        block = pairs > (int64_t(1) << 22) ? 3 * kStep : kStep;
        const int64_t most = clouds[0].n / block + clouds[1].n / block + 2;  // tasks
        workers.resize(pairs * d < 100000 ? 1 : std::min<int64_t>(at::get_num_threads(), most));
        Carver memory{nullptr};
        carve(memory);  // to measure
        memory = Carver{workspace.reserve(memory.used)};
        carve(memory);
    }

    // Whether T was wide enough around this centre; the results are there then.
    bool run() {
        const int64_t groups[2] = {clouds[0].groups(), clouds[1].groups()}, some = std::max<int64_t>(1, kFill / (L * d));
        const int64_t pieces[2] = {(groups[0] + some - 1) / some, (groups[1] + some - 1) / some};
        Steps<6> steps;
        at::parallel_for(0, int64_t(workers.size()), 1, [&](int64_t begin, int64_t end) {
            for (int64_t worker = begin; worker < end; ++worker) {
                Worker<T>& mine = workers[worker];
                Steps<6>::Walk walk(steps);
                walk.each(2, [&](int64_t k) { clouds[k].add_up(d); });
                walk.once([&] { take_centre(); });
                walk.each(pieces[0] + pieces[1], [&](int64_t k) {
                    const int cloud = k < pieces[0] ? 0 : 1;
                    const int64_t first = (k - cloud * pieces[0]) * some;
                    fill_groups(cloud, first, std::min(first + some, groups[cloud]));
                });
                walk.once([&] { plan(); });
                walk.each(int64_t(tasks.size()), [&](int64_t k) { visit_rows(k, mine); });
                walk.each(once[0] || once[1] ? int64_t(tasks.size()) : 0, [&](int64_t k) {
                    if (once[tasks[k].cloud]) finish_once(tasks[k], mine);
                });
            }
        });
        steps.rethrow();
        if (!too_wide && q.energy != nullptr) {
            *q.energy = 0;
            for (const double e : energies) *q.energy += e;
        }
        return !too_wide;
    }

private:
    struct Task {
        int cloud;
        int64_t i0, i1;
    };

    // Of coordinates; and 1 / (w_xx slope) but for the weight of the kernel.
    static double scale_of(const PairwiseProblem<T>& q) {
        return (q.radial.rbf ? std::sqrt(1.4426950408889634074) : 1) / q.radial.bandwidth[0] * (q.d > kFewest ? 1 : std::sqrt(0.5));
    }
    static double factor_of_v(const PairwiseProblem<T>& q) {
        return q.radial.bandwidth[0] * q.radial.bandwidth[0] * scale_of(q) / q.w_xx;
    }

    void carve(Carver& memory) {
        centre = memory.take<double>(kLine * d);
        for (const int k : {0, 1}) clouds[k].carve(memory, d, fold_v && k == 0, may_pair, n_once[k] > 0);
        for (Worker<T>& worker : workers) worker.carve(memory, block, d, q.v != nullptr && !fold_v, n_once);
    }

    void take_centre() {
        const int64_t total = clouds[0].n + clouds[1].n;
        for (int64_t c = 0; c < d; ++c) {
            centre[c] = by_median ? median(c) : (clouds[0].sum[c] + clouds[1].sum[c]) / double(total);
        }
        for (int64_t e = d; e < kLine * d; ++e) centre[e] = centre[e - d];
    }

    double median(int64_t c) const {
        std::vector<double> of_points;
        for (const Cloud<T>& cloud : clouds) {
            for (int64_t i = 0; i < cloud.n; ++i) of_points.push_back(double(cloud.z[i * d + c]));
        }
        const auto is_below = [](double a, double b) { return a < b || (b != b && a == a); };  // NaN is above all
        const auto at = [&](size_t k) {
            std::nth_element(of_points.begin(), of_points.begin() + int64_t(k), of_points.end(), is_below);
            return of_points[k] / 2;
        };
        return at((of_points.size() - 1) / 2) + at(of_points.size() / 2);
    }

    void fill_groups(int cloud, int64_t begin, int64_t end) {
        clouds[cloud].fill(begin, end, d, centre, scale, fold_v && cloud == 0, T(v_factor));
    }

    // How pairs are visited, and by which tasks; none if T is not wide enough, or if another centre may be better.
    void plan() {
        T farthest = 0, widest = 0;  // the largest h; the largest h or excess
        for (Cloud<T>& cloud : clouds) {
            cloud.take_averages(d, centre, scale);
            farthest = BEST(largest<T>)(cloud.h, cloud.n, farthest);
            widest = BEST(largest<T>)(cloud.excess, cloud.n, std::max(widest, farthest));
        }
        const double units = std::max(1.0, double(*std::max_element(rate.begin(), rate.end())));
        const double most = sizeof(T) == 8 ? kFarthestOfDouble : d <= kFewest ? kFarthestOfDifferences : kFarthest;
        // Where a point is infinite there is nothing to save: it shall be seen.
        const bool finite = sizeof(T) == 4 || std::all_of(centre, centre + d, [](double z) { return std::isfinite(z); });
        const bool wide = finite && double(widest) * units > most;
        too_wide = wide && !by_median, far = wide && d > kFewest;
        if (too_wide) return;
        if (kind == Radial::imq) quotients = Quotients<T>(rate, weight, 4 * double(farthest), d);
        mixture = {int(rate.size()), rate.data(), weight.data(), weighted_rate.data(), T(q.radial.alpha),
                   int(quotients.sizes.size()), quotients.sizes.data(), quotients.coefficients.data()};
        const bool alike = coordinates_are_alike();
        for (Cloud<T>& cloud : clouds) {
            cloud.by_pairs = cloud.p_products != nullptr && cloud.n >= kStep && alike && cloud.average_h <= kFarthestOfPairs;
        }
        const bool energy = q.energy != nullptr, both = clouds[1].n > 0;
        between[0] = both && (full[0] || (energy && !full[1])), between[1] = both && full[1];
        double most_g = 0;
        for (const T g : weighted_rate) most_g += kind == Radial::rbf ? 1 : std::abs(double(g));
        for (const int k : {0, 1}) {
            Cloud<T>& cloud = clouds[k];
            if (n_once[k] > 0) take_units(k, most_g, farthest, units);
            if (once[k]) cloud.take_usual_g(kind, mixture, d, subtract);
            const int64_t rows = once[k] ? kStep : block;
            for (int64_t i = 0; (full[k] || energy) && i < cloud.n; i += rows) {
                tasks.push_back({k, i, std::min(i + rows, cloud.n)});
            }
        }
        energies.resize(tasks.size());
    }

    // None is much smaller than most in both clouds, but for those that are 0.
    bool coordinates_are_alike() const {
        double all = 0, least = std::numeric_limits<double>::infinity();
        for (int64_t c = 0; c < d; ++c) {
            double square = 0;
            for (const Cloud<T>& cloud : clouds) {
                if (cloud.p_products != nullptr && cloud.n > 0) square = std::max(square, cloud.mean_square(d, c));
            }
            all += square;
            if (square > 0) least = std::min(least, square);
        }
        return least >= kSmallestOfPairs * all / double(d);
    }

    // Sums of g and of g p become integers by a factor each, as large as it can be without overflow.
    void take_units(int k, double most_g, double farthest, double units) {
        const Cloud<T>& cloud = clouds[k];
        const double most_u = std::sqrt(2 * farthest);
        double most_p = cloud.p == cloud.u ? most_u : 0, sum_p = 0;  // the latter to see NaN
        for (int64_t e = 0; cloud.p != cloud.u && e < cloud.n * d; ++e) {
            most_p = std::max(most_p, std::abs(double(cloud.p[e]))), sum_p += std::abs(double(cloud.p[e]));
        }
        const double within = std::abs(slope * w_within[k]) * most_g * double(cloud.n);
        const double across = clouds[1].n > 0 ? std::abs(slope * q.w_xy) * most_g * clouds[1 - k].total_a : 0;
        const auto unit = [](double most) { return std::ldexp(1.0, std::min(1000, 60 - std::ilogb(most))); };
        const double most[2] = {within + across, within * most_p + across * most_u};
        once[k] = cloud.average_h * units <= kFarthestOnce && std::isnormal(most[0]) && std::isnormal(most[1]) &&
                  std::isfinite(sum_p);
        if (once[k]) units_of[k] = {unit(most[0]), unit(most[1])};
    }

    // Forces on rows of a group from their sums [1 + d, lanes].
    void finish(int cloud, int64_t i, const double* sums, int64_t rows, int64_t lanes, const Worker<T>& mine) {
        const Cloud<T>& own = clouds[cloud];
        BEST(finish_forces<T>)(sums, sums + lanes, own.ut + i * d, own.a + i, d, rows, lanes, mine.tiles,
                               forces[cloud] + i * d);
    }

    void visit_rows(int64_t number, Worker<T>& mine) {
        for (const int k : {0, 1}) {
            if (once[k] && !mine.began) std::fill_n(mine.fixed[k], round_up(clouds[k].n, kStep) * (1 + d), int64_t(0));
        }
        mine.began = true;
        const Task& task = tasks[number];
        const Cloud<T>&own = clouds[task.cloud], &other = clouds[1 - task.cloud];
        const auto unit = units_of[task.cloud];
        const bool force = forces[task.cloud] != nullptr;
        const int64_t count = task.i1 - task.i0, part = std::max<int64_t>(kPart / d / kChunk, 1) * kChunk;
        // Sums of group k of targets; of their lanes some may be unused.
        const auto sums = [&](int64_t k) { return mine.sums + k * L * (2 + d); };
        const auto lanes = [&](int64_t k) { return lanes_of<T>(count - k * L); };
        const int64_t groups = round_up(count, L) / L;
        for (int64_t k = 0; force && k < groups; ++k) std::fill_n(sums(k), (2 + d) * lanes(k), 0.0);
        std::fill_n(mine.potential, groups * L, 0.0);
        std::fill_n(mine.energy, L, 0.0);
        // Adds w times the sums over sources j0..j1 to those of the rows, and share times their energy.
        const auto visit = [&](const Cloud<T>& z, int64_t j0, int64_t j1, int64_t own_offset, double w, double share,
                               bool react = false) {
            if (j0 >= j1 || (w == 0 && !(force && z.v != nullptr))) return;
            for (int64_t j = j0; j < j1; j += part) {
                BEST(rows<T>)(kind, force,
                              {own.targets(), z.sources(d, subtract, far), mixture, {w * slope, outer}, task.i0, task.i1, j,
                               std::min(j + part, j1), own_offset,
                               {own.p, own.usual, w * slope * unit.g, w * slope * unit.p,
                                react ? mine.fixed[task.cloud] : nullptr},
                               mine.sums, mine.p_sum, mine.tiles});
                for (int64_t k = 0; k < groups; ++k) {
                    BEST(add_potentials<T>)(sums(k), own.a + task.i0 + k * L, lanes(k), w * outer, share,
                                            mine.potential + k * L, mine.energy);
                }
            }
        };
        const double w = w_within[task.cloud];
        if (full[task.cloud] && !once[task.cloud]) {
            visit(own, 0, own.n, 0, w, 1);
        } else {
            visit(own, task.i0, task.i1, 0, w, 1);
            visit(own, task.i1, own.n, 0, w, 2, once[task.cloud]);
        }
        if (between[task.cloud]) {
            visit(other, 0, other.n, kNowhere, q.w_xy, between[0] && between[1] ? 1 : 2);
        }
        for (int64_t lane = 0; lane < L; ++lane) energies[number] += mine.energy[lane];
        if (potentials[task.cloud] != nullptr) std::copy_n(mine.potential, count, potentials[task.cloud] + task.i0);
        for (int64_t k = 0; force && k < groups; ++k) {
            const int64_t i = task.i0 + k * L;
            const double* const G = sums(k) + lanes(k);
            if (once[task.cloud]) {
                int64_t* const fixed = mine.fixed[task.cloud] + i * (1 + d);
                for (int64_t c = 0; c <= d; ++c) {
                    BEST(add_fixed<double>)(G + c * lanes(k), lanes(k), c == 0 ? unit.g : unit.p, fixed + c * L);
                }
            } else {
                finish(task.cloud, i, G, std::min(L, task.i1 - i), lanes(k), mine);
            }
        }
    }

    // Where pairs were visited once, only when all tasks are done are all sums of a row there.
    void finish_once(const Task& task, const Worker<T>& mine) {
        const int64_t first = task.i0 * (1 + d), size = (1 + d) * kStep;
        int64_t* all = nullptr;
        for (const Worker<T>& worker : workers) {
            if (!worker.began) continue;
            int64_t* const some = worker.fixed[task.cloud] + first;
            for (int64_t e = 0; all != nullptr && e < size; ++e) all[e] += some[e];
            if (all == nullptr) all = some;
        }
        const auto unit = units_of[task.cloud];
        BEST(from_fixed)(all, kStep, 1 / unit.g, mine.sums);
        BEST(from_fixed)(all + kStep, d * kStep, 1 / unit.p, mine.sums + kStep);
        const Cloud<T>& own = clouds[task.cloud];
        if (own.by_pairs && own.pairs[task.i0 / kStep]) {  // of groups before came differences from their usual g
            const double* const before = own.usual_before + task.i0 / kStep * (1 + d);
            for (int64_t e = 0; e < size; ++e) mine.sums[e] += w_within[task.cloud] * slope * before[e / kStep];
        }
        finish(task.cloud, task.i0, mine.sums, task.i1 - task.i0, kStep, mine);
    }

    static constexpr int64_t kNowhere = -(int64_t(1) << 60);

    const PairwiseProblem<T>& q;
    const bool by_median;
    const int64_t d, L = targets_at_once<T>();
    const Radial kind;
    const double v_factor;
    const bool fold_v;  // whether g multiplies p = a u + v_factor v, one RBF being its own slope
    T *const forces[2], *const potentials[2];
    const bool full[2];  // whether rows of a cloud need forces or potentials
    const double w_within[2];
    std::vector<T> rate, weight, weighted_rate;
    double outer, scale, slope;  // outer: the vector code's rbf has no weight
    bool subtract;  // Whether sums are of differences from a usual phi. Of double, which would gain nothing, they are not, nor
                    // of a phi that may change its sign.
    bool may_pair;  // whether forces may be sums of products of pairs
    Cloud<T> clouds[2];
    int64_t n_once[2] = {};  // points of a cloud, if its pairs may be visited once
    int64_t block;           // rows of a task
    std::vector<Worker<T>> workers;
    Workspace workspace;
    double* centre = nullptr;  // [kLine, d], the same in every row

    // The plan
    bool too_wide = false, far = false;
    Quotients<T> quotients;
    Mixture<T> mixture{};
    bool between[2] = {};   // whether rows of a cloud visit the other: full ones do, or if there are none those of x
    bool once[2] = {};
    struct {
        double g, p;
    } units_of[2] = {{1, 1}, {1, 1}};
    std::vector<Task> tasks;
    std::vector<double> energies;
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
    pairwise_by_pairs(exact);
    round(exact.x_force, n * d, q.x_force), round(exact.y_force, m * d, q.y_force);
    round(exact.x_potential, n, q.x_potential), round(exact.y_potential, m, q.y_potential);
}

}  // namespace

template <typename T>
void pairwise_by_pairs(const PairwiseProblem<T>& q) {
    if (Call<T>(q, false).run()) return;
    if constexpr (sizeof(T) == 4) {
        in_double(q);
    } else {
        Call<T>(q, true).run();
    }
}

template void pairwise_by_pairs<float>(const PairwiseProblem<float>&);
template void pairwise_by_pairs<double>(const PairwiseProblem<double>&);

}  // namespace infovae_fast
