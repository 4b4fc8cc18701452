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
// waves are left out where the narrowest scale's spectrum is as low. Everything is computed in double: what a pair gives
// is off by about 1e-12 phi(0) for float, 1e-15 phi(0) for double. So pairs whose phi is much less than phi(0) are not
// for a series, nor forces in a cloud that is a point beside the kernel.
//
// A task is a block of points, or for the moments some in a row: the result is the same whichever thread runs it.
#include "pairwise.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "steps.h"
#include "vector.h"

namespace infovae_fast {
namespace {

constexpr int kMostAxes = 3;
constexpr int kLines = 4;                // lines of a bundle
constexpr int kRow = 16;                 // points whose range is taken as one
constexpr int64_t kBlock = 256;          // points of a block
constexpr int64_t kStride = kBlock + 8;  // of rows: not a power of two, or they would share a few lines of the cache
constexpr int64_t kFewest = 256;         // points that are worth a look
constexpr int kMostWaves = 512;          // of an axis
constexpr int64_t kMostModes = 1 << 17;
constexpr int64_t kMostSums = 1 << 20;   // moments of all parts
template <typename T>
constexpr bool kDouble = sizeof(T) == 8;
template <typename T>
constexpr double kTail = kDouble<T> ? 8.8 : 7.6;
template <typename T>
constexpr double kLeastMean = kDouble<T> ? 1.0 / 8 : 1.0 / 4096;  // see `are_near`
template <typename T>
constexpr double kLeastExtent = kDouble<T> ? 0.25 : 1e-5;  // of a cloud that forces are wanted in, by the widest scale

// sin(2 pi r) / r and cos(2 pi r) in r^2, |r| <= 1/4: Taylor's coefficients.
constexpr double kTurn = 6.283185307179586477;  // 2 pi
constexpr int kTerms = 12;
struct Taylor {
    double c[kTerms];
    constexpr explicit Taylor(int first) : c() {
        double term = first == 1 ? kTurn : 1;
        for (int k = 0; k < kTerms; ++k) {
            c[k] = term;
            term *= -kTurn * kTurn / ((2 * k + first + 1) * (2 * k + first + 2));
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
    double middle, turns;  // the latter a unit of length
    double most_waves;
    int waves;
    std::vector<std::vector<double>> spectrum;  // [scales][waves + 1]: Gaussian, twice where k > 0

    int rows() const { return 2 * waves + 1; }
    double frequency() const { return kTurn * turns; }
};
int wave(int row) { return (row + 1) / 2; }
bool is_sine(int row) { return row > 0 && row % 2 == 0; }

template <typename T, int d>
struct Cloud {
    const T *z, *a, *v;
    int64_t n;
    T *force, *potential;
    double w;  // of its pairs
    int64_t parts = 0;              // of its blocks, for the moments
    double* moments = nullptr;      // [parts, charges, modes], then in the first their sums
    double* field = nullptr;        // [modes / kLines, 2, kLines] coefficients of the potential and its last derivative,
    double* carried = nullptr;      // and [d, the same] of what v adds
    double sum = 0, squares = 0;    // of a, of a^2

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
        plan();
    }

    // Whether a series is cheaper and right; the results are there then.
    bool run() {
        if (!fits) return false;
        Steps<3> steps;
        at::parallel_for(0, int64_t(workers.size()), 1, [&](int64_t begin, int64_t end) {
            for (int64_t k = begin; k < end; ++k) {
                Worker& mine = workers[k];
                Steps<3>::Walk walk(steps);
                each(walk, [&](Cloud<T, d>& cloud) { return cloud.parts; },
                     [&](Cloud<T, d>& cloud, int64_t part) { take_moments(cloud, part, mine); });
                walk.once([&] { combine(); });
                each(walk, [&](Cloud<T, d>& cloud) { return fits && cloud.full() ? cloud.blocks() : 0; },
                     [&](Cloud<T, d>& cloud, int64_t block) { take_field(cloud, block, mine); });
            }
        });
        steps.rethrow();
        return fits;
    }

private:
    // A step whose items are some of both clouds.
    template <typename Count, typename F>
    void each(Steps<3>::Walk& walk, const Count& count, const F& f) {
        const int64_t first = count(clouds[0]);
        walk.each(first + count(clouds[1]), [&](int64_t k) {
            k < first ? f(clouds[0], k) : f(clouds[1], k - first);
        });
    }

    void plan() {
        const std::vector<double>& lengths = q.radial.bandwidth;
        const auto [narrowest, widest] = std::minmax_element(lengths.begin(), lengths.end());
        for (const double weight : q.radial.weight) {
            if (!(weight >= 0)) return;  // then no mean tells how much of the terms is left in their sum
        }
        if (!take_axes(*narrowest, *widest)) return;
        double about = 0.5;  // in three dimensions a ball has pi / 6 of its cube
        for (const Axis& axis : axes) about *= 2 * axis.most_waves;
        if (about > double(kMostModes) || cost(about) > cost_of_pairs()) return;
        take_bundles();
        if (modes > kMostModes || cost(double(modes)) > cost_of_pairs() || !take_sums_of_weights()) return;
        fits = true;
        for (Axis& axis : axes) {
            for (const double b : lengths) {
                std::vector<double>& spectrum = axis.spectrum.emplace_back();
                for (int k = 0; k <= axis.waves; ++k) {
                    const double x = b * axis.frequency() * k;
                    spectrum.push_back((k > 0 ? 2 : 1) * std::exp(-x * x / 2));
                }
            }
        }
        take_coefficients();
        for (Cloud<T, d>& cloud : clouds) {
            const int64_t most = std::max<int64_t>(1, kMostSums / (modes * cloud.charges()));
            cloud.parts = std::min(cloud.blocks(), most);
        }
        workers.resize(std::min<int64_t>(at::get_num_threads(), clouds[0].blocks() + clouds[1].blocks()));
        Carver memory{nullptr};
        carve(memory);  // to measure
        memory = Carver{workspace.reserve(memory.used)};
        carve(memory);
    }

    // Whether the points are numbers that a series can take.
    bool take_axes(double narrowest, double widest) {
        T low[kRow * d], high[kRow * d], zero[kRow * d] = {};
        for (int e = 0; e < kRow * d; ++e) low[e] = high[e] = q.x[e % d];
        for (const Cloud<T, d>& cloud : clouds) BEST(take_range<T>)(cloud.z, cloud.n, d, low, high, zero);
        for (int c = 0; c < d; ++c) {
            for (int e = c + d; e < kRow * d; e += d) {
                low[c] = std::min(low[c], low[e]), high[c] = std::max(high[c], high[e]), zero[c] += zero[e];
            }
            const double from = double(low[c]), to = double(high[c]), period = to - from + kTail<T> * widest;
            const double most_waves = kTail<T> / kTurn * (period / narrowest);
            const bool usual = zero[c] == 0 && std::isnormal(period) && std::isnormal(1 / period);
            if (!usual || !(most_waves < kMostWaves)) return false;
            axes.push_back({from + (to - from) / 2, 1 / period, most_waves, int(most_waves), {}});
            extent = std::max(extent, to - from);
        }
        return (clouds[0].force == nullptr && clouds[1].force == nullptr) || extent >= kLeastExtent<T> * widest;
    }

    // Whether weights of points are none or at least 0.
    bool take_sums_of_weights() {
        for (Cloud<T, d>& cloud : clouds) {
            cloud.sum = cloud.squares = double(cloud.n);
            if (cloud.a == nullptr) continue;
            cloud.sum = cloud.squares = 0;
            for (int64_t p = 0; p < cloud.n; ++p) {
                if (!(cloud.a[p] >= 0)) return false;
                cloud.sum += double(cloud.a[p]), cloud.squares += square(double(cloud.a[p]));
            }
        }
        return true;
    }

    // The lines of modes in the ball, long ones first.
    void take_bundles() {
        std::vector<Line> lines;
        const Axis& last = axes[d - 1];
        const int most[2] = {d > 1 ? axes[0].rows() : 1, d > 2 ? axes[1].rows() : 1};
        for (int r = 0; r < most[0]; ++r) {
            for (int s = 0; s < most[1]; ++s) {
                double room = 1;
                if (d > 1) room -= square(wave(r) / axes[0].most_waves);
                if (d > 2) room -= square(wave(s) / axes[1].most_waves);
                if (room < 0) continue;
                const int waves = int(std::sqrt(room) * last.most_waves);
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
            long double at_zero = 0;
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
    double cost(double modes) const {
        double cost = 0;
        for (const Cloud<T, d>& cloud : clouds) {
            double point = 1.2 * cloud.charges();  // a mode
            if (cloud.full()) point += (cloud.force != nullptr ? 2.0 : 1.0) + 1.0 * (cloud.charges() - 1);
            double rows = 0;
            for (const Axis& axis : axes) rows += axis.rows();
            cost += double(cloud.n) * (point * modes + (cloud.full() ? 2 : 1) * (4 * rows + 100));
        }
        return cost + 10.0 * modes;
    }
    double cost_of_pairs() const {
        const double n = double(clouds[0].n), m = double(clouds[1].n), scales = double(q.radial.bandwidth.size());
        const double pair = (kDouble<T> ? 3.6 : 1) * (kUnit == Unit::avx2 ? 0.85 : 1) * (2.6 * scales + 0.3 * d);
        const auto within = [&](const Cloud<T, d>& cloud) {
            if (cloud.w == 0 && cloud.v == nullptr) return 0.0;
            return cloud.full() ? 1.0 : q.energy != nullptr ? 0.5 : 0.0;
        };
        const double between = q.w_xy == 0 ? 0 : clouds[0].full() && clouds[1].full() ? 2 : 1;
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
            for (int64_t p = 0; p < count; ++p) mine.turns[p] = (double(z[p * d + c]) - axes[c].middle) * axes[c].turns;
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
                factors.slope[axis][l] = (is_sine(row) ? 1 : -1) * wave(row) * axes[axis].frequency();
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
        }
        const double *const x = clouds[0].moments, *const y = clouds[1].n > 0 ? clouds[1].moments : nullptr;
        long double xx = 0, xy = 0, yy = 0;  // sums of c_r S_r^2: hundreds of terms, of which every one may round
        for (int64_t r = 0; r < modes; ++r) {
            const long double c = coefficients[r];
            xx += c * (x[r] * x[r]);
            if (y != nullptr) xy += c * (x[r] * y[r]), yy += c * (y[r] * y[r]);
        }
        xx -= phi0 * clouds[0].squares, yy -= phi0 * (y != nullptr ? clouds[1].squares : 0);
        fits = are_near(double(xx), double(xy), double(yy));
        if (!fits) return;
        if (q.energy != nullptr) *q.energy = double(q.w_xx * xx + 2 * q.w_xy * xy + q.w_yy * yy);
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

    // Whether the mean phi of the pairs of each result, given their sums, is not too small beside phi(0). It may be the
    // smaller the larger the cloud is: to round its coordinates would change phi as much.
    bool are_near(double xx, double xy, double yy) const {
        const double narrowest = *std::min_element(q.radial.bandwidth.begin(), q.radial.bandwidth.end());
        const double least = kLeastMean<T> * phi0 / (1 + square(extent / narrowest) / 8);
        const double a = clouds[0].sum, b = clouds[1].n > 0 ? clouds[1].sum : 0;
        const auto near = [&](double w_xx, double w_xy, double w_yy) {
            const double sum = std::abs(w_xx) * xx + std::abs(w_xy) * xy + std::abs(w_yy) * yy;
            const double all = std::abs(w_xx) * a * a + std::abs(w_xy) * a * b + std::abs(w_yy) * b * b;
            return !(sum < least * all);
        };
        return (q.energy == nullptr || near(q.w_xx, 2 * q.w_xy, q.w_yy)) &&
               (!clouds[0].full() || near(q.w_xx, q.w_xy, 0)) && (clouds[0].v == nullptr || near(1, 0, 0)) &&
               (!clouds[1].full() || near(0, q.w_xy, q.w_yy));
    }

    // The coefficients of sum_r c_r S_r Psi_r and of its derivative to the last coordinate.
    template <typename S>
    void take_field_of(const S& moment, double* field) const {
        std::fill_n(field, 2 * modes, 0.0);
        for_modes([&](const Line&, int row, int64_t mode) {
            // [rows, kLines] in a bundle become [rows, 2, kLines]
            const int64_t l = mode % kLines, at = 2 * (mode - l) + l;
            const double c = coefficients[mode] * moment(mode), k = axes[d - 1].frequency() * wave(row);
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
                const double* const carried = cloud.carried + 2 * ((k - 1) * modes + bundle.at);
                BEST(add_field<d, false>)
                (factors, last, padded(count), rows, carried, mine.potential + k * kStride, nullptr);
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
    bool fits = false;
    double extent = 0, phi0 = 0;
    std::vector<Axis> axes;
    std::vector<Bundle> bundles;
    int64_t modes = 0;
    std::vector<double> coefficients;
};

}  // namespace

template <typename T>
bool pairwise_by_fourier(const PairwiseProblem<T>& q) {
    if (!q.radial.rbf || q.n == 0 || q.n + (q.y == nullptr ? 0 : q.m) < kFewest) return false;
    return q.d == 1   ? Series<T, 1>(q).run()
           : q.d == 2 ? Series<T, 2>(q).run()
           : q.d == 3 ? Series<T, 3>(q).run()
                      : false;
}

template bool pairwise_by_fourier<float>(const PairwiseProblem<float>&);
template bool pairwise_by_fourier<double>(const PairwiseProblem<double>&);

}  // namespace infovae_fast
