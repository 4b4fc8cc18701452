// The discretised logistic mixture on the CPU. With p and m the edges of a bin, w = p - m and all in units of s,
//
//     P = sigmoid(p) sigmoid(-m) (1 - e^-w) = e^-(max(-p, 0) + max(m, 0)) (1 - e^-w) / ((1 + e^-|p|) (1 + e^-|m|))
//
// so that a component's log P is a sum, of what may be huge, and the logarithm of a factor that is near 1: log w goes
// to the sum where w < 1. The factors stay as they are in the sum over components, and a pixel needs one logarithm.
//
// A block of params, as many pixels as a vector has lanes, stays in the cache and becomes its gradient there.
#include "logistic_mixture.h"

#include <ATen/Parallel.h>

#include <limits>

#include "vector.h"

namespace infovae_fast {
namespace {

constexpr int kOpen = 10000;           // an edge so far away that its sigmoid is 0
constexpr double kNarrowest = 1e-30;   // a width for which (1 - e^-w) / w is 1
constexpr int64_t kBlocksOfThread = 8;  // at least; fewer are not worth waking it

#define VECTOR_CODE "logistic_mixture.inc"
#include "each_unit.inc"

}  // namespace

template <typename T>
void logistic_mixture(const LogisticMixture<T>& given) {
    LogisticMixture<T> q = given;
    if (q.interleaved) q.pixels *= q.n, q.n = 1;  // then a block may have pixels of several images
    const int64_t width = lanes<T>(), rows = (q.channels == 1 ? 3 : 10) * q.k + 2 * q.k + q.channels;
    const int64_t blocks = q.n * ((q.pixels + width - 1) / width);
    const int64_t threads = clamp(blocks / kBlocksOfThread, 1, at::get_num_threads());
    Workspace workspace;
    Carver measure{nullptr};
    const auto carve = [&](Carver& carver) {
        T* const memory = carver.take<T>(threads * rows * width);
        return std::pair{memory, carver.take<T>(q.n * q.pixels)};
    };
    carve(measure);
    Carver carver{workspace.reserve(measure.used)};
    const auto [memory, nll] = carve(carver);
    const auto run = BEST(mixture_blocks<T>);
    at::parallel_for(0, threads, 1, [&, memory = memory, nll = nll](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
            run(q, blocks * k / threads, blocks * (k + 1) / threads, memory + k * rows * width, nll);
        }
    });
    for (int64_t i = 0; i < given.n; ++i) {
        double sum = 0;
        for (int64_t p = 0; p < given.pixels; ++p) sum += double(nll[i * given.pixels + p]);
        given.nll[i] = T(sum);
    }
}

template void logistic_mixture<float>(const LogisticMixture<float>&);
template void logistic_mixture<double>(const LogisticMixture<double>&);

}  // namespace infovae_fast
