// The CUDA kernels of `pairwise` alone, without PyTorch, as CUDA graphs: JSON rows of the time of an MMD (unbiased) and its
// gradient to x, or of a Stein direction (D = 64), and how far they are from sums in double.
//
//     nvcc -std=c++17 -O3 -Icsrc -arch=native benchmarks/pairwise_alone.cu csrc/cuda/pairwise*.cu -o build/pairwise_alone
//     build/pairwise_alone [commit] >> benchmarks/results/NAME.jsonl
//     compute-sanitizer build/pairwise_alone check 1100                     # with 1,100 points, nothing timed
//
// The value is compared up to N = 4,096, and the gradient of eight points always. A wrong result ends the program.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "alone.h"
#include "pairwise.h"

using namespace infovae_fast;

namespace {

constexpr double kLargestError = 1e-5;  // of the gradient, relative to its largest component, and of the value
constexpr int kValueMost = 4096;

struct Cloud {
    int n, d;
    std::vector<float> at;
    float* on_gpu = nullptr;

    Cloud(int n, int d, std::mt19937& random) : n(n), d(d), at(size_t(n) * d) {
        std::normal_distribution<float> normal;
        for (float& x : at) x = normal(random);
        check(cudaMalloc(&on_gpu, at.size() * sizeof(float)));
        check(cudaMemcpy(on_gpu, at.data(), at.size() * sizeof(float), cudaMemcpyHostToDevice));
    }
    ~Cloud() { cudaFree(on_gpu); }
    const float* point(int k) const { return at.data() + size_t(k) * d; }
};

struct Kernel {
    double phi, slope;  // slope = -2 phi'
};
Kernel kernel(const RadialMixture& r, const float* a, const float* b, int d) {
    double square = 0;
    for (int c = 0; c < d; ++c) square += (double(a[c]) - b[c]) * (double(a[c]) - b[c]);
    Kernel k{0, 0};
    for (size_t s = 0; s < r.weight.size(); ++s) {
        const double rate = 1 / (r.bandwidth[s] * r.bandwidth[s]), t = square * rate / 2;
        const double phi = r.weight[s] * (r.rbf ? std::exp(-t) : 1 / (1 + t));
        k.phi += phi, k.slope += rate * (r.rbf ? phi : phi / (1 + t));
    }
    return k;
}

// The largest error of eight rows of the force, relative to their largest component.
double force_error(const PairwiseProblem<float>& q, const Cloud& x, const Cloud& y, const Cloud& v, const std::vector<float>& f) {
    double error = 0, largest = 0;
    for (int i = 0; i < x.n; i += std::max(1, x.n / 8)) {
        std::vector<double> sum(x.d, 0.0);
        for (const Cloud* z : {&x, &y}) {
            if (z == &y && q.y == nullptr) continue;
            const double w = z == &x ? q.w_xx : q.w_xy;
            for (int j = 0; j < z->n; ++j) {
                if (z == &x && j == i) continue;
                const Kernel k = kernel(q.radial, x.point(i), z->point(j), x.d);
                for (int c = 0; c < x.d; ++c) {
                    sum[c] += w * k.slope * (double(z->point(j)[c]) - x.point(i)[c]);
                    if (q.v != nullptr) sum[c] += k.phi * double(v.point(j)[c]);
                }
            }
        }
        for (int c = 0; c < x.d; ++c) {
            const double off = std::fabs(sum[c] - f[size_t(i) * x.d + c]);
            if (!(off <= error)) error = off;  // NaN stays
            largest = std::max(largest, std::fabs(sum[c]));
        }
    }
    return error / largest;
}

double energy(const PairwiseProblem<float>& q, const Cloud& x, const Cloud& y) {
    const int threads = int(std::max(1u, std::thread::hardware_concurrency()));
    std::vector<double> sums(threads, 0.0);
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t) {
        team.emplace_back([&, t] {
            for (int i = t; i < x.n; i += threads) {
                for (int j = 0; j < x.n; ++j) {
                    if (i != j) sums[t] += q.w_xx * kernel(q.radial, x.point(i), x.point(j), x.d).phi;
                    if (i != j) sums[t] += q.w_yy * kernel(q.radial, y.point(i), y.point(j), x.d).phi;
                    sums[t] += 2 * q.w_xy * kernel(q.radial, x.point(i), y.point(j), x.d).phi;
                }
            }
        });
    }
    for (std::thread& one : team) one.join();
    double sum = 0;
    for (double one : sums) sum += one;
    return sum;
}

struct Case {
    const char* what;
    int n, d;
};
constexpr Case kCases[] = {{"rbf", 256, 2},      {"rbf", 256, 10},    {"rbf", 256, 80},   {"rbf", 1024, 10},  {"rbf", 1024, 80},
                           {"rbf", 4096, 10},    {"rbf", 4096, 80},   {"rbf", 16384, 10}, {"rbf", 16384, 32}, {"rbf", 16384, 64},
                           {"rbf", 16384, 80},   {"rbf", 65536, 10},  {"imq", 16384, 10}, {"imq7", 16384, 2}, {"imq7", 16384, 10},
                           {"imq7", 16384, 32},  {"stein", 16384, 64}};

void run(const Case& one, bool time, const char* commit) {
    const int n = one.n, d = one.d;
    const std::string what = one.what;
    const bool stein = what == "stein";
    std::mt19937 random(1);
    const Cloud x(n, d, random), y(n, d, random), v(n, d, random);
    const double b = std::sqrt(d / 2.0);
    RadialMixture radial{what == "rbf" || stein, {b}, {1.0}, 1.0};
    if (what == "imq7") {
        radial.bandwidth.clear(), radial.weight.assign(7, 1.0);
        for (double s : {0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0}) radial.bandwidth.push_back(b * std::sqrt(s));
    }
    const double within = 1.0 / n / (n - 1), between = -1.0 / n / n;
    float* force;
    double* value;
    void* workspace;
    check(cudaMalloc(&force, x.at.size() * sizeof(float))), check(cudaMalloc(&value, sizeof(double)));
    const PairwiseProblem<float> q{x.on_gpu, stein ? nullptr : y.on_gpu, stein ? v.on_gpu : nullptr, nullptr, nullptr, n,
                                   stein ? 0 : n, d, radial, within, stein ? 0 : between, stein ? 0 : within,
                                   stein ? nullptr : value, force, nullptr, nullptr, nullptr};
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0));
    const int processors = device.multiProcessorCount;
    check(cudaMalloc(&workspace, pairwise_cuda_workspace(q, 1, processors)));

    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    const auto call = [&] {
        const char* error = pairwise_cuda(q, 1, nullptr, workspace, processors, stream);
        check(error);
    };
    check(cudaStreamCreate(&stream));
    call();
    check(cudaStreamSynchronize(stream));
    std::vector<float> times;
    const int rounds = 15, calls = n <= 4096 ? 20 : 1;
    if (time) {
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        call();
        check(cudaStreamEndCapture(stream, &graph)), check(cudaGraphInstantiate(&replay, graph, 0));
        cudaEvent_t start, end;
        check(cudaEventCreate(&start)), check(cudaEventCreate(&end));
        for (int k = 0; k < rounds; ++k) {
            check(cudaEventRecord(start, stream));
            for (int i = 0; i < calls; ++i) check(cudaGraphLaunch(replay, stream));
            check(cudaEventRecord(end, stream)), check(cudaEventSynchronize(end));
            float milliseconds;
            check(cudaEventElapsedTime(&milliseconds, start, end));
            times.push_back(milliseconds * 1e-3f / calls);
        }
        std::sort(times.begin(), times.end());
        cudaGraphExecDestroy(replay), cudaGraphDestroy(graph);
    }

    std::vector<float> found(x.at.size());
    double found_value = 0;
    check(cudaMemcpy(found.data(), force, found.size() * sizeof(float), cudaMemcpyDeviceToHost));
    check(cudaMemcpy(&found_value, value, sizeof(double), cudaMemcpyDeviceToHost));
    const bool knows_value = !stein && n <= kValueMost;
    const double error = force_error(q, x, y, v, found), truth = knows_value ? energy(q, x, y) : 0;
    // The value happens to be near 0 at times: 1 / N is about its standard deviation.
    const double value_error = knows_value ? std::fabs(found_value - truth) / std::max(std::fabs(truth), 1.0 / n) : 0;
    const bool finite = std::all_of(found.begin(), found.end(), [](float f) { return std::isfinite(f); });
    if (!(finite && error < kLargestError && value_error < kLargestError)) {
        std::fprintf(stderr, "%s, N = %d, D = %d: errors %.1e and %.1e\n", one.what, n, d, error, value_error);
        std::exit(1);
    }
    if (!time) {
        std::printf("%s, D = %d: error %.1e, of the value %.1e\n", one.what, d, error, value_error);
    } else {
        std::printf("{\"op\": \"pairwise\", \"what\": \"%s\", \"n\": %d, \"d\": %d, \"gradient\": true, \"dtype\": \"float32\", ",
                    one.what, n, d);
        std::printf("\"implementation\": \"infovae_fast alone\", \"median_s\": %.4e, \"p20_s\": %.4e, \"p80_s\": %.4e, \"rounds\": %d, ",
                    times[rounds / 2], times[rounds / 5], times[rounds - 1 - rounds / 5], rounds);
        std::printf("\"error\": %.2e, ", error);
        if (knows_value) std::printf("\"value_error\": %.2e, ", value_error);
        std::printf("\"device\": \"%s\", \"cuda\": \"%d.%d\", \"commit\": \"%s\"}\n", device.name, CUDART_VERSION / 1000,
                    CUDART_VERSION % 1000 / 10, commit);
    }
    std::fflush(stdout);
    cudaFree(force), cudaFree(value), cudaFree(workspace);
    cudaStreamDestroy(stream);
}

}  // namespace

int main(int count, char** arguments) {
    const int n = checked(count, arguments);
    for (const Case& one : kCases) {
        if (n == 0) run(one, true, count > 1 ? arguments[1] : "unknown");
        if (n > 0 && (one.n <= 1024 || one.n == 16384)) run({one.what, n, one.d}, false, "");
    }
}
