// Masked convolution on the CPU. A row of an output is, for each tap, a product of a row of the input, moved by the tap,
// and a matrix: [w, cin] x [cin, cout], summed in registers over the taps. The image stands in a copy with a margin of
// zeros, so that no tap meets an edge; masked pixels are in that copy too, and no product reads them. A kernel of one
// pixel needs no copy.
//
// With colours the last tap reads fewer channels for earlier groups: channels are sorted by group.
//
// The gradient to x is the same convolution of the gradient to f, with taps and matrices transposed. That to weight is,
// for each row k = (tap, input channel) of it, sum_p x[p + t, ci] g[p, :]: rows share the loads of g.
#include "masked_conv.h"

#include <ATen/Parallel.h>

#include "layers.h"

namespace infovae_fast {
namespace {

constexpr int64_t kDepth = 256;  // products that are summed in a register before they are added to the rest
constexpr int64_t kImageBytes = 512 << 10;  // of the copy with margins: it should stay in the cache
constexpr int64_t kGroups = 16;  // of images, whose gradients to weight are summed apart: not the number of threads

template <typename T>
struct ConvRows {
    const T *x, *weight;  // the copy at the first row, [taps, cin, channels]
    T* f;                 // [rows, w, channels]
    const int64_t* offset;  // of each tap in the copy
    int64_t taps, rows, w, cin, channels, x_stride;
    int64_t last;  // input channels that the last tap reads
};
template <typename T>
struct WeightRows {
    const T *x, *g;
    T* gradient;            // [k, channels]
    const int64_t* offset;  // of each k = (tap, input channel) in the copy
    int64_t k, rows, w, cin, channels, x_stride, g_stride;
};

#define VECTOR_CODE "masked_conv.inc"
#include "each_unit.inc"

// The margin that the taps need, and the copy of rows y0..y1 of one image with it, its channels in the given order.
struct Margin {
    int64_t top = 0, bottom = 0, left = 0, right = 0;
    explicit Margin(const std::vector<Tap>& taps) {
        for (const Tap& t : taps) {
            top = std::max(top, -t.dy), bottom = std::max(bottom, t.dy);
            left = std::max(left, -t.dx), right = std::max(right, t.dx);
        }
    }
    bool none() const { return top + bottom + left + right == 0; }
    int64_t stride(int64_t w, int64_t c) const { return (left + w + right) * c; }
    int64_t size(int64_t rows, int64_t w, int64_t c) const { return (top + rows + bottom) * stride(w, c); }
    int64_t origin(int64_t w, int64_t c) const { return top * stride(w, c) + left * c; }

    template <typename T>
    void copy(const T* image, int64_t h, int64_t w, int64_t c, int64_t y0, int64_t y1, const std::vector<int64_t>& order,
              T* out) const {
        for (int64_t y = y0 - top; y < y1 + bottom; ++y, out += stride(w, c)) {
            if (y < 0 || y >= h) {
                std::fill_n(out, stride(w, c), T(0));
                continue;
            }
            std::fill_n(out, left * c, T(0));
            const T* row = image + y * w * c;
            if (order.empty()) {
                std::copy_n(row, w * c, out + left * c);
            } else {
                for (int64_t p = 0; p < w; ++p) {
                    for (int64_t k = 0; k < c; ++k) out[(left + p) * c + k] = row[p * c + order[k]];
                }
            }
            std::fill_n(out + (left + w) * c, right * c, T(0));
        }
    }
};

std::vector<int64_t> offsets(const std::vector<Tap>& taps, int64_t x_stride, int64_t c) {
    std::vector<int64_t> found;
    for (const Tap& t : taps) found.push_back(t.dy * x_stride + t.dx * c);
    return found;
}

// Rows of an image for one task: a copy that fits the cache, and work for all threads where images are few.
template <typename T>
int64_t rows_of_a_task(const Margin& margin, int64_t n, int64_t h, int64_t w, int64_t c) {
    const int64_t fit = kImageBytes / int64_t(sizeof(T)) / margin.stride(w, c) - margin.top - margin.bottom;
    const int64_t share = (n * h + 4 * at::get_num_threads() - 1) / (4 * at::get_num_threads());
    return clamp(std::min(fit, share), std::min<int64_t>(h, 4), h);
}

// What a convolution computes at once: some outputs, with the matrix of their taps and the inputs that the last tap
// reads. Without colours there is one part. With colours there is one for each group of outputs, and the inputs are
// sorted, so that what the last tap shows to a group comes first.
template <typename T>
struct Part {
    std::vector<int64_t> outputs;
    std::vector<T> weight;  // [taps, inputs, channels]
    int64_t channels, last;
};
template <typename T>
struct Parts {
    std::vector<int64_t> order;  // of the inputs, empty if as they are
    std::vector<Part<T>> parts;
};

// weight(t, input, output); `inputs` are the groups in the order in which the last tap shows them, shown(g) of them to
// the group g of outputs.
template <typename T, typename Weight, typename Shown>
Parts<T> parts_of(int64_t taps, const std::vector<std::vector<int64_t>>& inputs,
                  const std::vector<std::vector<int64_t>>& outputs, Weight weight, Shown shown) {
    Parts<T> found;
    for (const auto& group : inputs) found.order.insert(found.order.end(), group.begin(), group.end());
    const int64_t cin = int64_t(found.order.size());
    for (size_t g = 0; g < outputs.size(); ++g) {
        Part<T> part{outputs[g], {}, round_up(int64_t(outputs[g].size()), lanes<T>()), 0};
        part.last = shown(int64_t(g)) * int64_t(inputs[0].size());
        part.weight.resize(taps * cin * part.channels);
        at::parallel_for(0, taps, 1, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) {
                for (int64_t k = 0; k < cin; ++k) {
                    T* row = part.weight.data() + (t * cin + k) * part.channels;
                    for (size_t c = 0; c < part.outputs.size(); ++c) row[c] = weight(t, found.order[k], part.outputs[c]);
                }
            }
        });
        found.parts.push_back(std::move(part));
    }
    if (inputs.size() == 1) found.order.clear();
    return found;
}

// The channels of each group.
template <typename Of>
std::vector<std::vector<int64_t>> grouped(int64_t channels, int64_t groups, Of of) {
    std::vector<std::vector<int64_t>> found(groups);
    for (int64_t c = 0; c < channels; ++c) found[of(c)].push_back(c);
    return found;
}

// f = convolution, for `finish(image, y0, y1, f, stride)` to make of it what is wanted: f [y1 - y0, w, stride]. `direct`
// is where f is wanted as it is, [n, h, w, cout], or null; it is used if nothing has to be moved.
template <typename T, typename Finish>
void convolve_images(const MaskedConv& q, const T* x, const Parts<T>& parts, T* direct, Finish finish) {
    const Margin margin(q.taps);
    const int64_t x_stride = margin.stride(q.w, q.cin), step = rows_of_a_task<T>(margin, q.n, q.h, q.w, q.cin);
    const int64_t blocks = (q.h + step - 1) / step, threads = at::get_num_threads();
    const std::vector<int64_t> offset = offsets(q.taps, x_stride, q.cin);
    const bool one = parts.parts.size() == 1;
    const int64_t stride = one ? parts.parts[0].channels : q.cout;
    if (stride != q.cout) direct = nullptr;
    int64_t widest = 0;
    for (const Part<T>& part : parts.parts) widest = std::max(widest, part.channels);
    const int64_t copy_size = round_up(margin.size(step, q.w, q.cin), 64), f_size = round_up(step * q.w * stride, 64);
    const int64_t size = copy_size + f_size + (one ? 0 : round_up(step * q.w * widest, 64));
    Workspace workspace;
    T* const memory = reinterpret_cast<T*>(workspace.reserve(size_t(threads * size) * sizeof(T)));
    const auto convolve = BEST(convolve<T>);
    at::parallel_for(0, q.n * blocks, 1, [&](int64_t begin, int64_t end) {
        T* const copy = memory + at::get_thread_num() * size;
        for (int64_t task = begin; task < end; ++task) {
            const int64_t image = task / blocks, y0 = task % blocks * step, y1 = std::min(y0 + step, q.h);
            const T* in = x + (image * q.h + y0) * q.w * q.cin;
            if (!margin.none() || !parts.order.empty()) {
                margin.copy(x + image * q.h * q.w * q.cin, q.h, q.w, q.cin, y0, y1, parts.order, copy);
                in = copy + margin.origin(q.w, q.cin);
            }
            T* const f = direct != nullptr ? direct + (image * q.h + y0) * q.w * stride : copy + copy_size;
            for (const Part<T>& part : parts.parts) {
                T* const result = one ? f : copy + copy_size + f_size;
                convolve({in, part.weight.data(), result, offset.data(),
                          int64_t(offset.size()), y1 - y0, q.w, q.cin, part.channels, x_stride, part.last});
                for (int64_t p = 0; !one && p < (y1 - y0) * q.w; ++p) {
                    for (size_t c = 0; c < part.outputs.size(); ++c) {
                        f[p * stride + part.outputs[c]] = result[p * part.channels + c];
                    }
                }
            }
            finish(image, y0, y1, f, stride);
        }
    });
}

}  // namespace

template <typename T>
void masked_conv(const MaskedConv& q, const T* x, const T* weight, const T* bias, const T* condition, bool spatial,
                 Gate gate, T* out, T* f) {
    const int64_t groups = q.colours.groups, pixels = q.h * q.w;
    const Parts<T> parts = parts_of<T>(
        int64_t(q.taps.size()), grouped(q.cin, groups, [&](int64_t c) { return q.input_group(c); }),
        grouped(q.cout, groups, [&](int64_t c) { return q.output_group(c); }),
        [&](int64_t t, int64_t ci, int64_t co) { return weight[(t * q.cin + ci) * q.cout + co]; },
        [&](int64_t g) { return groups == 1 || q.colours.own ? g + 1 : g; });
    if (gate == Gate::none) f = out;
    const auto gate_pixels = BEST(gate_pixels<T>);
    const auto finish = BEST(finish_pixels<T>);
    convolve_images(q, x, parts, f, [&](int64_t image, int64_t y0, int64_t y1, T* result, int64_t stride) {
        const int64_t first = image * pixels + y0 * q.w, count = (y1 - y0) * q.w;
        const T* here = condition == nullptr ? nullptr : condition + (spatial ? first : image) * q.cout;
        finish(result, stride, count, q.cout, bias, here, spatial ? q.cout : 0, f == nullptr ? nullptr : f + first * q.cout);
        if (gate != Gate::none) {
            gate_pixels(gate, count, q.cout / 2, result, stride, out + first * (q.cout / 2));
        }
    });
}

template <typename T>
void gate_gradient(int64_t pixels, int64_t cout, Gate gate, const T* f, const T* out_gradient, const T* extra,
                   T* f_gradient) {
    const auto run = BEST(gate_gradient_pixels<T>);
    at::parallel_for(0, pixels, std::max<int64_t>(1, 16384 / cout), [&](int64_t begin, int64_t end) {
        run(gate, end - begin, cout / 2, f + begin * cout, out_gradient + begin * (cout / 2),
            extra == nullptr ? nullptr : extra + begin * cout, f_gradient + begin * cout);
    });
}

namespace {

template <typename T>
void input_gradient(const MaskedConv& q, const T* weight, const T* f_gradient, T* x_gradient) {
    const int64_t groups = q.colours.groups;
    MaskedConv mirrored{q.n, q.h, q.w, q.cout, q.cin, q.taps, {}, false};
    for (Tap& t : mirrored.taps) t = {-t.dy, -t.dx};
    auto outputs = grouped(q.cout, groups, [&](int64_t c) { return q.output_group(c); });
    std::reverse(outputs.begin(), outputs.end());  // the last group sees every input
    const Parts<T> parts = parts_of<T>(
        int64_t(q.taps.size()), outputs, grouped(q.cin, groups, [&](int64_t c) { return q.input_group(c); }),
        [&](int64_t t, int64_t co, int64_t ci) { return weight[(t * q.cin + ci) * q.cout + co]; },
        [&](int64_t g) { return groups == 1 || q.colours.own ? groups - g : groups - g - 1; });
    convolve_images(mirrored, f_gradient, parts, x_gradient,
                    [&](int64_t image, int64_t y0, int64_t y1, T* result, int64_t stride) {
                        T* to = x_gradient + (image * q.h + y0) * q.w * q.cin;
                        for (int64_t p = 0; result != to && p < (y1 - y0) * q.w; ++p) {
                            std::copy_n(result + p * stride, q.cin, to + p * q.cin);
                        }
                    });
}

template <typename T>
void weight_gradient(const MaskedConv& q, const T* x, const T* f_gradient, T* out) {
    const int64_t channels = round_up(q.cout, lanes<T>()), k = int64_t(q.taps.size()) * q.cin;
    const Margin margin(q.taps);
    const int64_t x_stride = margin.stride(q.w, q.cin), step = std::max<int64_t>(1, std::min(
        q.h, kImageBytes / int64_t(sizeof(T)) / x_stride - margin.top - margin.bottom));
    std::vector<int64_t> offset;
    for (const int64_t tap : offsets(q.taps, x_stride, q.cin)) {
        for (int64_t ci = 0; ci < q.cin; ++ci) offset.push_back(tap + ci);
    }
    const int64_t groups = std::min(q.n, kGroups), threads = at::get_num_threads();
    const int64_t copy_size = round_up(margin.size(step, q.w, q.cin), 64);
    const int64_t g_size = channels == q.cout ? 0 : round_up(step * q.w * channels, 64);
    Workspace workspace;
    T* const sums = reinterpret_cast<T*>(
        workspace.reserve(size_t(groups * k * channels + threads * (copy_size + g_size)) * sizeof(T)));
    T* const copies = sums + groups * k * channels;
    const auto run = BEST(weight_products<T>);
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
        T* const copy = copies + at::get_thread_num() * (copy_size + g_size);
        for (int64_t group = begin; group < end; ++group) {
            T* const sum = sums + group * k * channels;
            std::fill_n(sum, k * channels, T(0));
            for (int64_t image = q.n * group / groups; image < q.n * (group + 1) / groups; ++image) {
                for (int64_t y0 = 0; y0 < q.h; y0 += step) {
                    const int64_t y1 = std::min(y0 + step, q.h);
                    const T* in = x + (image * q.h + y0) * q.w * q.cin;
                    if (!margin.none()) {
                        margin.copy(x + image * q.h * q.w * q.cin, q.h, q.w, q.cin, y0, y1, {}, copy);
                        in = copy + margin.origin(q.w, q.cin);
                    }
                    const T* g = f_gradient + (image * q.h + y0) * q.w * q.cout;
                    if (g_size > 0) {
                        T* const wide = copy + copy_size;
                        for (int64_t p = 0; p < (y1 - y0) * q.w; ++p) {
                            std::fill_n(std::copy_n(g + p * q.cout, q.cout, wide + p * channels), channels - q.cout, T(0));
                        }
                        g = wide;
                    }
                    run({in, g, sum, offset.data(), k, y1 - y0, q.w, q.cin, channels,
                         x_stride, channels});
                }
            }
        }
    });
    const int64_t centre = k - q.cin;  // the last tap, of which colours may hide blocks
    const auto add_parts = BEST(add_parts<T>);
    at::parallel_for(0, k, std::max<int64_t>(1, 16384 / channels), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            add_parts(sums + row * channels, groups, k * channels, q.cout, out + row * q.cout);
            for (int64_t c = 0; q.colours.groups > 1 && row >= centre && c < q.cout; ++c) {
                if (!q.colours.sees(q.output_group(c), q.input_group(row - centre))) out[row * q.cout + c] = T(0);
            }
        }
    });
}

template <typename T>
void pixel_sums(const MaskedConv& q, const T* f_gradient, T* sums) {
    const auto add = BEST(add_pixels<T>);
    at::parallel_for(0, q.n, 1, [&](int64_t begin, int64_t end) {
        std::vector<T> row(q.cout);
        std::vector<double> total(q.cout);
        for (int64_t image = begin; image < end; ++image) {
            std::fill(total.begin(), total.end(), 0.0);
            for (int64_t y = 0; y < q.h; ++y) {
                add(f_gradient + (image * q.h + y) * q.w * q.cout, q.w, q.cout, row.data(), total.data());
            }
            for (int64_t c = 0; c < q.cout; ++c) sums[image * q.cout + c] = T(total[c]);
        }
    });
}

}  // namespace

template <typename T>
void masked_conv_gradients(const MaskedConv& q, const T* x, const T* weight, const T* f_gradient, T* x_gradient,
                           T* weight_out, T* sums) {
    if (x_gradient != nullptr) input_gradient(q, weight, f_gradient, x_gradient);
    if (weight_out != nullptr) weight_gradient(q, x, f_gradient, weight_out);
    if (sums != nullptr) pixel_sums(q, f_gradient, sums);
}

#define INSTANTIATE(T)                                                                                              \
    template void masked_conv<T>(const MaskedConv&, const T*, const T*, const T*, const T*, bool, Gate, T*, T*);    \
    template void gate_gradient<T>(int64_t, int64_t, Gate, const T*, const T*, const T*, T*);                                 \
    template void masked_conv_gradients<T>(const MaskedConv&, const T*, const T*, const T*, T*, T*, T*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace infovae_fast
