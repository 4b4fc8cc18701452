// Draws images with `vertical_row`, `pixel_params` and `draw_bits` and compares the params of every pixel with the
// formulas of infovae_fast/models/pixelcnn.py, in double, at the image that was drawn.
//
//     incremental threads        prints the vector unit and how many problems ran; 1 if a result is wrong
#include "incremental.h"

#include <ATen/Parallel.h>

#include <cstdio>
#include <cstdlib>

#include "values.h"

using namespace infovae_fast;

namespace {

int problems = 0, wrong = 0;

// A network and what z adds. Matrices as incremental.h has them, zero where a group may not look.
struct Network {
    struct Layer {
        int64_t channels, reach, taps;  // taps of the horizontal stack
        Values vertical, vertical_bias, link, link_bias, horizontal, step, step_bias, above, beside;
    };
    int64_t n, channels, height, width, maps, groups, params;
    int64_t rows, columns;  // of a condition: of the image, or 1
    std::vector<Layer> layers;
    Values skip, skip_bias, hidden, hidden_bias, output, output_bias;

    Network(Random& random, int64_t n, int64_t colours, int64_t height, int64_t width, int64_t own, int64_t depth)
        : n(n), channels(colours), height(height), width(width), groups(random() % 2 ? colours : 1), params(0) {
        maps = own * groups, params = groups * int64_t(1 + random() % 3) * (colours / groups);
        const bool spatial = random() % 2;
        rows = spatial ? height : 1, columns = spatial ? width : 1;
        const int64_t kinds = random() % 2 ? n : 1;  // of conditions: one for each image, or one for all
        const int64_t first = int64_t(1 + random() % 3), other = int64_t(random() % 3);
        for (int64_t l = 0; l < depth; ++l) {
            const int64_t in = l == 0 ? channels : maps, r = l == 0 ? first : other;
            const bool centre = l > 0 || groups > 1;
            const int64_t taps = r + centre, above = (l == 0 ? r : r + 1) * (2 * r + 1);
            const double scale = 1 / std::sqrt(double(above * in));
            Layer layer{in, r, taps, normal(random, above * in * 2 * maps, scale), normal(random, 2 * maps),
                        normal(random, 4 * maps * maps, 0.5 / std::sqrt(double(maps))), normal(random, 2 * maps),
                        matrix(random, taps * in, 2 * maps, in, centre, l > 0), {}, {},
                        normal(random, kinds * rows * columns * 2 * maps), normal(random, kinds * rows * columns * 2 * maps)};
            if (l + 1 < depth) layer.step = matrix(random, maps, maps, maps, true, true), layer.step_bias = normal(random, maps);
            layers.push_back(layer);
        }
        skip = matrix(random, depth * maps, maps, maps, true, true), skip_bias = normal(random, maps);
        for (int64_t l = 0; l + 1 < depth; ++l) hide(skip, depth * maps, maps, maps, l * maps, true);
        hidden = matrix(random, maps, maps, maps, true, true), hidden_bias = normal(random, maps);
        output = matrix(random, maps, params, maps, true, true), output_bias = normal(random, params);
    }

    // [G, inputs, outputs / G]; the last `in` inputs lie at the pixel itself if `centre`.
    Values matrix(Random& random, int64_t inputs, int64_t outputs, int64_t in, bool centre, bool own) const {
        Values m = normal(random, inputs * outputs, 1 / std::sqrt(double(inputs)));
        if (centre) hide(m, inputs, outputs, in, inputs - in, own);
        return m;
    }
    // Groups see those before them, and their `own` or not, among the `in` inputs that start at `first`.
    void hide(Values& m, int64_t inputs, int64_t outputs, int64_t in, int64_t first, bool own) const {
        for (int64_t g = 0; g < groups; ++g) {
            for (int64_t k = 0; k < in; ++k) {
                const int64_t group = in == maps ? k / (maps / groups) : k % groups;
                if (group < g + own) continue;
                std::fill_n(&m[(g * inputs + first + k) * (outputs / groups)], outputs / groups, 0.0);
            }
        }
    }
    size_t condition(size_t size, int64_t i, int64_t row, int64_t column) const {
        const int64_t image = int64_t(size) > rows * columns * 2 * maps ? i : 0;
        return size_t((image * rows + (rows > 1 ? row : 0)) * columns + (columns > 1 ? column : 0)) * 2 * maps;
    }

    // out[g own + c] = bias + in [inputs] matrix[g]
    static void product(const Values& m, const Values& bias, const double* in, int64_t inputs, int64_t groups, Values& out) {
        const int64_t own = int64_t(bias.size()) / groups;
        out = bias;
        for (int64_t g = 0; g < groups; ++g) {
            for (int64_t k = 0; k < inputs; ++k) {
                for (int64_t c = 0; c < own; ++c) out[g * own + c] += in[k] * m[(g * inputs + k) * own + c];
            }
        }
    }

    // params [height, width, params] of image i with x [height, width, channels].
    Values at(int64_t i, const Values& x) const {
        const auto gate = [](double a, double b) { return std::tanh(a) / (1 + std::exp(-b)); };
        const int64_t pixels = height * width, own = maps / groups, depth = int64_t(layers.size());
        Values v(x), h(x), all(pixels * depth * maps);
        for (double& y : v) y = 2 * y - 1;
        h = v;
        for (int64_t l = 0; l < depth; ++l) {
            const Layer& layer = layers[l];
            const int64_t in = layer.channels, r = layer.reach;
            Values next_v(pixels * maps), next_h(pixels * maps), V, base, T, seen, o;
            for (int64_t p = 0; p < pixels; ++p) {
                const int64_t row = p / width, column = p % width;
                const auto look = [&](const Values& from, int64_t dy, int64_t dx) {
                    const bool inside = row + dy >= 0 && column + dx >= 0 && column + dx < width;
                    for (int64_t c = 0; c < in; ++c) seen.push_back(inside ? from[(p + dy * width + dx) * in + c] : 0);
                };
                seen.clear();
                for (int64_t dy = -r; dy <= (l == 0 ? -1 : 0); ++dy) {
                    for (int64_t dx = -r; dx <= r; ++dx) look(v, dy, dx);
                }
                product(layer.vertical, layer.vertical_bias, seen.data(), int64_t(seen.size()), 1, V);
                const double* above = &layer.above[condition(layer.above.size(), i, row, column)];
                const double* beside = &layer.beside[condition(layer.beside.size(), i, row, column)];
                for (int64_t c = 0; c < 2 * maps; ++c) V[c] += above[c];
                product(layer.link, layer.link_bias, V.data(), 2 * maps, 1, base);
                for (int64_t c = 0; c < 2 * maps; ++c) base[c] += beside[c];
                for (int64_t c = 0; c < maps; ++c) next_v[p * maps + c] = gate(V[c], V[maps + c]);
                seen.clear();
                for (int64_t t = 0; t < layer.taps; ++t) look(h, 0, t - r);
                product(layer.horizontal, base, seen.data(), int64_t(seen.size()), groups, T);
                double* const out = &all[(p * depth + l) * maps];
                for (int64_t g = 0; g < groups; ++g) {
                    for (int64_t c = 0; c < own; ++c) out[g * own + c] = gate(T[g * 2 * own + c], T[(g * 2 + 1) * own + c]);
                }
                if (layer.step.empty()) continue;
                product(layer.step, layer.step_bias, out, maps, groups, o);
                for (int64_t c = 0; c < maps; ++c) next_h[p * maps + c] = o[c] + (l == 0 ? 0 : h[p * maps + c]);
            }
            v = next_v, h = next_h;
        }
        Values found, s, t, out;
        for (int64_t p = 0; p < pixels; ++p) {
            product(skip, skip_bias, &all[p * depth * maps], depth * maps, groups, s);
            for (double& e : s) e = std::max(e, 0.0);
            product(hidden, hidden_bias, s.data(), maps, groups, t);
            for (double& e : t) e = std::max(e, 0.0);
            product(output, output_bias, t.data(), maps, groups, out);
            found.insert(found.end(), out.begin(), out.end());
        }
        return found;
    }
};

template <typename T>
struct Arrays {  // of a layer
    Array<T> vertical, vertical_bias, link, link_bias, horizontal, step, step_bias, above, beside, ring, state, base;
    Arrays(const Network& q, const Network::Layer& l)
        : vertical(l.vertical), vertical_bias(l.vertical_bias), link(l.link), link_bias(l.link_bias), horizontal(l.horizontal),
          step(l.step, !l.step.empty()), step_bias(l.step_bias, !l.step.empty()), above(l.above), beside(l.beside),
          ring(Values(q.n * (l.reach + 1) * (q.width + 2 * l.reach) * l.channels, 0.0)),
          state(Values(q.n * (l.reach + q.width) * l.channels, 0.0)), base(size_t(q.n * q.width * 2 * q.maps), true) {}
};

// Bits are drawn where the likelihood fits, by `draw_bits`; else `pixel_params` is told random values.
template <typename T>
void run(Random& random, const Network& q) {
    const bool bits = q.params == q.channels;
    std::vector<Arrays<T>> arrays;
    for (const auto& layer : q.layers) arrays.emplace_back(q, layer);
    const Array<T> skip(q.skip), skip_bias(q.skip_bias), hidden(q.hidden), hidden_bias(q.hidden_bias);
    const Array<T> output(q.output), output_bias(q.output_bias);
    const Array<T> memory(Values(q.n * (int64_t(q.layers.size()) + 2) * q.maps, 0.0));
    std::vector<Values> images(q.n, Values(q.height * q.width * q.channels)), found(q.n), uniform(q.n);
    for (int64_t row = 0; row < q.height; ++row) {
        VerticalRow<T> vertical{q.n, q.width, q.maps, row, {}};
        PixelRow<T> horizontal{q.n, q.width, q.maps, q.groups, q.params, {}, skip, skip_bias, hidden, hidden_bias,
                               output, output_bias, memory};
        for (size_t l = 0; l < arrays.size(); ++l) {
            const auto& layer = q.layers[l];
            const Arrays<T>& a = arrays[l];
            const auto stride = [&](const Values& v) { return int64_t(q.condition(v.size(), 1, 0, 0)); };
            const int64_t from = int64_t(q.condition(layer.above.size(), 0, row, 0)), column = q.columns > 1 ? 2 * q.maps : 0;
            vertical.layers.push_back({a.ring, a.base, layer.channels, layer.reach, l == 0, a.vertical, a.vertical_bias,
                                       a.link, a.link_bias, a.above + from, a.beside + from, stride(layer.above), column,
                                       stride(layer.beside), column});
            horizontal.layers.push_back({a.base, a.state, (layer.reach + q.width) * layer.channels, layer.channels,
                                         layer.reach, layer.taps, a.horizontal, a.step, a.step_bias});
        }
        vertical_row(vertical);
        const int64_t size = q.n * q.channels * q.width, reach = q.layers[0].reach;
        Values u(size), known(size);
        for (double& e : u) e = (double(random() % 1000) + 0.5) / 1000;
        for (double& e : known) e = double(random() % 2);
        const auto at = [&](int64_t i, int64_t c, int64_t j) { return (i * q.channels + c) * q.width + j; };
        if (bits) {
            const Array<float> uniforms(u);
            const Array<T> given(known), x(size_t(size), true);
            std::unique_ptr<bool[]> mask(new bool[size]);
            for (int64_t e = 0; e < size; ++e) mask[e] = random() % 4 == 0;
            draw_bits(horizontal, Bits<T>{uniforms, given, mask.get(), x, q.channels, T(0.7)});
            for (int64_t i = 0; i < q.n; ++i) {
                for (int64_t j = 0; j < q.width; ++j) {
                    for (int64_t c = 0; c < q.channels; ++c) {
                        images[i][(row * q.width + j) * q.channels + c] = x[at(i, c, j)];
                        uniform[i].push_back(mask[at(i, c, j)] ? -1 : u[at(i, c, j)]);
                        wrong += mask[at(i, c, j)] && x[at(i, c, j)] != known[at(i, c, j)];
                    }
                }
            }
        } else {
            for (int64_t j = 0; j < q.width; ++j) {
                for (int64_t g = 0; g < q.groups; ++g) {
                    const int64_t own = q.params / q.groups;
                    const Array<T> params(size_t(q.n * own), true);
                    pixel_params<T>(horizontal, j, g, params);
                    for (int64_t i = 0; i < q.n; ++i) {
                        for (int64_t c = 0; c < own; ++c) found[i].push_back(params[i * own + c]);
                        for (int64_t c = g; c < q.channels; c += q.groups) {
                            const double value = images[i][(row * q.width + j) * q.channels + c] = known[at(i, c, j)];
                            arrays[0].state[(i * (reach + q.width) + reach + j) * q.channels + c] = T(2 * value - 1);
                        }
                    }
                }
            }
        }
        for (int64_t i = 0; i < q.n; ++i) {  // the row is finished
            std::copy_n(arrays[0].state + (i * (reach + q.width) + reach) * q.channels, q.width * q.channels,
                        arrays[0].ring + ((i * (reach + 1) + row % (reach + 1)) * (q.width + 2 * reach) + reach) * q.channels);
        }
    }
    const double tolerance = sizeof(T) == 4 ? 2e-4 : 1e-11;
    for (int64_t i = 0; i < q.n; ++i) {
        const Values truth = q.at(i, images[i]);
        int64_t bad = 0;
        for (size_t e = 0; e < truth.size(); ++e) {
            if (bits) {
                const double p = 1 / (1 + std::exp(-truth[e] / 0.7)), x = images[i][e], u = uniform[i][e];
                bad += u >= 0 && std::abs(u - p) > tolerance && x != double(u < p);
            } else {
                bad += !(std::abs(found[i][e] - truth[e]) <= tolerance * std::max(1.0, std::abs(truth[e])));
            }
        }
        if (bad > 0) {
            std::fprintf(stderr, "%d bytes, image %d of %d, [%d, %d, %d], %d maps, %d groups, %d params, %d layers: %d wrong\n",
                         int(sizeof(T)), int(i), int(q.n), int(q.channels), int(q.height), int(q.width), int(q.maps),
                         int(q.groups), int(q.params), int(q.layers.size()), int(bad));
            ++wrong;
        }
    }
    ++problems;
}

}  // namespace

int main(int, char** arguments) {
    at::threads = std::atoi(arguments[1]);
    Random random(1);
    const int64_t own[] = {1, 2, 5, 8, 16, 19, 33};
    for (int trial = 0; trial < 60; ++trial) {
        const int64_t n = int64_t(1 + random() % 7), colours = random() % 3 ? 1 : 3, maps = own[random() % 7];
        const int64_t height = int64_t(1 + random() % 5), width = int64_t(1 + random() % 6), depth = int64_t(1 + random() % 4);
        const Network network(random, n, colours, height, width, maps, depth);
        run<float>(random, network);
        run<double>(random, network);
    }
    return report(problems, wrong);
}
