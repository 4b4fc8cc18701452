// The CUDA kernel of `models.resident` alone, without PyTorch: a JSON row of the time of passes of the InfoVAE paper's
// decoder (12 layers of 32 maps, 28x28 bits) in bfloat16, and how far they are from sums in double.
//
//     nvcc -std=c++17 -O3 -Icsrc -arch=native benchmarks/resident_alone.cu csrc/cuda/resident.cu -o build/resident_alone
//     build/resident_alone [commit] >> benchmarks/results/NAME.jsonl
//     compute-sanitizer build/resident_alone check 3                        # with 3 codes, nothing timed
//
// The params of the first and the last code are compared; wrong ones end the program.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "alone.h"
#include "resident.h"

using namespace infovae_fast;
using Half = __nv_bfloat16;
using Numbers = std::vector<double>;

namespace {

constexpr int kSide = 28, kPixels = kSide * kSide, kMaps = 32, kLayers = 12, kFar = 3, kNear = 1, kImages = 100;
constexpr int kCodes = 10000, kRounds = 9;
constexpr double kLargestError = 0.05;  // of the largest of the params

std::mt19937 random_bits(0);

// Numbers of 16 bits, as the GPU has them and as they are.
struct Halves {
    std::vector<Half> bits;
    Numbers numbers;

    void add(double x) {
        bits.push_back(__float2bfloat16_rn(float(x)));
        numbers.push_back(__bfloat162float(bits.back()));
    }
};
template <typename T>
T* to_gpu(const std::vector<T>& here) {
    T* there = nullptr;
    check(cudaMalloc(reinterpret_cast<void**>(&there), here.size() * sizeof(T)));
    check(cudaMemcpy(there, here.data(), here.size() * sizeof(T), cudaMemcpyHostToDevice));
    return there;
}

// A matrix [rows, columns] and its place in the table: by 16 x 16, as `_fragments` of models/resident.py has it.
Numbers matrix(int rows, int columns, std::vector<Half>& table) {
    std::normal_distribution<double> normal(0, 1 / std::sqrt(rows));
    Halves own;
    for (int e = 0; e < rows * columns; ++e) own.add(normal(random_bits));
    for (int k = 0; k < (rows + 15) / 16; ++k) {
        for (int j = 0; j < (columns + 15) / 16; ++j) {
            for (int e = 0; e < 256; ++e) {
                const int lane = e / 8, row = 16 * k + e / 2 % 2 * 8 + lane % 4 * 2 + e % 2;
                const int column = 16 * j + e / 4 * 8 % 16 + lane / 4;
                const bool there = row < rows && column < columns;
                table.push_back(there ? own.bits[row * columns + column] : __float2bfloat16_rn(0.0f));
            }
        }
    }
    return own.numbers;
}

struct Layer {
    Numbers vertical, link, horizontal, out;
};

// What the taps (dy, dx) of every pixel see of `source` [pixels, channels], times the matrix.
Numbers convolved(const Numbers& source, int channels, const Numbers& by, int columns, int rows_up, int left, int right,
                  bool present) {
    Numbers to(kPixels * columns);
    for (int p = 0; p < kPixels; ++p) {
        int row = 0;
        for (int dy = -rows_up; dy <= (present || rows_up == 0 ? 0 : -1); ++dy) {
            for (int dx = -left; dx <= right; ++dx) {
                const int y = p / kSide + dy, x = p % kSide + dx;
                const bool there = y >= 0 && x >= 0 && x < kSide;
                for (int c = 0; c < channels; ++c, ++row) {
                    const double value = there ? source[(y * kSide + x) * channels + c] : 0;
                    for (int m = 0; m < columns && value != 0; ++m) to[p * columns + m] += value * by[row * columns + m];
                }
            }
        }
    }
    return to;
}
Numbers gated(const Numbers& f) {
    Numbers to(kPixels * kMaps);
    for (int p = 0; p < kPixels; ++p) {
        for (int c = 0; c < kMaps; ++c) {
            to[p * kMaps + c] = std::tanh(f[p * 2 * kMaps + c]) / (1 + std::exp(-f[p * 2 * kMaps + kMaps + c]));
        }
    }
    return to;
}
void add(Numbers& to, const Numbers& more) {  // [pixels, n] += [pixels, n] or [n]
    for (size_t e = 0; e < to.size(); ++e) to[e] += more[e % more.size()];
}
Numbers part(const Numbers& from, size_t start, size_t count) {
    return Numbers(from.begin() + start, from.begin() + start + count);
}
Numbers columns_of(const Numbers& from, int columns, int first, int count) {
    Numbers to;
    for (size_t row = 0; row < from.size() / columns; ++row) {
        for (int c = first; c < first + count; ++c) to.push_back(from[row * columns + c]);
    }
    return to;
}
void positive(Numbers& x) {
    for (double& e : x) e = std::max(e, 0.0);
}

}  // namespace

int main(int count, char** arguments) {
    const int codes = checked(count, arguments), n = codes > 0 ? codes : kCodes, images = std::min(n, kImages);
    const bool time = codes == 0;
    std::vector<Half> table;
    std::vector<Layer> layers(kLayers);
    for (int l = 0; l < kLayers; ++l) {
        const bool first = l == 0;
        layers[l].vertical = matrix(first ? kFar * (2 * kFar + 1) : (kNear + 1) * (2 * kNear + 1) * kMaps, 2 * kMaps, table);
        layers[l].link = matrix(2 * kMaps, 2 * kMaps, table);
        layers[l].horizontal = matrix(first ? kFar : (kNear + 1) * kMaps, 2 * kMaps, table);
        layers[l].out = matrix(kMaps, 2 * kMaps, table);
    }
    const Numbers hidden = matrix(kMaps, kMaps, table), output = matrix(kMaps, 1, table);
    std::normal_distribution<double> normal(0, 0.3);
    std::vector<float> biases(kLayers * 5 * kMaps + 2 * kMaps + 1);
    for (float& x : biases) x = float(normal(random_bits));
    Halves y, condition;
    for (int e = 0; e < images * kPixels; ++e) y.add(random_bits() % 2 ? 1 : -1);
    for (int64_t e = 0; e < int64_t(n) * kLayers * 4 * kMaps; ++e) condition.add(normal(random_bits));

    Resident q{n, images, 1, kSide, kSide, 1, kLayers, kMaps, kFar, kNear};
    const ResidentNeed need = resident_cuda_need(q);
    check(need.error);
    if (need.table != int64_t(table.size()) || need.biases != int64_t(biases.size())) check("the tables have other sizes");
    q.y = to_gpu(y.bits), q.table = to_gpu(table), q.condition = to_gpu(condition.bits), q.biases = to_gpu(biases);
    std::vector<Half> params(size_t(n) * kPixels);
    q.out = to_gpu(params);
    check(resident_cuda(true, q, nullptr));
    check(cudaMemcpy(params.data(), q.out, params.size() * sizeof(Half), cudaMemcpyDeviceToHost));

    const Numbers bias_numbers(biases.begin(), biases.end());
    double worst = 0;
    for (const int code : {0, n - 1}) {
        Numbers v = part(y.numbers, size_t(code % images) * kPixels, kPixels), h = v, skip(kPixels * kMaps);
        for (int l = 0; l < kLayers; ++l) {
            const int reach = l == 0 ? kFar : kNear, channels = l == 0 ? 1 : kMaps;
            const auto added = [&](size_t start, size_t size) {  // biases and what z adds
                Numbers sum = part(bias_numbers, l * 5 * kMaps + start, size);
                const size_t of_layer = (size_t(code) * kLayers + l) * 4 * kMaps;
                if (start < 4 * kMaps) add(sum, part(condition.numbers, of_layer + start, size));
                return sum;
            };
            Numbers above = convolved(v, channels, layers[l].vertical, 2 * kMaps, reach, reach, reach, l > 0);
            add(above, added(0, 2 * kMaps));
            Numbers beside = convolved(h, channels, layers[l].horizontal, 2 * kMaps, 0, reach, l > 0 ? 0 : -1, true);
            add(beside, convolved(above, 2 * kMaps, layers[l].link, 2 * kMaps, 0, 0, 0, true));
            add(beside, added(2 * kMaps, 2 * kMaps));
            const Numbers o = gated(beside), both = convolved(o, kMaps, layers[l].out, 2 * kMaps, 0, 0, 0, true);
            add(skip, columns_of(both, 2 * kMaps, kMaps, kMaps));
            Numbers step = columns_of(both, 2 * kMaps, 0, kMaps);
            add(step, added(4 * kMaps, kMaps));
            if (l > 0) add(step, h);
            h = step, v = gated(above);
        }
        const auto bias = [&](size_t start, size_t size) {
            return part(bias_numbers, kLayers * 5 * kMaps + start, size);
        };
        add(skip, bias(0, kMaps)), positive(skip);
        Numbers inner = convolved(skip, kMaps, hidden, kMaps, 0, 0, 0, true);
        add(inner, bias(kMaps, kMaps)), positive(inner);
        Numbers truth = convolved(inner, kMaps, output, 1, 0, 0, 0, true);
        add(truth, bias(2 * kMaps, 1));
        double largest = 0, error = 0;
        for (int p = 0; p < kPixels; ++p) {
            const double found = __bfloat162float(params[size_t(code) * kPixels + p]);
            largest = std::max(largest, std::fabs(truth[p]));
            error = std::fmax(error, std::isfinite(found) ? std::fabs(found - truth[p]) : INFINITY);
        }
        worst = std::max(worst, error / largest);
    }
    if (!(worst < kLargestError)) {
        std::fprintf(stderr, "error %.1e of the params\n", worst);
        return 1;
    }
    if (!time) {
        std::printf("%d codes: error %.1e\n", n, worst);
        return 0;
    }
    cudaEvent_t start, end;
    check(cudaEventCreate(&start)), check(cudaEventCreate(&end));
    std::vector<double> times;
    for (int k = 0; k < kRounds; ++k) {
        check(cudaEventRecord(start, nullptr));
        check(resident_cuda(true, q, nullptr));
        check(cudaEventRecord(end, nullptr)), check(cudaEventSynchronize(end));
        float milliseconds;
        check(cudaEventElapsedTime(&milliseconds, start, end));
        times.push_back(milliseconds * 1e-3);
    }
    std::sort(times.begin(), times.end());
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0));
    std::printf("{\"op\": \"resident\", \"what\": \"paper likelihood\", \"n\": %d, \"d\": null, \"gradient\": false, ", n);
    std::printf("\"dtype\": \"bfloat16\", \"implementation\": \"infovae_fast alone\", ");
    std::printf("\"median_s\": %.4e, ", times[kRounds / 2]);
    std::printf("\"p20_s\": %.4e, \"p80_s\": %.4e, \"rounds\": %d, \"error\": %.2e, ", times[kRounds / 5],
                times[kRounds - 1 - kRounds / 5], kRounds, worst);
    std::printf("\"device\": \"%s\", \"cuda\": \"%d.%d\", \"commit\": \"%s\"}\n", device.name, CUDART_VERSION / 1000,
                CUDART_VERSION % 1000 / 10, count > 1 ? arguments[1] : "unknown");
}
