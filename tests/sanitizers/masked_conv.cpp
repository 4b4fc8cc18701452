// Runs `masked_conv` and its gradients on many problems and compares with the formulas of masked_conv.h, tap by tap in
// double.
//
//     masked_conv threads        prints the vector unit and how many problems ran; 1 if a result is wrong
#include "masked_conv.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "values.h"

using namespace infovae_fast;

namespace {

int problems = 0, wrong = 0;

// A sum with the size of its terms.
struct Sums {
    Values value, size;
    explicit Sums(int64_t count) : value(count, 0.0), size(count, 0.0) {}
    void add(int64_t k, double term) { value[k] += term, size[k] += std::abs(term); }
    double largest() const { return size.empty() ? 0 : *std::max_element(size.begin(), size.end()); }
};

struct Problem {
    MaskedConv q;
    Gate gate;
    bool spatial, with_bias, with_condition, with_extra, keep_f;
    int64_t links;
    Values x, weight, bias, condition, link, link_weight, upstream, extra;

    int64_t pixels() const { return q.n * q.h * q.w; }
    int64_t outs() const { return gate == Gate::none ? q.cout : q.cout / 2; }

    Problem(Random& random, int64_t n, int64_t h, int64_t w, int64_t cin, int64_t cout, int groups, Gate with)
        : q{n, h, w, cin, cout, {}, {groups, random() % 2 == 0, random() % 2 == 0}, with != Gate::none}, gate(with) {
        const int64_t r = int64_t(random() % 3);
        for (int64_t dy = -r; dy <= 0; ++dy) {
            for (int64_t dx = -r; dx <= (dy == 0 ? -1 : r); ++dx) {
                if (random() % 3 > 0) q.taps.push_back({std::max(dy, -h), std::max(std::min(dx, w), -w)});
            }
        }
        q.taps.push_back({0, 0});
        spatial = random() % 2, with_bias = random() % 2, with_condition = random() % 2, keep_f = random() % 2;
        with_extra = gate != Gate::none && random() % 2, links = random() % 2 ? 0 : int64_t(1 + random() % 20);
        x = normal(random, pixels() * cin), weight = normal(random, int64_t(q.taps.size()) * cin * cout, 0.3);
        bias = normal(random, cout), condition = normal(random, spatial ? pixels() * cout : n * cout);
        link = normal(random, pixels() * links), link_weight = normal(random, links * cout, 0.3);
        upstream = normal(random, pixels() * outs()), extra = normal(random, pixels() * cout);
    }

    // Calls term(output pixel, input pixel, tap) for all that meet.
    template <typename F>
    void each(F term) const {
        for (int64_t p = 0; p < pixels(); ++p) {
            const int64_t y = p / q.w % q.h, column = p % q.w;
            for (size_t t = 0; t < q.taps.size(); ++t) {
                const int64_t yy = y + q.taps[t].dy, xx = column + q.taps[t].dx;
                if (yy < 0 || yy >= q.h || xx < 0 || xx >= q.w) continue;
                term(p, p + q.taps[t].dy * q.w + q.taps[t].dx, int64_t(t));
            }
        }
    }
    bool seen(int64_t t, int64_t ci, int64_t co) const {
        return t + 1 < int64_t(q.taps.size()) || q.colours.sees(q.output_group(co), q.input_group(ci));
    }
};

void compare(const char* name, const Problem& p, const Values& truth, double largest, const float* f, const double* d) {
    for (size_t k = 0; k < truth.size(); ++k) {
        const double got = f != nullptr ? double(f[k]) : d[k], tolerance = f != nullptr ? 1e-5 : 1e-12;
        if (std::abs(got - truth[k]) <= tolerance * largest) continue;
        std::fprintf(stderr, "%s of [%d, %d, %d] %d -> %d, %d taps, %d groups, gate %d, link %d: [%zu] is %.17g, not %.17g\n",
                     name, int(p.q.n), int(p.q.h), int(p.q.w), int(p.q.cin), int(p.q.cout), int(p.q.taps.size()),
                     int(p.q.colours.groups), int(p.gate), int(p.links), k, got, truth[k]);
        ++wrong;
        return;
    }
}

template <typename T>
void compare(const char* name, const Problem& p, const Values& truth, double largest, const Array<T>& got) {
    if (got == nullptr) return;
    if constexpr (sizeof(T) == 4) {
        compare(name, p, truth, largest, got, nullptr);
    } else {
        compare(name, p, truth, largest, nullptr, got);
    }
}

template <typename T>
void run(const Problem& p, Random& random) {
    const MaskedConv& q = p.q;
    const bool gated = p.gate != Gate::none;
    const Array<T> x(p.x), weight(p.weight), bias(p.bias, p.with_bias), condition(p.condition, p.with_condition);
    const Array<T> link(p.link, p.links > 0), link_weight(p.link_weight, p.links > 0);
    const Link<T> links{link, link_weight, p.links};

    Sums f(p.pixels() * q.cout);
    p.each([&](int64_t to, int64_t from, int64_t t) {
        for (int64_t ci = 0; ci < q.cin; ++ci) {
            for (int64_t co = 0; co < q.cout; ++co) {
                if (p.seen(t, ci, co)) f.add(to * q.cout + co, p.x[from * q.cin + ci] * p.weight[(t * q.cin + ci) * q.cout + co]);
            }
        }
    });
    for (int64_t pixel = 0; pixel < p.pixels(); ++pixel) {
        const int64_t image = pixel / (q.h * q.w);
        for (int64_t co = 0; co < q.cout; ++co) {
            if (p.with_bias) f.add(pixel * q.cout + co, p.bias[co]);
            if (p.with_condition) f.add(pixel * q.cout + co, p.condition[(p.spatial ? pixel : image) * q.cout + co]);
            for (int64_t k = 0; k < p.links; ++k) {
                f.add(pixel * q.cout + co, p.link[pixel * p.links + k] * p.link_weight[k * q.cout + co]);
            }
        }
    }
    Values out(f.value), to_f(p.upstream);
    if (gated) {
        const int64_t half = q.cout / 2;
        out.resize(p.pixels() * half), to_f.resize(p.pixels() * q.cout);
        for (int64_t pixel = 0; pixel < p.pixels(); ++pixel) {
            for (int64_t c = 0; c < half; ++c) {
                const int64_t at_a = pixel * q.cout + c, at_b = at_a + half;
                const double a = f.value[at_a], b = f.value[at_b], g = p.upstream[pixel * half + c];
                const double first = p.gate == Gate::tanh ? std::tanh(a) : a, sigmoid = 1 / (1 + std::exp(-b));
                out[pixel * half + c] = first * sigmoid;
                to_f[at_a] = g * (p.gate == Gate::tanh ? 1 - first * first : 1) * sigmoid + (p.with_extra ? p.extra[at_a] : 0);
                to_f[at_b] = g * first * sigmoid * (1 - sigmoid) + (p.with_extra ? p.extra[at_b] : 0);
            }
        }
    }
    const Array<T> result(out.size(), true), kept(f.value.size(), gated && p.keep_f);
    masked_conv<T>(q, x, weight, links, bias, condition, p.spatial, p.gate, result, kept);
    compare("out", p, out, f.largest(), result);
    compare("f", p, f.value, f.largest(), kept);

    Sums to_x(p.x.size()), to_weight(p.weight.size()), to_link(p.link.size()), to_link_weight(p.link_weight.size());
    Sums to_bias(q.cout), to_condition(q.n * q.cout);
    p.each([&](int64_t to, int64_t from, int64_t t) {
        for (int64_t ci = 0; ci < q.cin; ++ci) {
            for (int64_t co = 0; co < q.cout; ++co) {
                if (!p.seen(t, ci, co)) continue;
                const int64_t w = (t * q.cin + ci) * q.cout + co;
                to_x.add(from * q.cin + ci, to_f[to * q.cout + co] * p.weight[w]);
                to_weight.add(w, to_f[to * q.cout + co] * p.x[from * q.cin + ci]);
            }
        }
    });
    for (int64_t pixel = 0; pixel < p.pixels(); ++pixel) {
        for (int64_t co = 0; co < q.cout; ++co) {
            const double g = to_f[pixel * q.cout + co];
            to_bias.add(co, g), to_condition.add(pixel / (q.h * q.w) * q.cout + co, g);
            for (int64_t k = 0; k < p.links; ++k) {
                to_link.add(pixel * p.links + k, g * p.link_weight[k * q.cout + co]);
                to_link_weight.add(k * q.cout + co, g * p.link[pixel * p.links + k]);
            }
        }
    }
    const auto wanted = [&] { return random() % 3 > 0; };
    const Array<T> f_in(f.value, gated), upstream(p.upstream), extra(p.extra, p.with_extra);
    const Array<T> gx(to_x.value.size(), wanted()), gw(to_weight.value.size(), wanted());
    const Array<T> gl(to_link.value.size(), p.links > 0 && wanted()), gm(to_link_weight.value.size(), p.links > 0 && wanted());
    const Array<T> gf(to_f.size(), gated && wanted());
    const Array<T> gb(to_bias.value.size(), wanted()), gc(to_condition.value.size(), wanted());
    masked_conv_gradients<T>(q, x, weight, links, p.gate, f_in, upstream, extra, {gx, gw, gl, gm, gf, gb, gc});
    double largest = 0;
    for (const double g : to_f) largest = std::max(largest, std::abs(g));
    compare("x_gradient", p, to_x.value, to_x.largest(), gx);
    compare("weight_gradient", p, to_weight.value, to_weight.largest(), gw);
    compare("link_gradient", p, to_link.value, to_link.largest(), gl);
    compare("link_weight_gradient", p, to_link_weight.value, to_link_weight.largest(), gm);
    compare("f_gradient", p, to_f, largest, gf);
    compare("bias_gradient", p, to_bias.value, to_bias.largest(), gb);
    compare("condition_gradient", p, to_condition.value, to_condition.largest(), gc);
    ++problems;
}

}  // namespace

int main(int, char** arguments) {
    at::threads = std::atoi(arguments[1]);
    Random random(1);
    const int64_t channels[] = {1, 2, 3, 6, 12, 17, 24, 34, 48, 66};
    for (int k = 0; k < 150; ++k) {
        const Gate gate = Gate(k % 3);
        const int groups = k % 4 == 3 ? 3 : 1;
        const int64_t cin = groups * channels[random() % 7], cout = 2 * groups * channels[random() % 5];
        const int64_t n = k % 10 == 0 ? 40 : int64_t(1 + random() % 5);  // 40: several images in a group of sums
        const int64_t h = int64_t(1 + random() % 7), w = int64_t(1 + random() % 9);
        const Problem problem(random, n, h, w, cin, cout, groups, gate);
        run<float>(problem, random);
        run<double>(problem, random);
    }
    for (const Gate gate : {Gate::none, Gate::tanh}) {  // more rows than a copy holds
        const Problem problem(random, 1, 400, 12, 48, 2, 1, gate);
        run<float>(problem, random);
    }
    return report(problems, wrong);
}
