// Masked convolution on the CPU. A row of an output is, for each tap, a product of a row of the input, moved by the tap,
// and a matrix: [w, cin] x [cin, cout], summed in registers over the taps. The image stands in a copy with a margin of
// zeros, so that no tap meets an edge; masked pixels are in that copy too, and no product reads them. A kernel of one
// pixel needs none, unless channels have to be sorted: with colours the last tap reads fewer channels for earlier groups.
// The product of a link is added to the sums.
//
// The gradient to x is the same convolution of the gradient to f, with taps and matrices transposed. That to weight is,
// for each row k = (tap, input channel) of it, sum_p x[p + t, ci] g[p, :]: rows share the loads of g.
#include "masked_conv.h"

#include <ATen/Parallel.h>

#include "layers.h"

namespace infovae_fast {
namespace {

constexpr int64_t kDepth = 256;  // products that are summed in a register before they are added to the rest
constexpr int64_t kImageBytes = 64 << 10;  // of the copy with margins: it and what is made of it should stay in the cache
// Groups of images, whose gradients to weight are summed apart: not as many as there are threads, but as the memory allows.
constexpr int64_t kFewestGroups = 16, kMostGroups = 32, kGroupNumbers = int64_t(1) << 22;

template <typename T>
struct ConvRows {
    const T *x, *weight;  // the copy at the first row, [taps, cin, channels]
    T* f;                 // [rows, w, channels]
    const int64_t* offset;  // of each tap in the copy
    int64_t taps, rows, w, cin, channels, x_stride;
    int64_t last;  // input channels that the last tap reads
    const T *link, *link_weight;  // [rows, w, link_channels], [link_channels, channels], or null
    int64_t link_channels;
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
    std::vector<T> link_weight = {};  // [link channels, channels]
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

// A convolution of rows y0..y1 of an image, `step` at a time at most: f [y1 - y0, w, stride].
template <typename T>
struct Convolution {
    MaskedConv q;
    Margin margin;
    Parts<T> parts;
    Link<T> link;
    int64_t x_stride, step, stride, copy_size, f_size, size;  // `size` of the memory that a thread needs
    std::vector<int64_t> offset;

    Convolution(const MaskedConv& conv, Parts<T> with, const Link<T>& and_link)
        : q(conv), margin(q.taps), parts(std::move(with)), link(and_link) {
        x_stride = margin.stride(q.w, q.cin);
        step = rows_of_a_task<T>(margin, q.n, q.h, q.w, q.cin);
        offset = offsets(q.taps, x_stride, q.cin);
        stride = one() ? parts.parts[0].channels : q.cout;
        int64_t widest = 0;
        for (Part<T>& part : parts.parts) {
            widest = std::max(widest, part.channels);
            part.link_weight.resize(link.channels * part.channels);
            for (int64_t k = 0; k < link.channels; ++k) {
                for (size_t c = 0; c < part.outputs.size(); ++c) {
                    part.link_weight[k * part.channels + c] = link.weight[k * q.cout + part.outputs[c]];
                }
            }
        }
        copy_size = round_up(margin.size(step, q.w, q.cin), 64), f_size = round_up(step * q.w * stride, 64);
        size = copy_size + f_size + (one() ? 0 : round_up(step * q.w * widest, 64));
    }

    bool one() const { return parts.parts.size() == 1; }

    // x is the whole image `number`. f goes to `direct`, if that is not null and nothing has to be moved, or to memory.
    T* rows(const T* x, int64_t number, int64_t y0, int64_t y1, T* direct, T* memory) const {
        const T* in = x + y0 * q.w * q.cin;
        if (!margin.none() || !parts.order.empty()) {
            margin.copy(x, q.h, q.w, q.cin, y0, y1, parts.order, memory);
            in = memory + margin.origin(q.w, q.cin);
        }
        T* const f = direct != nullptr && stride == q.cout ? direct : memory + copy_size;
        const T* links = link.values == nullptr ? nullptr : link.values + (number * q.h + y0) * q.w * link.channels;
        for (const Part<T>& part : parts.parts) {
            T* const result = one() ? f : memory + copy_size + f_size;
            BEST(convolve<T>)({in, part.weight.data(), result, offset.data(), int64_t(offset.size()), y1 - y0, q.w, q.cin,
                               part.channels, x_stride, part.last, links, part.link_weight.data(), link.channels});
            for (int64_t p = 0; !one() && p < (y1 - y0) * q.w; ++p) {
                for (size_t c = 0; c < part.outputs.size(); ++c) {
                    f[p * stride + part.outputs[c]] = result[p * part.channels + c];
                }
            }
        }
        return f;
    }

    // The same of all images, on all threads, for finish(image, y0, y1, f) to make of it what is wanted.
    template <typename Finish>
    void images(const T* x, T* direct, Finish finish) const {
        const int64_t blocks = (q.h + step - 1) / step, pixels = q.h * q.w;
        Workspace workspace;
        T* const memory = reinterpret_cast<T*>(workspace.reserve(size_t(at::get_num_threads() * size) * sizeof(T)));
        at::parallel_for(0, q.n * blocks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                const int64_t image = task / blocks, y0 = task % blocks * step, y1 = std::min(y0 + step, q.h);
                T* const to = direct == nullptr ? nullptr : direct + (image * pixels + y0 * q.w) * q.cout;
                T* const mine = memory + at::get_thread_num() * size;
                finish(image, y0, y1, rows(x + image * pixels * q.cin, image, y0, y1, to, mine));
            }
        });
    }
};

}  // namespace

template <typename T>
void masked_conv(const MaskedConv& q, const T* x, const T* weight, const Link<T>& link, const T* bias,
                 const T* condition, bool spatial, Gate gate, T* out, T* f) {
    const int64_t groups = q.colours.groups, pixels = q.h * q.w;
    const Convolution<T> convolution(
        q,
        parts_of<T>(
            int64_t(q.taps.size()), grouped(q.cin, groups, [&](int64_t c) { return q.input_group(c); }),
            grouped(q.cout, groups, [&](int64_t c) { return q.output_group(c); }),
            [&](int64_t t, int64_t ci, int64_t co) { return weight[(t * q.cin + ci) * q.cout + co]; },
            [&](int64_t g) { return groups == 1 || q.colours.own ? g + 1 : g; }),
        link);
    if (gate == Gate::none) f = out;
    const auto gate_pixels = BEST(gate_pixels<T>);
    const auto finish = BEST(finish_pixels<T>);
    convolution.images(x, f, [&](int64_t image, int64_t y0, int64_t y1, T* result) {
        const int64_t first = image * pixels + y0 * q.w, count = (y1 - y0) * q.w;
        const T* here = condition == nullptr ? nullptr : condition + (spatial ? first : image) * q.cout;
        finish(result, convolution.stride, count, q.cout, bias, here, spatial ? q.cout : 0,
               f == nullptr ? nullptr : f + first * q.cout);
        if (gate != Gate::none) {
            gate_pixels(gate, count, q.cout / 2, result, convolution.stride, out + first * (q.cout / 2));
        }
    });
}

namespace {

// That to x of the gradients, as a convolution of the gradient to f.
template <typename T>
Convolution<T> input_gradient(const MaskedConv& q, const T* weight) {
    const int64_t groups = q.colours.groups;
    MaskedConv mirrored{q.n, q.h, q.w, q.cout, q.cin, q.taps, {}, false};
    for (Tap& t : mirrored.taps) t = {-t.dy, -t.dx};
    auto outputs = grouped(q.cout, groups, [&](int64_t c) { return q.output_group(c); });
    std::reverse(outputs.begin(), outputs.end());  // the last group sees every input
    return Convolution<T>(
        mirrored,
        parts_of<T>(
            int64_t(q.taps.size()), outputs, grouped(q.cin, groups, [&](int64_t c) { return q.input_group(c); }),
            [&](int64_t t, int64_t co, int64_t ci) { return weight[(t * q.cin + ci) * q.cout + co]; },
            [&](int64_t g) { return groups == 1 || q.colours.own ? groups - g : groups - g - 1; }),
        Link<T>{});
}

// The gradient to the input, rows y0..y1 of one image, where f_gradient is of that image, to x_gradient of it.
template <typename T>
void input_rows(const Convolution<T>& convolution, const T* f_gradient, int64_t y0, int64_t y1, T* x_gradient, T* memory) {
    const int64_t w = convolution.q.w, channels = convolution.q.cout;
    T* const to = x_gradient + y0 * w * channels;
    const T* result = convolution.rows(f_gradient, 0, y0, y1, to, memory);
    for (int64_t p = 0; result != to && p < (y1 - y0) * w; ++p) {
        std::copy_n(result + p * convolution.stride, channels, to + p * channels);
    }
}

// That to the weight, in sums of groups of images.
template <typename T>
struct WeightGradient {
    const MaskedConv q;
    const Margin margin;
    int64_t k, channels, x_stride, step, copy_size, g_size;
    std::vector<int64_t> offset;

    explicit WeightGradient(const MaskedConv& conv) : q(conv), margin(q.taps) {
        k = int64_t(q.taps.size()) * q.cin, channels = round_up(q.cout, lanes<T>());
        x_stride = margin.stride(q.w, q.cin);
        const int64_t fit = kImageBytes / int64_t(sizeof(T)) / x_stride - margin.top - margin.bottom;
        step = std::max<int64_t>(1, std::min(q.h, fit));
        for (const int64_t tap : offsets(q.taps, x_stride, q.cin)) {
            for (int64_t ci = 0; ci < q.cin; ++ci) offset.push_back(tap + ci);
        }
        copy_size = round_up(margin.size(step, q.w, q.cin), 64);
        g_size = channels == q.cout ? 0 : round_up(step * q.w * channels, 64);
    }
    int64_t size() const { return copy_size + g_size; }       // of the memory that a thread needs
    int64_t sum_size() const { return round_up(k * channels, 64); }

    // Adds an image's to the sum.
    void image(const T* x, const T* f_gradient, T* sum, T* memory) const {
        for (int64_t y0 = 0; y0 < q.h; y0 += step) {
            const int64_t y1 = std::min(y0 + step, q.h);
            const T* in = x + y0 * q.w * q.cin;
            if (!margin.none()) {
                margin.copy(x, q.h, q.w, q.cin, y0, y1, {}, memory);
                in = memory + margin.origin(q.w, q.cin);
            }
            const T* g = f_gradient + y0 * q.w * q.cout;
            if (g_size > 0) {
                T* const wide = memory + copy_size;
                for (int64_t p = 0; p < (y1 - y0) * q.w; ++p) {
                    std::fill_n(std::copy_n(g + p * q.cout, q.cout, wide + p * channels), channels - q.cout, T(0));
                }
                g = wide;
            }
            BEST(weight_products<T>)({in, g, sum, offset.data(), k, y1 - y0, q.w, q.cin, channels, x_stride, channels});
        }
    }

    // The sum of the groups' sums, which start `apart` numbers from each other.
    void finish(const T* sums, int64_t groups, int64_t apart, T* out) const {
        const int64_t centre = k - q.cin;  // the last tap, of which colours may hide blocks
        at::parallel_for(0, k, std::max<int64_t>(1, 16384 / channels), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                BEST(add_parts<T>)(sums + row * channels, groups, apart, q.cout, out + row * q.cout);
                for (int64_t c = 0; q.colours.groups > 1 && row >= centre && c < q.cout; ++c) {
                    if (!q.colours.sees(q.output_group(c), q.input_group(row - centre))) out[row * q.cout + c] = T(0);
                }
            }
        });
    }
};

template <typename T>
void pixel_sums(const MaskedConv& q, const T* f_gradient, T* sums) {
    std::vector<T> row(q.cout);
    std::vector<double> total(q.cout, 0.0);
    for (int64_t y = 0; y < q.h; ++y) {
        BEST(add_pixels<T>)(f_gradient + y * q.w * q.cout, q.w, q.cout, row.data(), total.data());
    }
    for (int64_t c = 0; c < q.cout; ++c) sums[c] = T(total[c]);
}

}  // namespace

// An image at a time, so that its gradient to f is in the cache for all that is made of it. Where images are few for the
// threads, the gradients to f are made before and those to the inputs after, rows of images by rows.
template <typename T>
void masked_conv_gradients(const MaskedConv& q, const T* x, const T* weight, const Link<T>& link, Gate gate, const T* f,
                           const T* out_gradient, const T* extra, const ConvGradients<T>& result) {
    const int64_t pixels = q.h * q.w, threads = at::get_num_threads();
    const bool gated = gate != Gate::none;
    const MaskedConv beside{q.n, q.h, q.w, link.channels, q.cout, {{0, 0}}, {}, false};
    std::vector<std::pair<Convolution<T>, T*>> inputs;
    std::vector<std::tuple<WeightGradient<T>, const T*, T*>> weights;
    if (result.x != nullptr) inputs.emplace_back(input_gradient(q, weight), result.x);
    if (result.link != nullptr) inputs.emplace_back(input_gradient(beside, link.weight), result.link);
    if (result.weight != nullptr) weights.emplace_back(WeightGradient<T>(q), x, result.weight);
    if (result.link_weight != nullptr) weights.emplace_back(WeightGradient<T>(beside), link.values, result.link_weight);

    int64_t scratch = 0, sums_size = 0;
    for (const auto& input : inputs) scratch = std::max(scratch, input.first.size);
    for (const auto& one : weights) {
        scratch = std::max(scratch, std::get<0>(one).size());
        sums_size += std::get<0>(one).sum_size();
    }
    const int64_t fit = kGroupNumbers / std::max<int64_t>(sums_size, 1);
    const int64_t groups = std::min(q.n, clamp(fit, kFewestGroups, kMostGroups));
    const bool apart = groups % threads != 0 && groups < 4 * threads;
    const int64_t image_size = apart ? pixels * q.cout : round_up(pixels * q.cout, 64);
    const bool store = gated && result.f == nullptr;  // the gradient to f is for us alone
    Workspace workspace;
    T *sums = nullptr, *own_f = nullptr, *working = nullptr, *image_sums = nullptr;
    Carver memory{nullptr};
    const auto carve = [&] {
        sums = memory.take<T>(groups * sums_size);
        own_f = memory.take<T>(store ? (apart ? q.n : threads) * image_size : 0);
        working = memory.take<T>(threads * scratch);
        image_sums = memory.take<T>(result.of_pixels() ? q.n * q.cout : 0);
    };
    carve();
    memory = Carver{workspace.reserve(memory.used)};
    carve();

    T* const to_f = store ? own_f : result.f;
    const auto make_f = [&](int64_t first, int64_t count, T* to) {  // the gradient to f of some pixels
        BEST(gate_gradient_pixels<T>)(gate, count, q.cout / 2, f + first * q.cout, out_gradient + first * (q.cout / 2),
                                      extra == nullptr ? nullptr : extra + first * q.cout, to);
    };
    const auto f_gradient_of = [&](int64_t image) -> const T* {
        if (!gated) return out_gradient + image * pixels * q.cout;
        if (apart) return to_f + image * image_size;
        T* const here = store ? own_f + at::get_thread_num() * image_size : to_f + image * pixels * q.cout;
        make_f(image * pixels, pixels, here);
        return here;
    };
    const auto to_inputs = [&](const Convolution<T>& input, T* to, int64_t image, const T* g, int64_t y0) {
        input_rows(input, g, y0, std::min(y0 + input.step, q.h), to + image * pixels * input.q.cout,
                   working + at::get_thread_num() * scratch);
    };
    if (apart && gated) {
        at::parallel_for(0, q.n * pixels, std::max<int64_t>(1, 16384 / q.cout), [&](int64_t begin, int64_t end) {
            make_f(begin, end - begin, to_f + begin * q.cout);
        });
    }
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
        T* const mine = working + at::get_thread_num() * scratch;
        for (int64_t group = begin; group < end; ++group) {
            std::fill_n(sums + group * sums_size, sums_size, T(0));
            for (int64_t image = q.n * group / groups; image < q.n * (group + 1) / groups; ++image) {
                const T* g = f_gradient_of(image);
                if (result.of_pixels()) pixel_sums(q, g, image_sums + image * q.cout);
                for (const auto& [input, to] : inputs) {
                    for (int64_t y0 = 0; !apart && y0 < q.h; y0 += input.step) to_inputs(input, to, image, g, y0);
                }
                T* sum = sums + group * sums_size;
                for (const auto& [gradient, values, to] : weights) {
                    gradient.image(values + image * pixels * gradient.q.cin, g, sum, mine);
                    sum += gradient.sum_size();
                }
            }
        }
    });
    for (const auto& [input, to] : inputs) {
        if (!apart) break;
        const int64_t blocks = (q.h + input.step - 1) / input.step;
        const Convolution<T>& convolution = input;  // a lambda cannot hold what a binding names
        T* const result_of = to;
        at::parallel_for(0, q.n * blocks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                const int64_t image = task / blocks;
                to_inputs(convolution, result_of, image, f_gradient_of(image), task % blocks * convolution.step);
            }
        });
    }
    if (result.condition != nullptr) std::copy_n(image_sums, q.n * q.cout, result.condition);
    for (int64_t c = 0; result.bias != nullptr && c < q.cout; ++c) {
        double sum = 0;
        for (int64_t image = 0; image < q.n; ++image) sum += double(image_sums[image * q.cout + c]);
        result.bias[c] = T(sum);
    }
    int64_t before = 0;
    for (const auto& [gradient, values, to] : weights) {
        gradient.finish(sums + before, groups, sums_size, to);
        before += gradient.sum_size();
    }
}

#define INSTANTIATE(T)                                                                                                \
    template void masked_conv<T>(const MaskedConv&, const T*, const T*, const Link<T>&, const T*, const T*, bool, Gate, \
                                 T*, T*);                                                                             \
    template void masked_conv_gradients<T>(const MaskedConv&, const T*, const T*, const Link<T>&, Gate, const T*,      \
                                           const T*, const T*, const ConvGradients<T>&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace infovae_fast
