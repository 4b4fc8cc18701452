// The operators with their first derivatives: what torch.autograd.Function does in Python, without the 0.1 ms it takes.
#include "autograd.h"

#include <ATen/EmptyTensor.h>
#include <ATen/FuncTorchTLS.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "pairwise.h"

namespace infovae_fast {
namespace {

using at::Tensor;
using c10::DispatchKey;
using torch::autograd::AutogradContext;
using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
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
    std::optional<double> constant = {};  // where inputs are `usual`: half the energy and this are wanted, in x's dtype
};

template <typename Op>
auto find(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
}

// A tensor of floats or doubles that no subclass has a part in.
bool plain(const Tensor& x) {
    constexpr c10::DispatchKeySet known({
        DispatchKey::ADInplaceOrView, DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU,
#ifdef WITH_CUDA
        DispatchKey::CUDA, DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA,
#endif
    });
    return (x.key_set() | known) == known && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble);
}

// No dispatch mode, functorch transform or tracer sees what is computed.
bool nothing_watches() {
    const auto included = c10::impl::tls_is_dispatch_key_included;
    return !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
           !included(DispatchKey::FuncTorchDynamicLayerFrontMode) && !included(DispatchKey::Tracer);
}

bool needs_gradient(const Maybe& t) { return t.has_value() && t->defined() && t->requires_grad(); }

Five by_dispatcher(const Tensor& x, const Maybe& y, const Maybe& a, const Maybe& b, const Settings& s, bool x_force,
              bool y_force, bool potentials) {
    using Op = Five(const Tensor&, const Maybe&, const Maybe&, const Maybe&, const Maybe&, bool, at::ArrayRef<double>,
                    const Maybe&, at::ArrayRef<double>, double, at::ArrayRef<double>, bool, bool, bool, bool);
    static const auto op = find<Op>("infovae_fast::pairwise");
    return op.call(x, y, {}, a, b, s.rbf, s.bandwidth, s.lengths, s.weight, s.alpha, s.w, true, x_force, y_force,
                   potentials);
}

// The same for `usual` inputs, without what a dispatcher would look at.
template <typename T>
Five usual_pairwise(const Tensor& x, const Tensor& y, const Settings& s, bool x_force, bool y_force) {
    const auto like = [](const Tensor& t, bool wanted) {
        return !wanted ? Tensor() : t.is_cuda() ? at::empty(t.sizes(), t.options())
                                                : Tensor(at::detail::empty_cpu(t.sizes(), t.scalar_type()));
    };
    const Tensor xs = x.contiguous(), ys = y.contiguous(), fx = like(x, x_force), fy = like(y, y_force);
    const auto result = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; };
    PairwiseProblem<T> problem{xs.const_data_ptr<T>(), ys.const_data_ptr<T>(), nullptr, nullptr, nullptr, x.size(0),
                               y.size(0), x.size(1), {s.rbf, s.bandwidth.vec(), s.weight.vec(), s.alpha},
                               s.w[0], s.w[1], s.w[2], nullptr, result(fx), result(fy), nullptr, nullptr};
    if (x.is_cuda()) {
        const Tensor value = at::empty({}, x.options());
        pairwise_on_gpu<T>(problem, 1, x, {}, {value.mutable_data_ptr<T>(), 0.5, *s.constant});
        return {value, fx, fy, {}, {}};
    }
    const Tensor value = at::detail::empty_cpu({}, x.scalar_type());
    double energy = 0;
    problem.energy = &energy;
    pairwise<T>(problem);
    *value.mutable_data_ptr<T>() = T(0.5 * energy + *s.constant);
    return {value, fx, fy, {}, {}};
}

Five forward_of(const Tensor& x, const Maybe& y, const Maybe& a, const Maybe& b, const Settings& s, bool x_force,
                bool y_force, bool potentials) {
    if (!s.constant) return by_dispatcher(x, y, a, b, s, x_force, y_force, potentials);
    const auto usual = x.scalar_type() == at::kFloat ? usual_pairwise<float> : usual_pairwise<double>;
    return usual(x, *y, s, x_force, y_force);
}

// A node of the autograd graph, by whatever pointer this PyTorch has for them.
template <typename Made, typename... Args>
auto make_node(Args&&... args) {
    if constexpr (std::is_same_v<decltype(Edge::function), std::shared_ptr<Node>>) {
        const auto destroy = [](Made* node) { deleteNode(node); };  // a long graph not by recursion
        return std::shared_ptr<Made>(new Made(std::forward<Args>(args)...), destroy);
    } else {
        return c10::make_intrusive<Made>(std::forward<Args>(args)...);
    }
}

// A result of backward that was computed with create_graph, with an error in place of its derivatives to `inputs`. They
// must have the gradients that came from above among them: what is differentiated again must not look constant.
Tensor differentiable_once(const Tensor& gradient, edge_list inputs) {
    const Tensor out = gradient.detach();
    torch::autograd::set_history(out, make_node<torch::autograd::Error>(
        "this backend gives first derivatives; use backend='reference' to differentiate twice", std::move(inputs)));
    return out;
}

constexpr int64_t kGrain = 32768;  // numbers that one thread multiplies faster than two

template <typename T>
Tensor product(double factor, const Tensor& part) {
    const Tensor out = at::detail::empty_cpu(part.sizes(), part.scalar_type());
    const T* const from = part.const_data_ptr<T>();
    T* const to = out.mutable_data_ptr<T>();
    at::parallel_for(0, part.numel(), kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) to[k] = T(factor) * from[k];
    });
    return out;
}

// factor * gradient * part, gradient [...] and part [..., N, D] or [..., N].
Tensor product(double factor, const Tensor& gradient, const Tensor& part) {
    if (!at::GradMode::is_enabled() && gradient.dim() == 0 && gradient.is_cpu() && part.is_cpu() && plain(gradient) &&
        plain(part) && part.is_contiguous() && nothing_watches()) {  // the same, with less of PyTorch
        factor *= gradient.scalar_type() == at::kFloat ? double(*gradient.const_data_ptr<float>())
                                                       : *gradient.const_data_ptr<double>();
        return part.scalar_type() == at::kFloat ? product<float>(factor, part) : product<double>(factor, part);
    }
    Tensor by = factor == 1 ? gradient : gradient.mul(factor);
    if (by.dim() > 0) {
        by = by.to(part.scalar_type());
        while (by.dim() < part.dim()) by = by.unsqueeze(-1);
    }
    return part.mul(by);
}

// The derivatives of the energy to x, y, a and b: `factor` of forces and potentials that the forward pass has computed.
// A node and no torch::autograd::Function, which at small N would take longer than the sums.
struct EnergyBackward : Node {
    std::array<SavedVariable, 4> parts;
    double factor;

    EnergyBackward(edge_list&& inputs, const std::array<Tensor, 4>& computed, double factor)
        : Node(std::move(inputs)), factor(factor) {
        for (size_t k = 0; k < parts.size(); ++k) {
            if (computed[k].defined()) parts[k] = SavedVariable(computed[k], false);
        }
    }

    std::string name() const override { return "EnergyBackward"; }

    variable_list apply(variable_list&& gradients) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        return products(gradients[0], wanted(), factor, next_edges());
    }

    void release_variables() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (SavedVariable& part : parts) part.reset_data();
    }

    std::array<Tensor, 4> wanted() const {
        std::array<Tensor, 4> some;
        for (size_t k = 0; k < parts.size(); ++k) {
            if (task_should_compute_output(k)) some[k] = parts[k].unpack();
        }
        return some;
    }

    static variable_list products(const Tensor& gradient, const std::array<Tensor, 4>& parts, double factor,
                                  edge_list inputs) {
        variable_list out(parts.size());
        if (!gradient.defined()) return out;
        inputs.push_back(torch::autograd::impl::gradient_edge(gradient));
        for (size_t k = 0; k < parts.size(); ++k) {
            if (!parts[k].defined()) continue;
            out[k] = product(factor, gradient, parts[k]);
            if (at::GradMode::is_enabled()) out[k] = differentiable_once(out[k], inputs);
        }
        return out;
    }

#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 7  // PyTorch's compiled autograd; older ones refuse the node
    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
        for (const SavedVariable& part : parts) args.collect(part, false);
        args.collect(factor);
    }

    variable_list apply_with_saved(const variable_list& gradients,
                                   torch::dynamo::autograd::SwapSavedVariables& saved) override {
        using torch::dynamo::autograd::IValuePacker;
        for (SavedVariable& part : parts) saved.before(part);
        const std::array<Tensor, 4> some = wanted();
        std::vector<Tensor> given;
        std::vector<int64_t> which;
        for (size_t k = 0; k < some.size(); ++k) {
            if (some[k].defined()) given.push_back(some[k]), which.push_back(int64_t(k));
        }
        const std::vector<at::IValue> args{factor, given, which};
        std::vector<at::TypePtr> schema;
        for (const at::IValue& arg : args) schema.push_back(arg.type());
        const at::IValue metadata = IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            torch::dynamo::autograd::get_input_metadata(next_edges()));
        const auto& python = torch::dynamo::autograd::getPyCompilerInterface();
        PyObject* const compiler = saved.get_py_compiler();
        const std::string function = python->bind_function(compiler, name(), apply_to, schema, true, true);
        variable_list out = python->call_function(compiler, "apply_functional", function, gradients, args, metadata);
        for (SavedVariable& part : parts) saved.after(part);
        return out;
    }

    static variable_list apply_to(const variable_list& gradients, const std::vector<at::IValue>& args) {
        std::array<Tensor, 4> parts;
        const std::vector<Tensor> given = args[1].toTensorVector();
        const std::vector<int64_t> which = args[2].toIntVector();
        for (size_t k = 0; k < given.size(); ++k) parts[which[k]] = given[k];
        return products(gradients[0], parts, args[0].toDouble(), {});
    }
#endif
};

Tensor energy_of(const Tensor& x, const Maybe& y, const Maybe& a, const Maybe& b, const Settings& settings) {
    for (const Maybe& t : {Maybe(x), y, a, b}) {  // Python leaves them to it, and functorch's transforms too
        TORCH_CHECK(!torch::autograd::isFwGradDefined(t), "forward-mode derivatives need the reference");
    }
    const bool need[] = {x.requires_grad(), needs_gradient(y), needs_gradient(a), needs_gradient(b)};
    if (!at::GradMode::is_enabled() || !(need[0] || need[1] || need[2] || need[3])) {
        return std::get<0>(forward_of(x, y, a, b, settings, false, false, false));
    }
    if (const auto& functorch = at::functorch::functorchTLSAccessor()) functorch->checkSupportsCppAutogradFunction();
    Tensor energy;
    std::array<Tensor, 4> parts;
    {
        const at::AutoDispatchBelowADInplaceOrView below;
        std::tie(energy, parts[0], parts[1], parts[2], parts[3]) =
            forward_of(x, y, a, b, settings, need[0], need[1], need[2] || need[3]);
    }
    for (int k = 0; k < 4; ++k) {
        if (!need[k]) parts[k].reset();
    }
    // The derivative of the energy is twice the force; of `usual` inputs half the energy was wanted.
    const auto edge = [](const Maybe& t) { return needs_gradient(t) ? torch::autograd::impl::gradient_edge(*t) : Edge(); };
    const auto node = make_node<EnergyBackward>(edge_list{edge(x), edge(y), edge(a), edge(b)}, parts,
                                                settings.constant ? 1.0 : 2.0);
    torch::autograd::set_history(energy, node);
    return energy;
}

Tensor energy(const Tensor& x, const Maybe& y, const Maybe& a, const Maybe& b, bool rbf, at::ArrayRef<double> bandwidth,
              const Maybe& lengths, at::ArrayRef<double> weight, double alpha, at::ArrayRef<double> w) {
    return energy_of(x, y, a, b, {rbf, bandwidth, lengths, weight, alpha, w});
}

struct ConvSettings {
    at::IntArrayRef taps, colours;
    std::string_view gate;
};

std::tuple<Tensor, Tensor> conv_forward(const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& condition,
                                        const Maybe& link, const Maybe& link_weight, const ConvSettings& s, bool keep) {
    using Op = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&,
                                          const Maybe&, at::IntArrayRef, at::IntArrayRef, std::string_view, bool);
    static const auto op = find<Op>("infovae_fast::masked_conv_forward");
    return op.call(x, weight, bias, condition, link, link_weight, s.taps, s.colours, s.gate, keep);
}

using ConvBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ConvBackward conv_backward(const Tensor& gradient, const Maybe& f_gradient, const Tensor& x, const Tensor& weight,
                           const Maybe& link, const Maybe& link_weight, const Tensor& f, const ConvSettings& s, bool to_x,
                           bool to_weight, bool to_link, bool to_link_weight, bool to_f, bool to_bias, bool to_condition) {
    using Op = ConvBackward(const Tensor&, const Maybe&, const Tensor&, const Tensor&, const Maybe&, const Maybe&,
                            const Tensor&, at::IntArrayRef, at::IntArrayRef, std::string_view, bool, bool, bool, bool, bool,
                            bool, bool);
    static const auto op = find<Op>("infovae_fast::masked_conv_backward");
    return op.call(gradient, f_gradient, x, weight, link, link_weight, f, s.taps, s.colours, s.gate, to_x, to_weight, to_link,
                   to_link_weight, to_f, to_bias, to_condition);
}

std::tuple<Tensor, Tensor> halves_forward(const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& a,
                                          const Maybe& b, const ConvSettings& s) {
    using Op = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&,
                                          at::IntArrayRef, at::IntArrayRef);
    static const auto op = find<Op>("infovae_fast::masked_conv_halves_forward");
    return op.call(x, weight, bias, a, b, s.taps, s.colours);
}

struct Conv : torch::autograd::Function<Conv> {
    static constexpr bool is_traceable = true;

    static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const Maybe& bias,
                                 const Maybe& condition, const Maybe& link, const Maybe& link_weight,
                                 const ConvSettings& s) {
        const at::AutoDispatchBelowADInplaceOrView below;
        auto [out, f] = conv_forward(x, weight, bias, condition, link, link_weight, s, true);
        context->save_for_backward({x, weight, f, link.value_or(Tensor()), link_weight.value_or(Tensor())});
        context->saved_data["taps"] = s.taps;
        context->saved_data["colours"] = s.colours;
        context->saved_data["gate"] = std::string(s.gate);
        context->saved_data["bias"] = needs_gradient(bias);
        context->saved_data["condition"] = !needs_gradient(condition) ? 0 : condition->dim();
        context->saved_data["link"] = needs_gradient(link);
        context->saved_data["link_weight"] = needs_gradient(link_weight);
        context->set_materialize_grads(false);
        return {out, f};
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        const variable_list saved = context->get_saved_variables();
        const auto maybe = [](const Tensor& t) { return t.defined() ? Maybe(t) : Maybe(); };
        const auto flag = [&](const char* name) { return context->saved_data[name].toBool(); };
        const Tensor &x = saved[0], &weight = saved[1];
        const std::string gate = context->saved_data["gate"].toStringRef();
        const bool need_x = context->needs_input_grad(0), need_weight = context->needs_input_grad(1);
        const bool bias = flag("bias"), link = flag("link"), link_weight = flag("link_weight");
        const int64_t condition = context->saved_data["condition"].toInt();
        variable_list out(7);
        if (!gradients[0].defined() && !gradients[1].defined()) return out;
        if (!gradients[0].defined()) {
            const auto s = x.sym_sizes();
            gradients[0] = at::zeros_symint({s[0], weight.sym_size(2) / (gate.empty() ? 1 : 2), s[2], s[3]}, x.options());
        }
        const Maybe to_f_directly = gate.empty() ? Maybe() : maybe(gradients[1]);
        {
            const at::AutoDispatchBelowADInplaceOrView below;
            const std::vector<int64_t> taps = context->saved_data["taps"].toIntVector();
            const std::vector<int64_t> colours = context->saved_data["colours"].toIntVector();
            auto [to_x, to_weight, to_link, to_link_weight, to_f, to_bias, to_condition] =
                conv_backward(gradients[0], to_f_directly, x, weight, maybe(saved[3]), maybe(saved[4]), saved[2],
                              {taps, colours, gate}, need_x, need_weight, link, link_weight, condition == 4, bias,
                              condition == 2);
            if (need_x) out[0] = to_x;
            if (need_weight) out[1] = to_weight;
            if (bias) out[2] = to_bias;
            if (condition > 0) out[3] = condition == 2 ? to_condition : gate.empty() ? gradients[0] : to_f;
            if (link) out[4] = to_link;
            if (link_weight) out[5] = to_link_weight;
        }
        if (at::GradMode::is_enabled()) {  // create_graph
            const Tensor f = gate.empty() ? Tensor() : saved[2];
            for (Tensor& gradient : out) {
                if (!gradient.defined()) continue;
                gradient = differentiable_once(gradient, torch::autograd::collect_next_edges(
                                                             x, weight, gradients[0], gradients[1], f, saved[3], saved[4]));
            }
        }
        return out;
    }
};

std::tuple<Tensor, Tensor> masked_conv(const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& condition,
                                       const Maybe& link, const Maybe& link_weight, at::IntArrayRef taps,
                                       at::IntArrayRef colours, std::string_view gate, bool keep) {
    const bool gradient = x.requires_grad() || weight.requires_grad() || needs_gradient(bias) ||
                          needs_gradient(condition) || needs_gradient(link) || needs_gradient(link_weight);
    const ConvSettings settings{taps, colours, gate};
    if (!gradient || !at::GradMode::is_enabled()) {
        return conv_forward(x, weight, bias, condition, link, link_weight, settings, keep);
    }
    const variable_list out = Conv::apply(x, weight, bias, condition, link, link_weight, settings);
    return {out[0], out[1]};
}

struct Halves : torch::autograd::Function<Halves> {
    static constexpr bool is_traceable = true;

    // Where one half has no gradient: that of a convolution with the other half of the weight. What is hidden in zeros
    // times the half that is not asked for (inf, NaN) stays out of it.
    static std::tuple<Tensor, Tensor, Tensor> backward_of_one(const variable_list& gradients, const Tensor& x,
                                                              const Tensor& weight, at::IntArrayRef taps,
                                                              at::IntArrayRef colours, bool need_x, bool need_weight,
                                                              bool need_bias) {
        const c10::SymInt half = weight.sym_size(2) / 2, start = gradients[0].defined() ? c10::SymInt(0) : half;
        const auto whole = [&](const Tensor& part, c10::SymIntArrayRef sizes, int64_t dim) {
            Tensor all = at::zeros_symint(sizes, x.options());
            all.narrow_symint(dim, start, half).copy_(part);
            return all;
        };
        auto [to_x, to_weight, link, link_weight, f, to_bias, condition] =
            conv_backward(gradients[gradients[0].defined() ? 0 : 1], {}, x, weight.narrow_symint(2, start, half), {}, {},
                          at::empty({0}, x.options()), {taps, colours, ""}, need_x, need_weight, false, false, false,
                          need_bias, false);
        return {to_x, need_weight ? whole(to_weight, weight.sym_sizes(), 2) : to_weight,
                need_bias ? whole(to_bias, {weight.sym_size(2)}, 0) : to_bias};
    }

    static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const Maybe& bias,
                                 const Maybe& a, const Maybe& b, const ConvSettings& s) {
        const at::AutoDispatchBelowADInplaceOrView below;
        auto [first, second] = halves_forward(x, weight, bias, a, b, s);
        context->save_for_backward({x, weight});
        context->saved_data["taps"] = s.taps;
        context->saved_data["colours"] = s.colours;
        context->saved_data["bias"] = needs_gradient(bias);
        context->saved_data["a"] = needs_gradient(a), context->saved_data["b"] = needs_gradient(b);
        context->set_materialize_grads(false);
        return {first, second};
    }

    static variable_list backward(AutogradContext* context, variable_list gradients) {
        using Op = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                      at::IntArrayRef, at::IntArrayRef, bool, bool, bool);
        static const auto op = find<Op>("infovae_fast::masked_conv_halves_backward");
        const variable_list saved = context->get_saved_variables();
        const auto flag = [&](const char* name) { return context->saved_data[name].toBool(); };
        const bool need_x = context->needs_input_grad(0), need_weight = context->needs_input_grad(1);
        const bool bias = flag("bias") && context->needs_input_grad(2), both = gradients[0].defined() && gradients[1].defined();
        variable_list out(6);
        if (!gradients[0].defined() && !gradients[1].defined()) return out;
        if (need_x || need_weight || bias) {
            const at::AutoDispatchBelowADInplaceOrView below;
            const std::vector<int64_t> taps = context->saved_data["taps"].toIntVector();
            const std::vector<int64_t> colours = context->saved_data["colours"].toIntVector();
            auto [to_x, to_weight, to_bias] =
                both ? op.call(gradients[0], gradients[1], saved[0], saved[1], taps, colours, need_x, need_weight, bias)
                     : backward_of_one(gradients, saved[0], saved[1], taps, colours, need_x, need_weight, bias);
            if (need_x) out[0] = to_x;
            if (need_weight) out[1] = to_weight;
            if (bias) out[2] = to_bias;
        }
        if (flag("a")) out[3] = gradients[0];
        if (flag("b")) out[4] = gradients[1];
        if (at::GradMode::is_enabled()) {  // create_graph
            const auto inputs = torch::autograd::collect_next_edges(saved[0], saved[1], gradients[0], gradients[1]);
            for (int k = 0; k < 3; ++k) {
                if (out[k].defined()) out[k] = differentiable_once(out[k], inputs);
            }
        }
        return out;
    }
};

std::tuple<Tensor, Tensor> masked_conv_halves(const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& a,
                                              const Maybe& b, at::IntArrayRef taps, at::IntArrayRef colours) {
    const ConvSettings settings{taps, colours, ""};
    const bool gradient = x.requires_grad() || weight.requires_grad() || needs_gradient(bias) || needs_gradient(a) ||
                          needs_gradient(b);
    if (!gradient || !at::GradMode::is_enabled()) return halves_forward(x, weight, bias, a, b, settings);
    const variable_list out = Halves::apply(x, weight, bias, a, b, settings);
    return {out[0], out[1]};
}

// A tensor [N, D] of which nothing is unusual, or null.
const Tensor* usual(pybind11::handle object) {
    if (!THPVariable_CheckExact(object.ptr())) return nullptr;
    const Tensor& x = THPVariable_Unpack(object.ptr());
    return plain(x) && x.dim() == 2 && x.size(0) > 0 && x.size(1) > 0 && !x._fw_grad(0).defined() ? &x : nullptr;
}

bool is(pybind11::handle text, const char* value) {
    return PyUnicode_Check(text.ptr()) && PyUnicode_CompareWithASCIIString(text.ptr(), value) == 0;
}

bool usual_circumstances(pybind11::handle backend, const Tensor& x) {
    return (is(backend, "auto") || is(backend, x.is_cuda() ? "cuda" : "cpp")) && nothing_watches();
}

struct UsualKernel {
    bool rbf = true;
    std::vector<double> bandwidth, weight{1.0};
    double alpha = 1;

    double phi0() const {
        double sum = 0;
        for (const double w : weight) sum += w;
        return sum;
    }
};

std::optional<UsualKernel> usual_kernel(pybind11::handle kernel, int64_t d) {
    UsualKernel found;
    if (!kernel.is_none()) {
        const pybind11::object plain = pybind11::getattr(kernel, "plain", pybind11::none());
        if (!pybind11::isinstance<pybind11::tuple>(plain)) return {};
        std::tie(found.rbf, found.bandwidth, found.weight, found.alpha) =
            plain.cast<std::tuple<bool, std::vector<double>, std::vector<double>, double>>();
    }
    if (found.bandwidth.empty()) found.bandwidth.push_back(std::sqrt(double(d)));
    return found;
}

bool fits_gpu(const Tensor& x, const UsualKernel& kernel) {  // csrc/cuda
    return x.size(1) <= (x.scalar_type() == at::kFloat && has_tensor_cores(x) ? kCudaMaxProductsDim : kCudaMaxDim) &&
           kernel.weight.size() <= size_t(kCudaMaxScales);
}

// The direction of z with the scores s, or -z where they are null; undefined if it is not finite.
template <typename T>
Tensor stein_direction(const Tensor& z, const Tensor* s, const UsualKernel& kernel) {
    const Tensor zs = z.contiguous(), v = s == nullptr ? zs : s->neg().contiguous();  // minus the scores
    const Tensor out = at::detail::empty_cpu(z.sizes(), z.scalar_type());
    T* const direction = out.mutable_data_ptr<T>();
    pairwise<T>({zs.const_data_ptr<T>(), nullptr, v.const_data_ptr<T>(), nullptr, nullptr, z.size(0), 0, z.size(1),
                 {kernel.rbf, kernel.bandwidth, kernel.weight, kernel.alpha}, 1, 0, 0, nullptr, direction, nullptr, nullptr,
                 nullptr});
    const T phi0 = T(kernel.phi0()), n = T(z.size(0)), *minus = v.const_data_ptr<T>();
    bool finite = true;
    for (int64_t k = 0; k < z.numel(); ++k) {
        direction[k] = (phi0 * -minus[k] - direction[k]) / n;
        finite &= std::isfinite(direction[k]);
    }
    return finite ? out : Tensor();
}

}  // namespace

pybind11::object usual_mmd(pybind11::handle x_object, pybind11::handle y_object, pybind11::handle kernel_object,
                           pybind11::handle estimator, pybind11::handle backend) {
    const bool biased = is(estimator, "biased");
    const Tensor *x = usual(x_object), *y = usual(y_object);
    if (x == nullptr || y == nullptr || y->scalar_type() != x->scalar_type() || y->size(1) != x->size(1) ||
        y->device() != x->device() || std::min(x->size(0), y->size(0)) < 2 ||
        (!biased && !is(estimator, "unbiased")) || !usual_circumstances(backend, *x)) {
        return pybind11::none();
    }
    const std::optional<UsualKernel> kernel = usual_kernel(kernel_object, x->size(1));
    if (!kernel || (x->is_cuda() && !fits_gpu(*x, *kernel))) return pybind11::none();
    const double n = double(x->size(0)), m = double(y->size(0)), less = biased ? 0 : 1;
    const double w[] = {2 / (n * (n - less)), -2 / (n * m), 2 / (m * (m - less))};  // half of the energy is wanted
    const double constant = biased ? kernel->phi0() * (1 / n + 1 / m) : 0;
    Tensor value;
    {
        const pybind11::gil_scoped_release release;
        value = energy_of(*x, *y, {}, {}, {kernel->rbf, kernel->bandwidth, {}, kernel->weight, kernel->alpha, w, constant});
    }
    const bool is_float = value.scalar_type() == at::kFloat;
    if (!value.is_cuda() && !std::isfinite(is_float ? *value.const_data_ptr<float>() : *value.const_data_ptr<double>())) {
        return pybind11::none();
    }
    return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(value));
}

pybind11::object usual_stein(pybind11::handle z_object, pybind11::handle score, pybind11::handle kernel_object,
                             pybind11::handle backend) {
    const Tensor *z = usual(z_object), *s = score.is_none() ? nullptr : usual(score);
    if (z == nullptr || z->is_cuda() || !usual_circumstances(backend, *z)) return pybind11::none();
    if (!score.is_none() && (s == nullptr || s->sizes() != z->sizes() || s->device() != z->device() ||
                             s->scalar_type() != z->scalar_type())) {
        return pybind11::none();
    }
    const std::optional<UsualKernel> kernel = usual_kernel(kernel_object, z->size(1));
    if (!kernel) return pybind11::none();
    Tensor direction;
    {
        const pybind11::gil_scoped_release release;
        const at::NoGradGuard no_grad;
        direction = (z->scalar_type() == at::kFloat ? stein_direction<float> : stein_direction<double>)(*z, s, *kernel);
    }
    if (!direction.defined()) return pybind11::none();
    return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(direction));
}

TORCH_LIBRARY_FRAGMENT(infovae_fast, m) {
    // The energy of `pairwise`, differentiable once to x, y, a and b.
    m.def("energy(Tensor x, Tensor? y, Tensor? a, Tensor? b, bool rbf, float[] bandwidth, Tensor? lengths, float[] weight, "
          "float alpha, float[] w) -> Tensor", {at::Tag::pt2_compliant_tag});
    m.impl("energy", torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd, energy));
    // `masked_conv_forward`, differentiable once to the tensors.
    m.def("masked_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? condition, Tensor? link, Tensor? link_weight, "
          "int[] taps, int[] colours, str gate, bool keep) -> (Tensor out, Tensor f)",
          {at::Tag::pt2_compliant_tag});
    m.impl("masked_conv", torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd, masked_conv));
    m.def("masked_conv_halves(Tensor x, Tensor weight, Tensor? bias, Tensor? added, Tensor? added_b, int[] taps, "
          "int[] colours) -> (Tensor a, Tensor b)",
          {at::Tag::pt2_compliant_tag});
    m.impl("masked_conv_halves", torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd, masked_conv_halves));
}

}  // namespace infovae_fast
