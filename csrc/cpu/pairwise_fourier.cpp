// Energy and force by the Fourier series of an RBF, for many points of few coordinates:
//
//     phi(|z - z'|^2) = sum_k c_k cos(omega_k . (z - z')) = sum_r c_r Psi_r(z) Psi_r(z'),
//
// where a Psi is a product over the coordinates of 1, cos(k theta) or sin(k theta), theta = 2 pi (z - middle) / period.
// Then sums over pairs are sums over points, the moments S_r = sum_i a_i Psi_r(z_i):
//
//     E = sum_r c_r (w_xx Sx_r^2 + 2 w_xy Sx_r Sy_r + w_yy Sy_r^2) - phi(0) (w_xx sum a_i^2 + w_yy sum b_j^2)
//     P_i = sum_r c_r (w_xx Sx_r + w_xy Sy_r) Psi_r(x_i) - phi(0) w_xx a_i,     its gradient to x_i is the force
//
// The period leaves the images of a point `kTail` standard deviations of the widest scale away from all others, and
// waves are left out where the narrowest scale's spectrum is as low: the error of phi, in units of phi(0), is 2^-53 for
// double and 1e-12 for float. Everything is computed in double.
//
// A task is a block of points, or for the moments some in a row: the result is the same whichever thread runs it.
#include "pairwise.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "steps.h"
#include "vector.h"

namespace infovae_fast {
namespace {

constexpr int kMostAxes = 3;
constexpr int kLines = 4;            // lines of a bundle
constexpr int64_t kBlock = 256;      // points of a block
constexpr int64_t kStride = kBlock + 8;  // of rows: not a power of two, or they would share a few lines of the cache
constexpr int64_t kFewest = 256;     // points that are worth a look
constexpr int kMostWaves = 512;      // of an axis
constexpr int64_t kMostModes = 1 << 16;
constexpr int64_t kMostSums = 1 << 20;  // moments of all parts
template <typename T>
constexpr double kTail = sizeof(T) == 4 ? 7.4338 : 8.5718;  // sqrt(-2 log error)

// sin(2 pi r) / r and cos(2 pi r) in r^2, |r| <= 1/4: Taylor's coefficients.
constexpr int kTerms = 12;
struct Taylor {
    double c[kTerms];
    constexpr explicit Taylor(int first) : c() {
        const double turn = 6.283185307179586477;
        double term = first == 1 ? turn : 1;
        for (int k = 0; k < kTerms; ++k) {
            c[k] = term;
            term *= -turn * turn / ((2 * k + first + 1) * (2 * k + first + 2));
        }
    }
    constexpr double operator[](int k) const { return c[k]; }
};
constexpr Taylor kSine(1), kCosine(0);

// The rows that lines have in the axes but the last, and their derivatives: `slope` times `turned`.
struct Factors {
    const double *row[kMostAxes - 1][kLines], *turned[kMostAxes - 1][kLines];
    double slope[kMostAxes - 1][kLines];
};

#define VECTOR_CODE "pairwise_fourier.inc"
#include "each_unit.inc"

// Modes that differ in the last axis alone: their rows in the tables of the axes before.
struct Line {
    int row[kMostAxes - 1];
    int rows;  // in the last axis; 0: there is no such line
};
// kLines of them, with as many rows as the longest has.
struct Bundle {
    Line line[kLines];
    int64_t at;  // of its first mode; mode [rows, kLines]
};

struct Axis {
    double middle, frequency;  // 2 pi / period
    int waves;
    std::vector<std::vector<double>> spectrum;  // [scales][waves + 1]: Gaussian, twice where k > 0

    int rows() const { return 2 * waves + 1; }
};
int wave(int row) { return (row + 1) / 2; }
bool is_sine(int row) { return row > 0 && row % 2 == 0; }

template <typename T, int d>
struct Cloud {
    const T *z, *a, *v;
    int64_t n;
    T *force, *potential;
    double w;  // of its pairs
    std::vector<double> low, high;  // [blocks, d]: the range of each
    int64_t parts = 0;              // of its blocks, for the moments
    double* moments = nullptr;      // [parts, charges, modes], then in the first their sums
    double* field = nullptr;        // [modes / kLines, 2, kLines] coefficients of the potential and its last derivative,
    double* carried = nullptr;      // and [d, the same] of what v adds
    double squares = 0;             // sum of a^2

    bool full() const { return n > 0 && (force != nullptr || potential != nullptr); }
    int charges() const { return 1 + (v != nullptr ? d : 0); }
    int64_t blocks() const { return (n + kBlock - 1) / kBlock; }
    int64_t count(int64_t block) const { return std::min(kBlock, n - block * kBlock); }
};

struct Worker {
    double *turns, *charge, *lines, *potential, *slopes, *table[kMostAxes];
};

template <typename T, int d>
class Series {
public:
    explicit Series(const PairwiseProblem<T>& q)
        : q(q),
          clouds{{q.x, q.a, q.x_force == nullptr ? nullptr : q.v, q.n, q.x_force, q.x_potential, q.w_xx},
                 {q.y, q.b, nullptr, q.y == nullptr ? 0 : q.m, q.y_force, q.y_potential, q.w_yy}} {
        for (Cloud<T, d>& cloud : clouds) {
            cloud.low.resize(cloud.blocks() * d), cloud.high.resize(cloud.blocks() * d);
        }
        workers.resize(std::min<int64_t>(at::get_num_threads(), blocks()));
    }

    // Whether it is the cheaper way; the results are there then.
    bool run() {
        Steps<5> steps;
        at::parallel_for(0, int64_t(workers.size()), 1, [&](int64_t begin, int64_t end) {
            for (int64_t k = begin; k < end; ++k) {
                Worker& mine = workers[k];
                Steps<5>::Walk walk(steps);
                each(walk, [&](Cloud<T, d>& cloud) { return cloud.blocks(); },
                     [&](Cloud<T, d>& cloud, int64_t block) { take_range(cloud, block); });
                walk.once([&] { plan(); });
                each(walk, [&](Cloud<T, d>& cloud) { return cloud.parts; },
                     [&](Cloud<T, d>& cloud, int64_t part) { take_moments(cloud, part, mine); });
                walk.once([&] {
                    if (cheaper) combine();
                });
                each(walk, [&](Cloud<T, d>& cloud) { return cheaper && cloud.full() ? cloud.blocks() : 0; },
                     [&](Cloud<T, d>& cloud, int64_t block) { take_field(cloud, block, mine); });
            }
        });
        steps.rethrow();
        return cheaper;
    }

private:
    // A step whose items are some of both clouds.
    template <typename Count, typename F>
    void each(Steps<5>::Walk& walk, const Count& count, const F& f) {
        const int64_t first = count(clouds[0]);
        walk.each(first + count(clouds[1]), [&](int64_t k) {
            k < first ? f(clouds[0], k) : f(clouds[1], k - first);
        });
    }

    int64_t blocks() const { return clouds[0].blocks() + clouds[1].blocks(); }

    void take_range(Cloud<T, d>& cloud, int64_t block) {
        const T* const z = cloud.z + block * kBlock * d;
        for (int c = 0; c < d; ++c) {
            T low = z[c], high = z[c];
            for (int64_t p = 1; p < cloud.count(block); ++p) {
                low = std::min(low, z[p * d + c]), high = std::max(high, z[p * d + c]);
            }
            cloud.low[block * d + c] = double(low), cloud.high[block * d + c] = double(high);
        }
    }

    void plan() {
        const std::vector<double>& lengths = q.radial.bandwidth;
        const auto [narrowest, widest] = std::minmax_element(lengths.begin(), lengths.end());
        highest = kTail<T> / *narrowest;
        double modes_at_most = 1;
        for (int c = 0; c < d; ++c) {
            double low = std::numeric_limits<double>::infinity(), high = -low;
            for (const Cloud<T, d>& cloud : clouds) {
                for (size_t k = c; k < cloud.low.size(); k += d) {
                    low = std::min(low, cloud.low[k]), high = std::max(high, cloud.high[k]);
                }
            }
            const double period = high - low + kTail<T> * *widest, waves = period * highest / 6.283185307179586477;
            modes_at_most *= 2 * waves + 3;
            if (!(waves < kMostWaves && modes_at_most <= 2 * double(kMostModes))) return;  // nor where it is no number
            axes.push_back({low + (high - low) / 2, 6.283185307179586477 / period, int(waves) + 1, {}});
        }
        take_bundles();
        if (modes > kMostModes || cost() > cost_of_pairs()) return;
        cheaper = true;
        for (Axis& axis : axes) {
            for (const double b : lengths) {
                std::vector<double>& spectrum = axis.spectrum.emplace_back();
                for (int k = 0; k <= axis.waves; ++k) {
                    const double x = b * axis.frequency * k;
                    spectrum.push_back((k > 0 ? 2 : 1) * std::exp(-x * x / 2));
                }
            }
        }
        take_coefficients();
        for (Cloud<T, d>& cloud : clouds) {
            const int64_t most = std::max<int64_t>(1, kMostSums / (modes * cloud.charges()));
            cloud.parts = std::min(cloud.blocks(), most);
        }
        Carver memory{nullptr};
        carve(memory);  // to measure
        memory = Carver{workspace.reserve(memory.used)};
        carve(memory);
    }

    // The lines of modes with |omega| <= highest, long ones first.
    void take_bundles() {
        std::vector<Line> lines;
        const Axis& last = axes[d - 1];
        const int most[2] = {d > 1 ? axes[0].rows() : 1, d > 2 ? axes[1].rows() : 1};
        for (int r = 0; r < most[0]; ++r) {
            for (int s = 0; s < most[1]; ++s) {
                double room = highest * highest;
                if (d > 1) room -= square(axes[0].frequency * wave(r));
                if (d > 2) room -= square(axes[1].frequency * wave(s));
                if (room < 0) continue;
                const int waves = std::min(last.waves, int(std::sqrt(room) / last.frequency));
                lines.push_back({{r, s}, 2 * waves + 1});
            }
        }
        std::stable_sort(lines.begin(), lines.end(), [](const Line& a, const Line& b) { return a.rows > b.rows; });
        modes = 0;
        for (size_t k = 0; k < lines.size(); k += kLines) {
            Bundle bundle{{}, modes};
            for (size_t l = 0; l < kLines && k + l < lines.size(); ++l) bundle.line[l] = lines[k + l];
            modes += kLines * bundle.line[0].rows;
            bundles.push_back(bundle);
        }
    }

    // c_r of phi. Each scale's series is phi(0) where its points are the same.
    void take_coefficients() {
        coefficients.assign(modes, 0);
        for (size_t s = 0; s < q.radial.bandwidth.size(); ++s) {
            long double at_zero = 0;  // hundreds of terms, of which every one may round
            std::vector<double> own(modes);
            for_modes([&](const Line& line, int row, int64_t mode) {
                double c = axes[d - 1].spectrum[s][wave(row)];
                bool vanishes = is_sine(row);
                for (int axis = 0; axis < d - 1; ++axis) {
                    c *= axes[axis].spectrum[s][wave(line.row[axis])];
                    vanishes = vanishes || is_sine(line.row[axis]);
                }
                own[mode] = c;
                if (!vanishes) at_zero += c;
            });
            for (int64_t r = 0; r < modes; ++r) coefficients[r] += double(q.radial.weight[s] / at_zero) * own[r];
        }
        phi0 = std::accumulate(q.radial.weight.begin(), q.radial.weight.end(), 0.0);
    }

    template <typename F>
    void for_modes(const F& f) const {
        for (const Bundle& bundle : bundles) {
            for (int l = 0; l < kLines; ++l) {
                for (int row = 0; row < bundle.line[l].rows; ++row) f(bundle.line[l], row, bundle.at + row * kLines + l);
            }
        }
    }

    // Operations on doubles, roughly: of the moments and fields, and of all pairs.
    double cost() const {
        double cost = 0;
        for (const Cloud<T, d>& cloud : clouds) {
            double point = 1.2 * cloud.charges();  // a mode
            if (cloud.full()) point += (cloud.force != nullptr ? 2.0 : 1.0) + 1.0 * (cloud.charges() - 1);
            double rows = 0;
            for (const Axis& axis : axes) rows += axis.rows();
            cost += double(cloud.n) * (point * double(modes) + (cloud.full() ? 2 : 1) * (4 * rows + 100));
        }
        return cost + 10.0 * double(modes);
    }
    double cost_of_pairs() const {
        const double n = double(clouds[0].n), m = double(clouds[1].n), scales = double(q.radial.bandwidth.size());
        const double pair = (sizeof(T) == 4 ? 1 : 3.6) * (2.6 * scales + 0.3 * d);
        const auto within = [&](const Cloud<T, d>& cloud) { return cloud.full() ? 1.0 : q.energy != nullptr ? 0.5 : 0.0; };
        const double between = clouds[0].full() && clouds[1].full() ? 2 : 1;
        return pair * (n * n * within(clouds[0]) + m * m * within(clouds[1]) + n * m * between);
    }

    void carve(Carver& memory) {
        for (Cloud<T, d>& cloud : clouds) {
            cloud.moments = memory.take<double>(cloud.parts * cloud.charges() * modes);
            if (!cloud.full()) continue;
            cloud.field = memory.take<double>(2 * modes);
            cloud.carried = memory.take<double>(2 * modes * (cloud.charges() - 1));
        }
        for (Worker& worker : workers) {
            worker.turns = memory.take<double>(kBlock);
            worker.charge = memory.take<double>(kBlock);
            worker.lines = memory.take<double>(kLines * kStride);
            worker.potential = memory.take<double>((1 + d) * kStride);
            worker.slopes = memory.take<double>(d * kStride);
            for (int c = 0; c < d; ++c) worker.table[c] = memory.take<double>(axes[c].rows() * kStride);
        }
    }

    static double square(double x) { return x * x; }
    static int64_t padded(int64_t count) { return round_up(count, lanes<double>()); }

    void take_tables(const Cloud<T, d>& cloud, int64_t block, Worker& mine) const {
        const int64_t count = cloud.count(block);
        const T* const z = cloud.z + block * kBlock * d;
        for (int c = 0; c < d; ++c) {
            const double factor = axes[c].frequency / 6.283185307179586477;
            for (int64_t p = 0; p < count; ++p) mine.turns[p] = (double(z[p * d + c]) - axes[c].middle) * factor;
            std::fill(mine.turns + count, mine.turns + padded(count), 0.0);
            BEST(waves_of)(mine.turns, padded(count), axes[c].waves, mine.table[c]);
        }
    }

    Factors factors_of(const Bundle& bundle, const Worker& mine) const {
        Factors factors{};
        for (int axis = 0; axis < d - 1; ++axis) {
            for (int l = 0; l < kLines; ++l) {
                const int row = bundle.line[l].row[axis], turned = is_sine(row) ? row - 1 : row > 0 ? row + 1 : 0;
                factors.row[axis][l] = mine.table[axis] + row * kStride;
                factors.turned[axis][l] = mine.table[axis] + turned * kStride;
                factors.slope[axis][l] = (is_sine(row) ? 1 : -1) * wave(row) * axes[axis].frequency;
            }
        }
        return factors;
    }

    void take_moments(Cloud<T, d>& cloud, int64_t part, Worker& mine) const {
        const int64_t begin = cloud.blocks() * part / cloud.parts, end = cloud.blocks() * (part + 1) / cloud.parts;
        double* const moments = cloud.moments + part * cloud.charges() * modes;
        std::fill_n(moments, cloud.charges() * modes, 0.0);
        for (int64_t block = begin; block < end; ++block) {
            const int64_t count = cloud.count(block), first = block * kBlock;
            take_tables(cloud, block, mine);
            for (int k = 0; k < cloud.charges(); ++k) {
                for (int64_t p = 0; p < count; ++p) {
                    mine.charge[p] = k > 0                ? double(cloud.v[(first + p) * d + k - 1])
                                     : cloud.a != nullptr ? double(cloud.a[first + p])
                                                          : 1.0;
                }
                std::fill(mine.charge + count, mine.charge + padded(count), 0.0);
                for (const Bundle& bundle : bundles) {
                    BEST(take_lines<d>)(factors_of(bundle, mine), mine.charge, padded(count), mine.lines);
                    BEST(add_moments)(mine.lines, mine.table[d - 1], padded(count), bundle.line[0].rows,
                                      moments + k * modes + bundle.at);
                }
            }
        }
    }

    void combine() {
        for (Cloud<T, d>& cloud : clouds) {
            const int64_t size = cloud.charges() * modes;
            for (int64_t part = 1; part < cloud.parts; ++part) {
                for (int64_t k = 0; k < size; ++k) cloud.moments[k] += cloud.moments[part * size + k];
            }
            cloud.squares = double(cloud.n);
            if (cloud.a == nullptr) continue;
            cloud.squares = 0;
            for (int64_t p = 0; p < cloud.n; ++p) cloud.squares += square(double(cloud.a[p]));
        }
        const double *const x = clouds[0].moments, *const y = clouds[1].n > 0 ? clouds[1].moments : nullptr;
        if (q.energy != nullptr) {
            long double energy = 0;
            for (int64_t r = 0; r < modes; ++r) {
                double both = q.w_xx * x[r] * x[r];
                if (y != nullptr) both += 2 * q.w_xy * x[r] * y[r] + q.w_yy * y[r] * y[r];
                energy += (long double)(coefficients[r]) * both;
            }
            energy -= phi0 * (q.w_xx * clouds[0].squares + (y != nullptr ? q.w_yy * clouds[1].squares : 0));
            *q.energy = double(energy);
        }
        for (Cloud<T, d>& cloud : clouds) {
            if (!cloud.full()) continue;
            const double *const own = cloud.moments, *const other = &cloud == clouds ? y : x;
            take_field_of([&](int64_t r) { return cloud.w * own[r] + (other != nullptr ? q.w_xy * other[r] : 0); },
                          cloud.field);
            for (int k = 1; k < cloud.charges(); ++k) {
                take_field_of([&](int64_t r) { return own[k * modes + r]; }, cloud.carried + (k - 1) * 2 * modes);
            }
        }
    }

    // The coefficients of sum_r c_r S_r Psi_r and of its derivative to the last coordinate.
    template <typename S>
    void take_field_of(const S& moment, double* field) const {
        std::fill_n(field, 2 * modes, 0.0);
        for_modes([&](const Line&, int row, int64_t mode) {
            // [rows, kLines] in a bundle become [rows, 2, kLines]
            const int64_t l = mode % kLines, at = 2 * (mode - l) + l;
            const double c = coefficients[mode] * moment(mode), k = axes[d - 1].frequency * wave(row);
            field[at] = c;
            if (row > 0) field[at + (is_sine(row) ? -1 : 3) * kLines] = is_sine(row) ? k * c : -k * c;
        });
    }

    void take_field(Cloud<T, d>& cloud, int64_t block, Worker& mine) const {
        const int64_t count = cloud.count(block), first = block * kBlock;
        const bool sloped = cloud.force != nullptr;
        take_tables(cloud, block, mine);
        std::fill_n(mine.potential, (1 + d) * kStride, 0.0);
        std::fill_n(mine.slopes, d * kStride, 0.0);
        for (const Bundle& bundle : bundles) {
            const Factors factors = factors_of(bundle, mine);
            const double* const last = mine.table[d - 1];
            const int rows = bundle.line[0].rows;
            const auto add = sloped ? BEST(add_field<d, true>) : BEST(add_field<d, false>);
            add(factors, last, padded(count), rows, cloud.field + 2 * bundle.at, mine.potential, mine.slopes);
            for (int k = 1; k < cloud.charges(); ++k) {
                BEST(add_field<d, false>)(factors, last, padded(count), rows,
                                       cloud.carried + 2 * ((k - 1) * modes + bundle.at), mine.potential + k * kStride,
                                       nullptr);
            }
        }
        for (int64_t p = 0; p < count; ++p) {
            const double a = cloud.a != nullptr ? double(cloud.a[first + p]) : 1;
            if (cloud.potential != nullptr) cloud.potential[first + p] = T(mine.potential[p] - phi0 * cloud.w * a);
            for (int c = 0; sloped && c < d; ++c) {
                double F = mine.slopes[c * kStride + p];
                if (cloud.v != nullptr) {
                    F += mine.potential[(1 + c) * kStride + p] - phi0 * double(cloud.v[(first + p) * d + c]);
                }
                cloud.force[(first + p) * d + c] = T(a * F);
            }
        }
    }

    const PairwiseProblem<T>& q;
    Cloud<T, d> clouds[2];
    std::vector<Worker> workers;
    Workspace workspace;

    // The plan
    bool cheaper = false;
    double highest = 0, phi0 = 0;  // the highest |omega|
    std::vector<Axis> axes;
    std::vector<Bundle> bundles;
    int64_t modes = 0;
    std::vector<double> coefficients;
};

}  // namespace

template <typename T>
bool pairwise_by_fourier(const PairwiseProblem<T>& q) {
    if (!q.radial.rbf || q.n + (q.y == nullptr ? 0 : q.m) < kFewest) return false;
    return q.d == 1   ? Series<T, 1>(q).run()
           : q.d == 2 ? Series<T, 2>(q).run()
           : q.d == 3 ? Series<T, 3>(q).run()
                      : false;
}

template bool pairwise_by_fourier<float>(const PairwiseProblem<float>&);
template bool pairwise_by_fourier<double>(const PairwiseProblem<double>&);

}  // namespace infovae_fast
