// Runs `logistic_mixture` on many problems and compares with the formulas of infovae_fast/logistic_mixture.py, pixel by
// pixel in double.
//
//     logistic_mixture threads        prints the vector unit and how many problems ran; 1 if a result is wrong
#include "logistic_mixture.h"

#include <ATen/Parallel.h>

#include <cstdio>
#include <cstdlib>

#include "values.h"

using namespace infovae_fast;

namespace {

int problems = 0, wrong = 0;

double softplus(double t) { return std::max(t, 0.0) + std::log1p(std::exp(-std::abs(t))); }  // -log sigmoid(-t)
double sigmoid(double t) { return 1 / (1 + std::exp(-t)); }

// Where number j of pixel p of image i lies, of `size` numbers a pixel.
struct Place {
    int64_t pixels;
    bool interleaved;
    size_t operator()(int64_t i, int64_t p, int64_t j, int64_t size) const {
        return interleaved ? (i * pixels + p) * size + j : (i * size + j) * pixels + p;
    }
};

// -log P of a pixel and its gradient to params.
double pixel(int64_t k, int64_t channels, int64_t levels, const Values& params, const Values& x, Values& gradient) {
    const double last = double(levels - 1);
    Values y(channels), log_p(k), weight(k), slope(params.size(), 0.0);
    for (int64_t c = 0; c < channels; ++c) y[c] = 2 * std::nearbyint(x[c] * last) / last - 1;
    const auto row = [&](int64_t c, int64_t kind, int64_t m) { return k * (1 + (channels == 1 ? 2 : 3) * c + kind) + m; };
    double most = -INFINITY;
    for (int64_t m = 0; m < k; ++m) most = std::max(most, params[m]);
    double total = 0, best = -INFINITY;
    for (int64_t m = 0; m < k; ++m) total += weight[m] = std::exp(params[m] - most);
    for (int64_t m = 0; m < k; ++m) {
        weight[m] /= total;
        log_p[m] = std::log(weight[m]);
        for (int64_t c = 0; c < channels; ++c) {
            double mean = params[row(c, 0, m)];
            for (int64_t e = 0; e < c; ++e) mean += std::tanh(params[row(c == 1 ? 0 : 1 + e, 2, m)]) * y[e];
            const double log_s = params[row(c, 1, m)], s = std::exp(log_s);
            const double p = (y[c] + 1 / last - mean) / s, q = (y[c] - 1 / last - mean) / s, w = 2 / (last * s);
            const bool first = y[c] < -1 + 0.5 / last, end = y[c] > 1 - 0.5 / last;
            double to_mean = 0, to_log_s = 0;
            if (!end) log_p[m] -= softplus(-p), to_mean += sigmoid(-p) / s, to_log_s += p * sigmoid(-p);
            if (!first) log_p[m] -= softplus(q), to_mean -= sigmoid(q) / s, to_log_s -= q * sigmoid(q);
            if (!first && !end) log_p[m] += std::log(-std::expm1(-w)), to_log_s += w > 700 ? 0 : w / std::expm1(w);
            slope[row(c, 0, m)] = to_mean, slope[row(c, 1, m)] = to_log_s;
            for (int64_t e = 0; e < c; ++e) {
                const int64_t at = row(c == 1 ? 0 : 1 + e, 2, m);
                const double t = std::tanh(params[at]);
                slope[at] = to_mean * (1 - t * t) * y[e];
            }
        }
        best = std::max(best, log_p[m]);
    }
    double sum = 0;
    for (int64_t m = 0; m < k; ++m) sum += std::exp(log_p[m] - best);
    gradient.assign(params.size(), 0.0);
    for (int64_t m = 0; m < k; ++m) {
        const double share = std::exp(log_p[m] - best) / sum;
        for (size_t at = m; at < params.size(); at += k) gradient[at] = share * slope[at];
        gradient[m] = weight[m] - share;
    }
    return -best - std::log(sum);
}

template <typename T>
void run(Random& random, int64_t n, int64_t pixels, int64_t k, int64_t channels, int64_t levels) {
    const Place place{pixels, random() % 2 == 0};
    const int64_t rows = (channels == 1 ? 3 : 10) * k;
    Values params = normal(random, n * pixels * rows), x(n * pixels * channels);
    for (double& v : x) v = double(random() % levels) / double(levels - 1);
    for (int64_t i = 0; i < n; ++i) {  // logistics from a fraction of a bin to far wider than all
        for (int64_t p = 0; p < pixels; ++p) {
            for (int64_t c = 0; c < channels; ++c) {
                for (int64_t m = 0; m < k; ++m) {
                    params[place(i, p, k * (2 + (channels == 1 ? 2 : 3) * c) + m, rows)] *= 2;
                }
            }
        }
    }
    Values nll(n, 0.0), gradient(params.size()), size(params.size()), one(rows), here(rows), colours(channels);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t p = 0; p < pixels; ++p) {
            for (int64_t j = 0; j < rows; ++j) one[j] = params[place(i, p, j, rows)];
            for (int64_t c = 0; c < channels; ++c) colours[c] = x[place(i, p, c, channels)];
            nll[i] += pixel(k, channels, levels, one, colours, here);
            double most = 1;
            for (const double g : here) most = std::max(most, std::abs(g));
            for (int64_t j = 0; j < rows; ++j) {
                gradient[place(i, p, j, rows)] = here[j], size[place(i, p, j, rows)] = most;
            }
        }
    }
    const Array<T> in(params), image(x), out(n, true), slopes(params.size(), random() % 4 > 0);
    logistic_mixture<T>({n, pixels, k, channels, levels, place.interleaved, in, image, slopes, out});
    const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
    int64_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad += !(std::abs(out[i] - nll[i]) <= tolerance * (double(pixels) + std::abs(nll[i])));
    for (size_t at = 0; slopes != nullptr && at < params.size(); ++at) {
        bad += !(std::abs(slopes[at] - gradient[at]) <= tolerance * size[at]);
    }
    if (bad > 0) {
        std::fprintf(stderr, "%d bytes, n %d, pixels %d, k %d, channels %d, levels %d, interleaved %d: %d wrong\n",
                     int(sizeof(T)), int(n), int(pixels), int(k), int(channels), int(levels), place.interleaved, int(bad));
        ++wrong;
    }
    ++problems;
}

}  // namespace

int main(int, char** arguments) {
    at::threads = std::atoi(arguments[1]);
    Random random(1);
    const int64_t levels[] = {2, 3, 16, 256};
    for (int trial = 0; trial < 200; ++trial) {
        const int64_t n = int64_t(1 + random() % 4), pixels = int64_t(trial % 8 == 0 ? 300 : 1 + random() % 40);
        const int64_t k = int64_t(1 + random() % 11), channels = random() % 2 ? 1 : 3, l = levels[random() % 4];
        run<float>(random, n, pixels, k, channels, l);
        run<double>(random, n, pixels, k, channels, l);
    }
    return report(problems, wrong);
}
