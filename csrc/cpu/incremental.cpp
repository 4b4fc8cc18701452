// A pixel is a chain of products of matrices [n, k] x [k, m] with few rows: a thread takes some of the n images through
// a whole row, so that nobody waits for anybody and the sums do not depend on the number of threads.
#include "incremental.h"

#include <ATen/Parallel.h>

#include <cmath>

#include "layers.h"

namespace infovae_fast {
namespace {

#define VECTOR_CODE "layers.inc"
#include "each_unit.inc"

// A matrix [groups, k, columns] whose columns are padded with zeros to whole vectors.
template <typename T>
class Padded {
public:
    Padded(const T* matrix, int64_t groups, int64_t k, int64_t columns)
        : data_(matrix), k_(k), columns(columns), stride(round_up(columns, lanes<T>())) {
        if (matrix == nullptr || stride == columns) return;
        padded_.resize(groups * k * stride);
        for (int64_t row = 0; row < groups * k; ++row) {
            std::copy_n(matrix + row * columns, columns, padded_.data() + row * stride);
        }
    }
    const T* of(int64_t group) const { return (padded_.empty() ? data_ : padded_.data()) + group * k_ * stride; }

private:
    const T* data_;
    int64_t k_;
    std::vector<T> padded_;

public:
    int64_t columns, stride;
};

constexpr int64_t kNoOffset = 0;

template <typename T>
struct Network {
    const PixelRow<T>& q;
    std::vector<Padded<T>> horizontal, step;
    Padded<T> skip, hidden, output;
    int64_t own, size;  // maps of a group, and of what the images of a thread need beside
    decltype(BEST(product<T>)) product = BEST(product<T>);
    decltype(BEST(gate_pixels<T>)) gate = BEST(gate_pixels<T>);

    explicit Network(const PixelRow<T>& row)
        : q(row),
          skip(row.skip, row.groups, int64_t(row.layers.size()) * row.maps, row.maps / row.groups),
          hidden(row.hidden, row.groups, row.maps, row.maps / row.groups),
          output(row.output, row.groups, row.maps, row.params / row.groups),
          own(row.maps / row.groups) {
        size = output.stride;
        for (const auto& layer : q.layers) {
            horizontal.emplace_back(layer.horizontal, q.groups, layer.taps * layer.channels, 2 * own);
            step.emplace_back(layer.step, q.groups, q.maps, own);
            size = std::max(size, horizontal.back().stride);
        }
        size = round_up(size, lanes<T>()) + q.maps;
    }

    // out = bias + left matrix, for `count` images; `left` rows start `stride` apart.
    void affine(const T* left, int64_t stride, int64_t k, const Padded<T>& matrix, int64_t group, const T* bias, T* out,
                int64_t count) const {
        for (int64_t s = 0; s < count; ++s) {
            std::fill_n(std::copy_n(bias + group * matrix.columns, matrix.columns, out + s * matrix.stride),
                        matrix.stride - matrix.columns, T(0));
        }
        product(left, stride, &kNoOffset, 1, k, matrix.of(group), matrix.stride, out, matrix.stride, count, true);
    }

    // params [count, output.stride] of column j and a group for images first .. first + count, in f, with room for size.
    void pixel(int64_t j, int64_t group, int64_t first, int64_t count, T* f, T* gated) const {
        const int64_t maps = q.maps, count_layers = int64_t(q.layers.size()), row = (count_layers + 2) * maps;
        T* const memory = q.memory + first * row;
        if (group == 0 && q.groups > 1) {  // what is left of another pixel has no weight, but NaN times that is NaN
            std::fill_n(memory, count * row, T(0));
            for (const auto& layer : q.layers) {
                T* const here = layer.state + first * layer.stride + (layer.reach + j) * layer.channels;
                for (int64_t s = 0; s < count; ++s) std::fill_n(here + s * layer.stride, layer.channels, T(0));
            }
        }
        for (int64_t l = 0; l < count_layers; ++l) {
            const auto& layer = q.layers[l];
            const Padded<T>& h = horizontal[l];
            for (int64_t s = 0; s < count; ++s) {
                const T* base = layer.base + ((first + s) * q.width + j) * 2 * maps + group * 2 * own;
                std::fill_n(std::copy_n(base, 2 * own, f + s * h.stride), h.stride - 2 * own, T(0));
            }
            T* const state = layer.state + first * layer.stride;
            product(state + j * layer.channels, layer.stride, &kNoOffset, 1, layer.taps * layer.channels, h.of(group),
                    h.stride, f, h.stride, count, true);
            gate(Gate::tanh, count, own, f, h.stride, gated);
            for (int64_t s = 0; s < count; ++s) {
                std::copy_n(gated + s * own, own, memory + s * row + l * maps + group * own);
            }
            if (layer.step == nullptr) continue;
            affine(memory + l * maps, row, maps, step[l], group, layer.step_bias, f, count);
            const auto& next = q.layers[l + 1];
            for (int64_t s = 0; s < count; ++s) {
                T* to = next.state + (first + s) * next.stride + (next.reach + j) * maps + group * own;
                const T* from = f + s * step[l].stride;
                const T* h_l = l == 0 ? nullptr : state + s * layer.stride + (layer.reach + j) * maps + group * own;
                for (int64_t c = 0; c < own; ++c) to[c] = from[c] + (h_l == nullptr ? T(0) : h_l[c]);
            }
        }
        const auto relu_into = [&](int64_t place) {
            for (int64_t s = 0; s < count; ++s) {
                T* to = memory + s * row + place * maps + group * own;
                for (int64_t c = 0; c < own; ++c) to[c] = std::max(f[s * skip.stride + c], T(0));
            }
        };
        affine(memory, row, count_layers * maps, skip, group, q.skip_bias, f, count);
        relu_into(count_layers);
        affine(memory + count_layers * maps, row, maps, hidden, group, q.hidden_bias, f, count);
        relu_into(count_layers + 1);
        affine(memory + (count_layers + 1) * maps, row, maps, output, group, q.output_bias, f, count);
    }

    // visit(first, count, f, gated) for the images of each thread, with its memory.
    template <typename F>
    void share(F visit) const {
        const int64_t threads = std::min<int64_t>(at::get_num_threads(), q.n);
        at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t k = begin; k < end; ++k) {
                const int64_t first = q.n * k / threads, count = q.n * (k + 1) / threads - first;
                std::vector<T> memory(count * size);
                visit(first, count, memory.data(), memory.data() + count * (size - q.maps));
            }
        });
    }
};

// f[j] += bias + condition, `columns` of them, for a row of pixels.
template <typename T>
void add_row(T* f, int64_t stride, int64_t width, int64_t columns, const T* bias, const T* condition, int64_t step) {
    for (int64_t j = 0; j < width; ++j, f += stride, condition += step) {
        for (int64_t c = 0; c < columns; ++c) f[c] += bias[c] + condition[c];
    }
}

}  // namespace

template <typename T>
void vertical_row(const VerticalRow<T>& q) {
    const int64_t wide = 2 * q.maps, layers = int64_t(q.layers.size());
    std::vector<Padded<T>> vertical, link;
    std::vector<std::vector<int64_t>> offsets;  // of the taps in the ring
    for (const auto& layer : q.layers) {
        const int64_t r = layer.reach, row_size = (q.width + 2 * r) * layer.channels;
        std::vector<int64_t> offset;
        for (int64_t dy = -r; dy <= (layer.first ? -1 : 0); ++dy) {
            for (int64_t dx = -r; dx <= r; ++dx) {
                offset.push_back((q.row + dy + r + 1) % (r + 1) * row_size + (dx + r) * layer.channels);
            }
        }
        vertical.emplace_back(layer.vertical, 1, int64_t(offset.size()) * layer.channels, wide);
        link.emplace_back(layer.link, 1, wide, wide);
        offsets.push_back(std::move(offset));
    }
    const auto product = BEST(product<T>);
    const auto gate = BEST(gate_pixels<T>);
    const int64_t stride = vertical[0].stride, threads = std::min<int64_t>(at::get_num_threads(), q.n);
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        std::vector<T> f(q.width * stride), base(q.width * stride);
        for (int64_t l = 0; l < layers; ++l) {  // a layer's weights stay in the cache for all images
            const auto& layer = q.layers[l];
            const int64_t ring = (layer.reach + 1) * (q.width + 2 * layer.reach) * layer.channels;
            for (int64_t image = q.n * begin / threads; image < q.n * end / threads; ++image) {
                product(layer.ring + image * ring, layer.channels, offsets[l].data(), int64_t(offsets[l].size()),
                        layer.channels, vertical[l].of(0), stride, f.data(), stride, q.width, false);
                add_row(f.data(), stride, q.width, wide, layer.vertical_bias, layer.above + image * layer.above_image,
                        layer.above_column);
                product(f.data(), stride, &kNoOffset, 1, wide, link[l].of(0), stride, base.data(), stride, q.width, false);
                add_row(base.data(), stride, q.width, wide, layer.link_bias, layer.beside + image * layer.beside_image,
                        layer.beside_column);
                for (int64_t j = 0; j < q.width; ++j) {
                    std::copy_n(base.data() + j * stride, wide, layer.base + (image * q.width + j) * wide);
                }
                if (l + 1 < layers) {
                    const auto& next = q.layers[l + 1];
                    const int64_t row_size = (q.width + 2 * next.reach) * q.maps;
                    T* to = next.ring + (image * (next.reach + 1) + q.row % (next.reach + 1)) * row_size;
                    gate(Gate::tanh, q.width, q.maps, f.data(), stride, to + next.reach * q.maps);
                }
            }
        }
    });
}

template <typename T>
void pixel_params(const PixelRow<T>& q, int64_t j, int64_t group, T* params) {
    const Network<T> network(q);
    const int64_t p = q.params / q.groups;
    network.share([&](int64_t first, int64_t count, T* f, T* gated) {
        network.pixel(j, group, first, count, f, gated);
        for (int64_t s = 0; s < count; ++s) std::copy_n(f + s * network.output.stride, p, params + (first + s) * p);
    });
}

template <typename T>
void draw_bits(const PixelRow<T>& q, const Bits<T>& bits) {
    const Network<T> network(q);
    const auto& y = q.layers[0];
    network.share([&](int64_t first, int64_t count, T* f, T* gated) {
        for (int64_t j = 0; j < q.width; ++j) {
            for (int64_t group = 0; group < q.groups; ++group) {
                network.pixel(j, group, first, count, f, gated);
                for (int64_t s = 0; s < count; ++s) {
                    for (int64_t c = group; c < bits.channels; c += q.groups) {
                        const int64_t at = ((first + s) * bits.channels + c) * q.width + j;
                        const T logit = f[s * network.output.stride + c / q.groups] / bits.temperature;
                        const T p = 1 / (1 + std::exp(-logit)), drawn = T(bits.uniforms[at]) < p ? T(1) : p == p ? T(0) : p;
                        bits.x[at] = bits.mask[at] ? bits.known[at] : drawn;
                        y.state[(first + s) * y.stride + (y.reach + j) * y.channels + c] = 2 * bits.x[at] - 1;
                    }
                }
            }
        }
    });
}

#define INSTANTIATE(T)                                                          \
    template void vertical_row<T>(const VerticalRow<T>&);                       \
    template void pixel_params<T>(const PixelRow<T>&, int64_t, int64_t, T*);    \
    template void draw_bits<T>(const PixelRow<T>&, const Bits<T>&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace infovae_fast
