// The energy with its first derivatives: what `_Energy` of infovae_fast/pairwise.py does for the other leaves, without
// the 0.1 ms that Python takes for it.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace infovae_fast {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Maybe = std::optional<Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Settings {
    bool rbf;
    at::ArrayRef<double> bandwidth;
    const Maybe& lengths;
    at::ArrayRef<double> weight;
    double alpha;
    at::ArrayRef<double> w;
};

Five pairwise(const Tensor& x, const Maybe& y, const Maybe& a, const Maybe& b, const Settings& s, bool x_force,
              bool y_force, bool potentials) {
    using Op = Five(const Tensor&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, bool, at::ArrayRef<double>,
                    const Maybe&, at::ArrayRef<double>, double, at::ArrayRef<double>, bool, bool, bool, bool);
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("infovae_fast::pairwise", "").typed<Op>();
    return op.call(x, y, {}, a, b, s.rbf, s.bandwidth, s.lengths, s.weight, s.alpha, s.w, true, x_force, y_force,
                   potentials);
}

bool needs_gradient(const Maybe& t) { return t.has_value() && t->defined() && t->requires_grad(); }

// The first argument, with an error in place of its derivative to the others.
struct Once : torch::autograd::Function<Once> {
    static Tensor forward(AutogradContext*, const Tensor& gradient, const Tensor&, const Maybe&, const Maybe&,
                          const Maybe&) {
        return gradient.clone();
    }
    static variable_list backward(AutogradContext*, const variable_list&) {
        TORCH_CHECK(false, "this backend gives first derivatives; use backend='reference' to differentiate twice");
    }
};

struct Energy : torch::autograd::Function<Energy> {
    static constexpr bool is_traceable = true;

    static Tensor forward(AutogradContext* context, const Tensor& x, const Maybe& y, const Maybe& a, const Maybe& b,
                          const Settings& settings) {
        const bool need[] = {x.requires_grad(), needs_gradient(y), needs_gradient(a), needs_gradient(b)};
        const at::AutoDispatchBelowADInplaceOrView below;
        auto [energy, x_force, y_force, x_potential, y_potential] =
            pairwise(x, y, a, b, settings, need[0], need[1], need[2] || need[3]);
        const auto only = [](bool wanted, const Tensor& t) { return wanted ? t : Tensor(); };
        context->save_for_backward({only(need[0], x_force), only(need[1], y_force), only(need[2], x_potential),
                                    only(need[3], y_potential), x, y.value_or(Tensor()), a.value_or(Tensor()),
                                    b.value_or(Tensor())});
        return energy;
    }

    static variable_list backward(AutogradContext* context, const variable_list& gradients) {
        const variable_list saved = context->get_saved_variables();
        const Tensor twice = gradients[0].mul(2);  // [...]
        variable_list out(5);
        for (int k = 0; k < 4; ++k) {
            const Tensor& half = saved[k];  // [..., N, D] or [..., N]
            if (!half.defined()) continue;
            Tensor factor = twice;
            if (factor.dim() > 0) {
                factor = factor.to(half.scalar_type());
                while (factor.dim() < half.dim()) factor = factor.unsqueeze(-1);
            }
            out[k] = half.mul(factor);
            if (at::GradMode::is_enabled()) {  // create_graph: what is differentiated again must not look constant
                const auto maybe = [](const Tensor& t) { return t.defined() ? Maybe(t) : Maybe(); };
                out[k] = Once::apply(out[k], saved[4], maybe(saved[5]), maybe(saved[6]), maybe(saved[7]));
            }
        }
        return out;
    }
};

Tensor energy(const Tensor& x, const Maybe& y, const Maybe& a, const Maybe& b, bool rbf, at::ArrayRef<double> bandwidth,
              const Maybe& lengths, at::ArrayRef<double> weight, double alpha, at::ArrayRef<double> w) {
    const Settings settings{rbf, bandwidth, lengths, weight, alpha, w};
    const bool gradient = x.requires_grad() || needs_gradient(y) || needs_gradient(a) || needs_gradient(b);
    if (gradient && at::GradMode::is_enabled()) return Energy::apply(x, y, a, b, settings);
    return std::get<0>(pairwise(x, y, a, b, settings, false, false, false));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(infovae_fast, m) {
    // The energy of `pairwise`, differentiable once to x, y, a and b.
    m.def("energy(Tensor x, Tensor? y, Tensor? a, Tensor? b, bool rbf, float[] bandwidth, Tensor? lengths, float[] weight, "
          "float alpha, float[] w) -> Tensor", {at::Tag::pt2_compliant_tag});
    m.impl("energy", torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd, energy));
}

}  // namespace infovae_fast
