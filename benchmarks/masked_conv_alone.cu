// The CUDA kernels of `masked_conv` alone, without PyTorch, as CUDA graphs: JSON rows of the time of the layers of R64 and
// of the paper's network at 28x28, batch 128, and how far they are from sums in double.
//
//     nvcc -std=c++17 -O3 -Icsrc -arch=native benchmarks/masked_conv_alone.cu csrc/cuda/masked_conv.cu -o build/conv_alone
//     build/conv_alone [commit] >> benchmarks/results/NAME.jsonl
//     compute-sanitizer build/conv_alone check 4                            # with 4 images, nothing timed
//
// Some numbers of every result are compared; a wrong one ends the program.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "alone.h"
#include "masked_conv.h"

using namespace infovae_fast;
using Half = __nv_bfloat16;

namespace {

constexpr int kSide = 28, kSize = kSide * kSide, kBatch = 128;

float number(float x) { return x; }
float number(Half x) { return __bfloat162float(x); }
template <typename T>
T rounded(float x) {
    if constexpr (std::is_same_v<T, float>) return x;
    else return __float2bfloat16_rn(x);
}

template <typename T>
struct Array {  // on the GPU, and a copy here
    std::vector<T> here;
    T* there = nullptr;

    explicit Array(size_t size) : here(size) {
        if (size > 0) check(cudaMalloc(reinterpret_cast<void**>(&there), size * sizeof(T)));
    }
    Array(size_t size, float scale, std::mt19937& random) : Array(size) {
        std::normal_distribution<float> normal;
        for (T& x : here) x = rounded<T>(scale * normal(random));
        if (size > 0) check(cudaMemcpy(there, here.data(), size * sizeof(T), cudaMemcpyHostToDevice));
    }
    ~Array() { cudaFree(there); }
    void fetch() {
        if (!here.empty()) check(cudaMemcpy(here.data(), there, here.size() * sizeof(T), cudaMemcpyDeviceToHost));
    }
    double operator[](size_t k) const { return number(here[k]); }
};

// The largest error of some numbers of a result, relative to the largest of them.
class Errors {
public:
    void compare(double found, double truth) {
        const double off = std::fabs(found - truth);
        compared_ = true;
        if (!(off <= off_)) off_ = off;  // NaN stays
        largest_ = std::max(largest_, std::fabs(truth));
    }
    double relative() const { return compared_ ? off_ / largest_ : 0; }

private:
    bool compared_ = false;
    double off_ = 0, largest_ = 0;
};

struct Case {
    const char* what;
    int cin, cout, links;
    bool gated;
    std::vector<Tap> taps;
};

std::vector<Tap> window(int reach, bool row_alone) {  // of V, or of H
    std::vector<Tap> taps;
    for (int dy = row_alone ? 0 : -reach; dy <= 0; ++dy) {
        for (int dx = -reach; dx <= (row_alone ? 0 : reach); ++dx) taps.push_back({dy, dx});
    }
    return taps;
}

double timed(const std::function<void(cudaStream_t)>& call, std::vector<double>& times) {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    cudaEvent_t start, end;
    check(cudaStreamCreate(&stream)), check(cudaEventCreate(&start)), check(cudaEventCreate(&end));
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    constexpr int kCalls = 5;
    for (int k = 0; k < kCalls; ++k) call(stream);
    check(cudaStreamEndCapture(stream, &graph)), check(cudaGraphInstantiate(&replay, graph, 0));
    times.clear();
    for (int k = 0; k < 15; ++k) {
        check(cudaEventRecord(start, stream)), check(cudaGraphLaunch(replay, stream));
        check(cudaEventRecord(end, stream)), check(cudaEventSynchronize(end));
        float milliseconds;
        check(cudaEventElapsedTime(&milliseconds, start, end));
        times.push_back(milliseconds * 1e-3 / kCalls);
    }
    cudaGraphExecDestroy(replay), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

template <typename T>
void run(const Case& one, int n, bool time, const char* commit) {
    constexpr bool half_precision = !std::is_same_v<T, float>;
    constexpr double most = half_precision ? 2e-2 : 1e-5;
    const Number number = half_precision ? Number::bfloat16 : Number::float32;
    const Gate gate = one.gated ? Gate::tanh : Gate::none;
    const size_t pixels = size_t(n) * kSize, cin = one.cin, cout = one.cout, links = one.links, taps = one.taps.size();
    const size_t width = one.gated ? cout / 2 : cout;
    const MaskedConv conv{n, kSide, kSide, one.cin, one.cout, one.taps, {}, one.gated};
    std::mt19937 random(1);
    const float scale = 1 / std::sqrt(float(taps * cin + links));
    Array<T> x(pixels * cin, 1, random), weight(taps * cin * cout, scale, random), bias(cout, 0.1f, random);
    Array<T> condition(one.gated ? n * cout : 0, 0.1f, random), values(pixels * links, 1, random);
    Array<T> link_weight(links * cout, scale, random), g(pixels * width, 1, random);
    Array<T> out(pixels * width), f(one.gated ? pixels * cout : 0), to_x(pixels * cin), to_weight(taps * cin * cout);
    Array<T> to_bias(cout), to_condition(condition.here.size()), to_values(pixels * links), to_link_weight(links * cout);
    const Link<void> link{values.there, link_weight.there, one.links};
    const ConvGradients<void> results{to_x.there, to_weight.there, to_values.there, to_link_weight.there,
                                      nullptr, to_bias.there, to_condition.there};
    int processors = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
    void* workspace;
    check(cudaMalloc(&workspace, masked_conv_cuda_workspace(number, conv, links, results, processors) + 1));
    const auto forward = [&](cudaStream_t stream) {
        check(masked_conv_cuda(number, true, conv, x.there, weight.there, link, bias.there, condition.there, false, gate,
                               out.there, f.there, stream));
    };
    const auto backward = [&](cudaStream_t stream) {
        check(masked_conv_gradients_cuda(number, true, conv, x.there, weight.there, link, gate, f.there, g.there, nullptr,
                                         results, workspace, processors, stream));
    };
    forward(nullptr), backward(nullptr);
    check(cudaDeviceSynchronize());
    for (Array<T>* result : {&out, &f, &to_x, &to_weight, &to_bias, &to_condition, &to_values, &to_link_weight}) result->fetch();

    const auto neighbour = [](size_t p, const Tap& tap, int sign) -> int64_t {  // or -1
        const int64_t y = int64_t(p) % kSize / kSide + sign * tap.dy, x = int64_t(p) % kSide + sign * tap.dx;
        return y < 0 || y >= kSide || x < 0 || x >= kSide ? -1 : int64_t(p) + sign * (tap.dy * kSide + tap.dx);
    };
    const auto f_gradient = [&](size_t p, size_t o) {  // in double, of the kernel's own f
        if (!one.gated) return g[p * width + o];
        const double a = std::tanh(f[p * cout + o % width]), b = 1 / (1 + std::exp(-f[p * cout + width + o % width]));
        return g[p * width + o % width] * (o < width ? (1 - a * a) * b : a * b * (1 - b));
    };
    Errors of_f, of_out, of_x, of_weight, of_bias, of_condition, of_values, of_link_weight;
    for (size_t p = 5; p < pixels; p += pixels / 40) {
        for (size_t o = 0; o < cout; o += 13) {
            double sum = bias[o] + (one.gated ? condition[p / kSize * cout + o] : 0.0);
            for (size_t t = 0; t < taps; ++t) {
                const int64_t q = neighbour(p, one.taps[t], 1);
                for (size_t c = 0; q >= 0 && c < cin; ++c) sum += x[q * cin + c] * weight[(t * cin + c) * cout + o];
            }
            for (size_t c = 0; c < links; ++c) sum += values[p * links + c] * link_weight[c * cout + o];
            of_f.compare(one.gated ? f[p * cout + o] : out[p * width + o], sum);
            if (one.gated && o < width) {
                of_out.compare(out[p * width + o], std::tanh(f[p * cout + o]) / (1 + std::exp(-f[p * cout + width + o])));
            }
        }
        for (size_t c = 0; c < cin; c += 11) {
            double sum = 0;
            for (size_t t = 0; t < taps; ++t) {
                const int64_t q = neighbour(p, one.taps[t], -1);
                for (size_t o = 0; q >= 0 && o < cout; ++o) sum += f_gradient(q, o) * weight[(t * cin + c) * cout + o];
            }
            of_x.compare(to_x[p * cin + c], sum);
        }
        for (size_t c = 0; c < links; c += 11) {
            double sum = 0;
            for (size_t o = 0; o < cout; ++o) sum += f_gradient(p, o) * link_weight[c * cout + o];
            of_values.compare(to_values[p * links + c], sum);
        }
    }
    for (size_t k = 3; k < taps * cin * cout; k += taps * cin * cout / 8) {
        const size_t t = k / (cin * cout), c = k / cout % cin, o = k % cout;
        double sum = 0;
        for (size_t p = 0; p < pixels; ++p) {
            const int64_t q = neighbour(p, one.taps[t], 1);
            if (q >= 0) sum += x[q * cin + c] * f_gradient(p, o);
        }
        of_weight.compare(to_weight[k], sum);
    }
    for (size_t k = 3; k < links * cout; k += links * cout / 8) {
        double sum = 0;
        for (size_t p = 0; p < pixels; ++p) sum += values[p * links + k / cout] * f_gradient(p, k % cout);
        of_link_weight.compare(to_link_weight[k], sum);
    }
    for (size_t o = 1; o < cout; o += cout / 4) {
        double all = 0;
        for (int image = 0; image < n; ++image) {
            double sum = 0;
            for (size_t p = size_t(image) * kSize; p < size_t(image + 1) * kSize; ++p) sum += f_gradient(p, o);
            if (one.gated) of_condition.compare(to_condition[image * cout + o], sum);
            all += sum;
        }
        of_bias.compare(to_bias[o], all);
    }
    double largest[2] = {0, 0};  // of the forward pass, and of all
    const std::pair<const char*, const Errors*> all[] = {
        {"f", &of_f}, {"out", &of_out}, {"x", &of_x}, {"weight", &of_weight}, {"bias", &of_bias},
        {"condition", &of_condition}, {"link", &of_values}, {"link's weight", &of_link_weight}};
    for (const auto& [name, errors] : all) {
        if (!(errors->relative() < most)) {
            std::fprintf(stderr, "%s, %s: error %.1e of %s\n", one.what, half_precision ? "bfloat16" : "float32",
                         errors->relative(), name);
            std::exit(1);
        }
        const bool forward = errors == &of_f || errors == &of_out;
        for (int k = forward ? 0 : 1; k < 2; ++k) largest[k] = std::max(largest[k], errors->relative());
    }
    if (!time) {
        std::printf("%s, %s: error %.1e\n", one.what, half_precision ? "bfloat16" : "float32", largest[1]);
    } else {
        cudaDeviceProp device;
        check(cudaGetDeviceProperties(&device, 0));
        std::vector<double> times;
        for (const bool gradient : {false, true}) {
            const double median = timed([&](cudaStream_t stream) {
                forward(stream);
                if (gradient) backward(stream);
            }, times);
            std::printf("{\"op\": \"masked_conv\", \"what\": \"%s\", \"n\": %d, \"d\": null, \"gradient\": %s, ", one.what, n,
                        gradient ? "true" : "false");
            std::printf("\"dtype\": \"%s\", \"implementation\": \"infovae_fast alone\", \"median_s\": %.4e, ",
                        half_precision ? "bfloat16" : "float32", median);
            std::printf("\"p20_s\": %.4e, \"p80_s\": %.4e, \"rounds\": %zu, \"error\": %.2e, ", times[times.size() / 5],
                        times[times.size() - 1 - times.size() / 5], times.size(), largest[gradient]);
            std::printf("\"device\": \"%s\", \"cuda\": \"%d.%d\", \"commit\": \"%s\"}\n", device.name, CUDART_VERSION / 1000,
                        CUDART_VERSION % 1000 / 10, commit);
        }
    }
    std::fflush(stdout);
    cudaFree(workspace);
}

}  // namespace

int main(int count, char** arguments) {
    const int images = checked(count, arguments), n = images > 0 ? images : kBatch;
    const bool time = images == 0;
    const Case cases[] = {
        {"V 64 gate", 64, 128, 0, true, window(1, false)},   {"H 64 gate link", 64, 128, 128, true, window(1, true)},
        {"1x1 64->128", 64, 128, 0, false, {{0, 0}}},         {"7x7 V 64", 64, 64, 0, false, window(3, false)},
        {"V 32 gate", 32, 64, 0, true, window(1, false)},     {"H 32 gate link", 32, 64, 64, true, window(1, true)},
        {"1x1 32->64", 32, 64, 0, false, {{0, 0}}},           {"1x1 128->64", 128, 64, 0, false, {{0, 0}}}};
    for (const Case& one : cases) {
        const char* commit = time && count > 1 ? arguments[1] : "unknown";
        run<float>(one, n, time, commit), run<Half>(one, n, time, commit);
    }
}
