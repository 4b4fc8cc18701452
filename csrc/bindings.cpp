// Every native schema on one page, and the Python module that tells what was built.
// The only place where PyTorch and our kernels meet: csrc/cuda/*.cu see pointers, sizes and a stream.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zero.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#ifdef WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "autograd.h"
#include "build_facts.h"  // written by setup.py: BUILD_FACTS, a list of {"name", "text"},
#include "cpu/vector.h"
#include "incremental.h"
#include "logistic_mixture.h"
#include "masked_conv.h"
#include "pairwise.h"
#include "resident.h"

namespace infovae_fast {

template <typename T>
void pairwise_on_gpu([[maybe_unused]] const PairwiseProblem<T>& problem, [[maybe_unused]] int64_t clouds, const at::Tensor& x,
                     [[maybe_unused]] const std::optional<at::Tensor>& lengths, [[maybe_unused]] const Affine<T>& affine) {
#ifdef WITH_CUDA
    const c10::cuda::CUDAGuard guard(x.device());
    int processors = 1;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.get_device()));
    const at::Tensor table = lengths.has_value() ? lengths->to(x.device(), at::kDouble).contiguous() : at::Tensor();
    const at::Tensor workspace =
        at::empty({int64_t(pairwise_cuda_workspace(problem, clouds, processors, affine))}, x.options().dtype(at::kByte));
    const char* error =
        pairwise_cuda(problem, clouds, table.defined() ? table.const_data_ptr<double>() : nullptr,
                      workspace.mutable_data_ptr(), processors, c10::cuda::getCurrentCUDAStream().stream(), affine);
    TORCH_CHECK(error == nullptr, "pairwise on ", x.device(), ": ", error);
#else
    TORCH_CHECK(false, "this build has no CUDA kernels for ", x.device());
#endif
}
bool has_tensor_cores([[maybe_unused]] const at::Tensor& x) {
    int major = 0;
#ifdef WITH_CUDA
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device()));
#endif
    return major >= 8;
}

template void pairwise_on_gpu(const PairwiseProblem<float>&, int64_t, const at::Tensor&, const std::optional<at::Tensor>&,
                              const Affine<float>&);
template void pairwise_on_gpu(const PairwiseProblem<double>&, int64_t, const at::Tensor&, const std::optional<at::Tensor>&,
                              const Affine<double>&);

namespace {

using at::Tensor;

template <typename T>
std::vector<T> as_vector(const Tensor& t) {
    const Tensor host = t.to(at::kCPU, at::kDouble).contiguous();
    return std::vector<T>(host.data_ptr<double>(), host.data_ptr<double>() + host.numel());
}

// What `pairwise` returns: what was asked for, and empty tensors for the rest.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pairwise_empty(
    const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& /*v*/,
    const std::optional<Tensor>& /*a*/, const std::optional<Tensor>& /*b*/, bool /*rbf*/, at::ArrayRef<double> /*bandwidth*/,
    const std::optional<Tensor>& /*lengths*/, at::ArrayRef<double> /*weight*/, double /*alpha*/, at::ArrayRef<double> /*w*/, bool energy, bool x_force, bool y_force,
    bool potentials) {
    const auto make = [](bool wanted, c10::SymIntArrayRef shape, const at::TensorOptions& options) {
        return wanted ? at::empty_symint(shape, options) : at::empty({0}, options);
    };
    const auto batch = x.sym_sizes().slice(0, x.dim() - 2), rows = x.sym_sizes().slice(0, x.dim() - 1);
    const Tensor& other = y.has_value() ? *y : x;
    return {make(energy, batch, x.options().dtype(at::kDouble)), make(x_force, x.sym_sizes(), x.options()),
            make(y_force && y.has_value(), other.sym_sizes(), x.options()), make(potentials, rows, x.options()),
            make(potentials && y.has_value(), other.sym_sizes().slice(0, x.dim() - 1), x.options())};
}

// Runs problems of T on the device of x; `lengths` are bandwidths that are in memory.
template <typename T>
void run(const PairwiseProblem<T>& first, int64_t clouds, const Tensor& x, const std::optional<Tensor>& lengths) {
    PairwiseProblem<T> problem = first;
    if (x.is_cuda()) return pairwise_on_gpu(problem, clouds, x, lengths, {});
    if (lengths.has_value()) problem.radial.bandwidth = as_vector<double>(*lengths);
    const auto forward = [](auto*& pointer, int64_t step) { pointer += pointer == nullptr ? 0 : step; };
    for (int64_t k = 0; k < clouds; ++k) {
        pairwise(problem);
        forward(problem.x, problem.n * problem.d), forward(problem.y, problem.m * problem.d);
        forward(problem.v, problem.n * problem.d), forward(problem.a, problem.n), forward(problem.b, problem.m);
        forward(problem.energy, 1);
        forward(problem.x_force, problem.n * problem.d), forward(problem.y_force, problem.m * problem.d);
        forward(problem.x_potential, problem.n), forward(problem.y_potential, problem.m);
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pairwise_native(
    const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& v, const std::optional<Tensor>& a,
    const std::optional<Tensor>& b, bool rbf, at::ArrayRef<double> bandwidth, const std::optional<Tensor>& lengths,
    at::ArrayRef<double> weight, double alpha, at::ArrayRef<double> w, bool energy, bool x_force, bool y_force,
    bool potentials) {
    TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, "x: got ", x.scalar_type(),
                     "; accepted: float32, float64");
    TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(-1) > 0 && x.size(-2) > 0 && w.size() == 3, "x: got shape ", x.sizes(),
                      "; accepted: [..., N, D]; and w needs 3 numbers");
    const size_t scales = lengths.has_value() ? size_t(lengths->numel()) : bandwidth.size();
    TORCH_CHECK_VALUE(scales > 0 && scales == weight.size(), "bandwidth and weight: got ", scales, " and ",
                      weight.size(), " numbers; give one of each per scale");
    TORCH_CHECK_VALUE(!(v.has_value() && y_force), "v belongs to the forces on x; ask for y_force without it");
    auto out = pairwise_empty(x, y, v, a, b, rbf, bandwidth, lengths, weight, alpha, w, energy, x_force, y_force,
                              potentials);
    const auto contiguous = [&](const std::optional<Tensor>& t) {
        if (!t.has_value()) return Tensor();
        TORCH_CHECK_TYPE(t->scalar_type() == x.scalar_type(), "got ", t->scalar_type(), " beside ", x.scalar_type());
        TORCH_CHECK_VALUE(t->device() == x.device(), "got ", t->device(), " beside ", x.device());
        return t->contiguous();
    };
    const Tensor xs = x.contiguous(), ys = contiguous(y), vs = contiguous(v), as = contiguous(a), bs = contiguous(b);
    const int64_t n = x.size(-2), d = x.size(-1), m = ys.defined() ? ys.size(-2) : 0;
    const int64_t clouds = x.numel() / std::max<int64_t>(1, n * d);
    TORCH_CHECK_VALUE((!ys.defined() || (ys.dim() == x.dim() && ys.size(-1) == d &&
                                         ys.sizes().slice(0, x.dim() - 2) == x.sizes().slice(0, x.dim() - 2))) &&
                          (!vs.defined() || vs.numel() == xs.numel()) &&
                          (!as.defined() || as.numel() == clouds * n) && (!bs.defined() || bs.numel() == clouds * m),
                      "shapes do not fit x ", x.sizes());
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "infovae_fast::pairwise", [&] {
        using T = scalar_t;
        const auto in = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; };
        const auto result = [](const Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr<T>() : nullptr; };
        const auto& [e, fx, fy, px, py] = out;
        run<T>({in(xs), in(ys), in(vs), in(as), in(bs), n, m, d, {rbf, bandwidth.vec(), weight.vec(), alpha},
                w[0], w[1], w[2], energy ? e.mutable_data_ptr<double>() : nullptr, result(fx), result(fy), result(px),
                result(py)},
               clouds, x, lengths);
    });
    return out;
}

Gate gate_of(std::string_view name) {
    TORCH_CHECK_VALUE(name == "" || name == "tanh" || name == "glu", "gate: got '", name, "'; accepted: '', tanh, glu");
    return name == "tanh" ? Gate::tanh : name == "glu" ? Gate::glu : Gate::none;
}

Tensor image(const Tensor& like, c10::SymInt channels) {  // [N, channels, H, W]
    const auto s = like.sym_sizes();
    return at::empty_symint({s[0], std::move(channels), s[2], s[3]}, like.options(), at::MemoryFormat::ChannelsLast);
}

using Maybe = std::optional<Tensor>;

std::tuple<Tensor, Tensor> masked_conv_forward_empty(const Tensor& x, const Tensor& weight, const Maybe& /*bias*/,
                                                     const Maybe& /*condition*/, const Maybe& /*link*/,
                                                     const Maybe& /*link_weight*/, at::IntArrayRef /*taps*/,
                                                     at::IntArrayRef /*colours*/, std::string_view gate, bool keep) {
    const bool gated = gate_of(gate) != Gate::none;
    const c10::SymInt cout = weight.sym_size(2);
    return {image(x, gated ? cout / 2 : cout), image(x, gated && keep ? cout : 0)};
}

using ConvBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ConvBackward masked_conv_backward_empty(const Tensor& /*gradient*/, const Maybe& /*f_gradient*/, const Tensor& x,
                                        const Tensor& weight, const Maybe& link, const Maybe& link_weight,
                                        const Tensor& /*f*/, at::IntArrayRef /*taps*/, at::IntArrayRef /*colours*/,
                                        std::string_view gate, bool to_x, bool to_weight, bool to_link,
                                        bool to_link_weight, bool to_f, bool to_bias, bool to_condition) {
    const auto make = [&](bool wanted, c10::SymIntArrayRef shape) {
        return wanted ? at::empty_symint(shape, x.options()) : at::empty({0}, x.options());
    };
    to_link = to_link && link.has_value(), to_link_weight = to_link_weight && link_weight.has_value();
    return {image(x, to_x ? x.sym_size(1) : 0),
            make(to_weight, weight.sym_sizes()),
            image(x, to_link ? link->sym_size(1) : 0),
            make(to_link_weight, to_link_weight ? link_weight->sym_sizes() : weight.sym_sizes()),
            image(x, to_f && gate_of(gate) != Gate::none ? weight.sym_size(2) : 0),
            make(to_bias, {weight.sym_size(2)}),
            make(to_condition, {x.sym_size(0), weight.sym_size(2)})};
}

constexpr std::string_view kHalves = "halves";  // in place of a gate

MaskedConv conv_of(const Tensor& x, const Tensor& weight, at::IntArrayRef taps, at::IntArrayRef colours,
                   std::string_view gate) {
    const at::ScalarType type = x.scalar_type();
    const bool half = x.is_cuda() && (type == at::kHalf || type == at::kBFloat16);
    TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || half, "x: got ", type,
                     "; accepted: float32, float64, on a GPU also float16, bfloat16");
    TORCH_CHECK_VALUE(x.dim() == 4 && weight.dim() == 3 && weight.size(1) == x.size(1) &&
                          weight.size(0) * 2 == int64_t(taps.size()) && weight.numel() > 0,
                      "x ", x.sizes(), ", weight ", weight.sizes(), " and ", taps.size() / 2,
                      " taps; accepted: [N, Cin, H, W], [taps, Cin, Cout]");
    TORCH_CHECK_VALUE(colours.size() == 3 && colours[0] > 0 && x.size(1) % colours[0] == 0 &&
                          weight.size(2) % (colours[0] * (gate.empty() ? 1 : 2)) == 0,
                      "colours: got ", colours, "; accepted: (groups, interleaved, own), groups of equal size");
    MaskedConv conv{x.size(0), x.size(2), x.size(3), x.size(1), weight.size(2), {},
                    {colours[0], colours[1] != 0, colours[2] != 0}, !gate.empty()};
    for (size_t k = 0; k < taps.size(); k += 2) {
        // A tap outside the image reads zeros, and so do those further away.
        conv.taps.push_back({std::clamp(taps[k], -conv.h, conv.h), std::clamp(taps[k + 1], -conv.w, conv.w)});
    }
    return conv;
}

void check_beside(const Tensor& t, const Tensor& x) {
    TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), "got ", t.scalar_type(), " beside ", x.scalar_type());
    TORCH_CHECK_VALUE(t.device() == x.device(), "got ", t.device(), " beside ", x.device());
}

const void* raw(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* raw_result(const Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; }

// An image [N, C, H, W] as an array [N, H, W, C] of x's type.
Tensor pixels(const Tensor& t, const Tensor& x, int64_t channels) {
    check_beside(t, x);
    TORCH_CHECK_VALUE(t.dim() == 4 && t.size(0) == x.size(0) && t.size(1) == channels && t.size(2) == x.size(2) &&
                          t.size(3) == x.size(3),
                      "got shape ", t.sizes(), " beside x ", x.sizes(), "; accepted: ", channels, " channels");
    return t.contiguous(at::MemoryFormat::ChannelsLast);
}

// What a kernel takes as the link, and the tensors that hold it.
struct LinkTensors {
    Tensor values, weight;
    int64_t channels = 0;

    LinkTensors(const Maybe& link, const Maybe& link_weight, const Tensor& x, int64_t cout) {
        TORCH_CHECK_VALUE(link.has_value() == link_weight.has_value(), "link and link_weight: give both or neither");
        if (!link.has_value()) return;
        channels = link_weight->dim() == 2 ? link_weight->size(0) : 0;
        check_beside(*link_weight, x);
        TORCH_CHECK_VALUE(channels > 0 && link_weight->size(1) == cout, "link_weight: got shape ",
                          link_weight->sizes(), "; accepted: [C, ", cout, "]");
        values = pixels(*link, x, channels), weight = link_weight->contiguous();
    }
    Link<void> raw() const { return {infovae_fast::raw(values), infovae_fast::raw(weight), channels}; }
    template <typename T>
    Link<T> get() const {
        return {static_cast<const T*>(infovae_fast::raw(values)), static_cast<const T*>(infovae_fast::raw(weight)), channels};
    }
};

#ifdef WITH_CUDA
Number number_of(const Tensor& x) {
    const at::ScalarType type = x.scalar_type();
    return type == at::kHalf       ? Number::float16
           : type == at::kBFloat16 ? Number::bfloat16
           : type == at::kFloat    ? Number::float32
                                   : Number::float64;
}
int processors_of(const Tensor& x) {
    int processors = 1;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.get_device()));
    return processors;
}
// May the products of x lose no digits? Where PyTorch does not say, as it may for single backends, they may not.
bool exact(const Tensor& x) {
    if (x.scalar_type() != at::kFloat) return true;
    try {
        return at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST;
    } catch (const c10::Error&) {
        return true;
    }
}
#endif

std::tuple<Tensor, Tensor> masked_conv_forward_native(const Tensor& x, const Tensor& weight, const Maybe& bias,
                                                      const Maybe& condition, const Maybe& link, const Maybe& link_weight,
                                                      at::IntArrayRef taps, at::IntArrayRef colours, std::string_view gate,
                                                      bool keep) {
    const MaskedConv conv = conv_of(x, weight, taps, colours, gate);
    auto out = masked_conv_forward_empty(x, weight, bias, condition, link, link_weight, taps, colours, gate, keep);
    if (x.numel() == 0) return out;
    const bool spatial = condition.has_value() && condition->dim() == 4;
    const auto flat = [&](const Tensor& t, at::IntArrayRef shape) {
        check_beside(t, x);
        TORCH_CHECK_VALUE(t.sizes() == shape, "got shape ", t.sizes(), "; accepted: ", shape);
        return t.contiguous();
    };
    const Tensor xs = pixels(x, x, conv.cin), ws = flat(weight, weight.sizes());
    const Tensor bs = bias.has_value() ? flat(*bias, {conv.cout}) : Tensor();
    const Tensor cs = spatial                 ? pixels(*condition, x, conv.cout)
                      : condition.has_value() ? flat(*condition, {conv.n, conv.cout})
                                              : Tensor();
    const LinkTensors links(link, link_weight, x, conv.cout);
    auto& [result, f] = out;
#ifdef WITH_CUDA
    if (x.is_cuda()) {
        const c10::cuda::CUDAGuard guard(x.device());
        const char* error = masked_conv_cuda(
            number_of(x), exact(x), conv, raw(xs), raw(ws), links.raw(), raw(bs), raw(cs), spatial, gate_of(gate),
            result.mutable_data_ptr(), raw_result(f), c10::cuda::getCurrentCUDAStream().stream());
        TORCH_CHECK(error == nullptr, "masked_conv on ", x.device(), ": ", error);
        return out;
    }
#endif
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "infovae_fast::masked_conv", [&] {
        using T = scalar_t;
        const auto in = [](const Tensor& t) { return static_cast<const T*>(raw(t)); };
        masked_conv<T>(conv, in(xs), in(ws), links.get<T>(), in(bs), in(cs), spatial, gate_of(gate),
                       result.template mutable_data_ptr<T>(), static_cast<T*>(raw_result(f)));
    });
    return out;
}

ConvBackward masked_conv_backward_native(const Tensor& gradient, const Maybe& extra, const Tensor& x, const Tensor& weight,
                                         const Maybe& link, const Maybe& link_weight, const Tensor& f, at::IntArrayRef taps,
                                         at::IntArrayRef colours, std::string_view gate, bool to_x, bool to_weight,
                                         bool to_link, bool to_link_weight, bool to_f, bool to_bias, bool to_condition) {
    const MaskedConv conv = conv_of(x, weight, taps, colours, gate);
    auto out = masked_conv_backward_empty(gradient, extra, x, weight, link, link_weight, f, taps, colours, gate, to_x,
                                          to_weight, to_link, to_link_weight, to_f, to_bias, to_condition);
    auto& [x_gradient, weight_gradient, link_gradient, link_weight_gradient, f_gradient, bias_gradient,
           condition_gradient] = out;
    if (x.numel() == 0) {
        weight_gradient.zero_(), link_weight_gradient.zero_(), bias_gradient.zero_(), condition_gradient.zero_();
        return out;
    }
    const bool gated = gate_of(gate) != Gate::none;
    const Tensor g = pixels(gradient, x, gated ? conv.cout / 2 : conv.cout), xs = pixels(x, x, conv.cin);
    const Tensor fs = gated ? pixels(f, x, conv.cout) : Tensor(), ws = weight.contiguous();
    const Tensor es = extra.has_value() ? pixels(*extra, x, conv.cout) : Tensor();
    check_beside(weight, x);
    const LinkTensors links(link, link_weight, x, conv.cout);
    const auto results = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto result = [](const Tensor& t) { return static_cast<T*>(raw_result(t)); };
        return ConvGradients<T>{result(x_gradient), result(weight_gradient), result(link_gradient),
                                result(link_weight_gradient), result(f_gradient), result(bias_gradient),
                                result(condition_gradient)};
    };
#ifdef WITH_CUDA
    if (x.is_cuda()) {
        const c10::cuda::CUDAGuard guard(x.device());
        const int processors = processors_of(x);
        const Number number = number_of(x);
        const auto wanted = results(static_cast<void*>(nullptr));
        const size_t bytes = masked_conv_cuda_workspace(number, conv, links.channels, wanted, processors);
        const Tensor workspace = at::empty({int64_t(bytes)}, x.options().dtype(at::kByte));
        const char* error = masked_conv_gradients_cuda(
            number, exact(x), conv, raw(xs), raw(ws), links.raw(), gate_of(gate), raw(fs), raw(g), raw(es), wanted, workspace.mutable_data_ptr(), processors,
            c10::cuda::getCurrentCUDAStream().stream());
        TORCH_CHECK(error == nullptr, "masked_conv on ", x.device(), ": ", error);
        return out;
    }
#endif
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "infovae_fast::masked_conv_backward", [&] {
        using T = scalar_t;
        const auto in = [](const Tensor& t) { return static_cast<const T*>(raw(t)); };
        masked_conv_gradients<T>(conv, in(xs), in(ws), links.get<T>(), gate_of(gate), in(fs), in(g), in(es),
                                 results(static_cast<T*>(nullptr)));
    });
    return out;
}

std::tuple<Tensor, Tensor> masked_conv_halves_forward_empty(const Tensor& x, const Tensor& weight, const Maybe& /*bias*/,
                                                            const Maybe& /*added*/, const Maybe& /*added_b*/,
                                                            at::IntArrayRef /*taps*/, at::IntArrayRef /*colours*/) {
    const c10::SymInt half = weight.sym_size(2) / 2;
    return {image(x, half), image(x, half)};
}

using HalvesBackward = std::tuple<Tensor, Tensor, Tensor>;

HalvesBackward masked_conv_halves_backward_empty(const Tensor& /*gradient*/, const Tensor& /*gradient_b*/, const Tensor& x,
                                                 const Tensor& weight, at::IntArrayRef /*taps*/,
                                                 at::IntArrayRef /*colours*/, bool to_x, bool to_weight, bool to_bias) {
    const auto make = [&](bool wanted, c10::SymIntArrayRef shape) {
        return wanted ? at::empty_symint(shape, x.options()) : at::empty({0}, x.options());
    };
    return {image(x, to_x ? x.sym_size(1) : 0), make(to_weight, weight.sym_sizes()), make(to_bias, {weight.sym_size(2)})};
}

#ifdef WITH_CUDA
std::tuple<Tensor, Tensor> masked_conv_halves_forward_cuda(const Tensor& x, const Tensor& weight, const Maybe& bias,
                                                           const Maybe& added, const Maybe& added_b, at::IntArrayRef taps,
                                                           at::IntArrayRef colours) {
    const MaskedConv conv = conv_of(x, weight, taps, colours, kHalves);
    auto out = masked_conv_halves_forward_empty(x, weight, bias, added, added_b, taps, colours);
    if (x.numel() == 0) return out;
    const auto half = [&](const Maybe& t) { return t.has_value() ? pixels(*t, x, conv.cout / 2) : Tensor(); };
    const Tensor xs = pixels(x, x, conv.cin), ws = weight.contiguous(), as = half(added), bs = half(added_b);
    const Tensor biases = bias.has_value() ? bias->contiguous() : Tensor();
    check_beside(weight, x);
    if (biases.defined()) {
        check_beside(biases, x);
        TORCH_CHECK_VALUE(biases.dim() == 1 && biases.size(0) == conv.cout, "bias: got shape ", biases.sizes(),
                          "; accepted: [", conv.cout, "]");
    }
    const c10::cuda::CUDAGuard guard(x.device());
    const char* error = masked_conv_halves_cuda(
        number_of(x), exact(x), conv, raw(xs), raw(ws), raw(biases), {raw(as), raw(bs)},
        {std::get<0>(out).mutable_data_ptr(), std::get<1>(out).mutable_data_ptr()},
        c10::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(error == nullptr, "masked_conv_halves on ", x.device(), ": ", error);
    return out;
}

HalvesBackward masked_conv_halves_backward_cuda(const Tensor& gradient, const Tensor& gradient_b, const Tensor& x,
                                                const Tensor& weight, at::IntArrayRef taps, at::IntArrayRef colours,
                                                bool to_x, bool to_weight, bool to_bias) {
    const MaskedConv conv = conv_of(x, weight, taps, colours, kHalves);
    auto out = masked_conv_halves_backward_empty(gradient, gradient_b, x, weight, taps, colours, to_x, to_weight, to_bias);
    auto& [x_gradient, weight_gradient, bias_gradient] = out;
    if (x.numel() == 0) {
        weight_gradient.zero_(), bias_gradient.zero_();
        return out;
    }
    const Tensor a = pixels(gradient, x, conv.cout / 2), b = pixels(gradient_b, x, conv.cout / 2);
    const Tensor xs = pixels(x, x, conv.cin), ws = weight.contiguous();
    check_beside(weight, x);
    const ConvGradients<void> wanted{raw_result(x_gradient), raw_result(weight_gradient), nullptr, nullptr, nullptr,
                                     raw_result(bias_gradient), nullptr};
    const c10::cuda::CUDAGuard guard(x.device());
    const int processors = processors_of(x);
    const size_t bytes = masked_conv_halves_cuda_workspace(number_of(x), conv, wanted, processors);
    const Tensor workspace = at::empty({int64_t(bytes)}, x.options().dtype(at::kByte));
    const char* error = masked_conv_halves_gradients_cuda(
        number_of(x), exact(x), conv, raw(xs), raw(ws), {raw(a), raw(b)}, wanted, workspace.mutable_data_ptr(), processors,
        c10::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(error == nullptr, "masked_conv_halves on ", x.device(), ": ", error);
    return out;
}
#endif

std::tuple<Tensor, Tensor> logistic_mixture_empty(const Tensor& params, const Tensor& /*x*/, int64_t /*levels*/,
                                                  bool gradient) {
    return {at::empty_symint({params.sym_size(0)}, params.options()),
            gradient ? at::empty_like(params) : at::empty({0}, params.options())};
}

std::tuple<Tensor, Tensor> logistic_mixture_cpu(const Tensor& params, const Tensor& x, int64_t levels, bool gradient) {
    TORCH_CHECK_TYPE(params.scalar_type() == at::kFloat || params.scalar_type() == at::kDouble, "params: got ",
                     params.scalar_type(), "; accepted: float32, float64");
    TORCH_CHECK_TYPE(x.scalar_type() == params.scalar_type(), "x: got ", x.scalar_type(), " beside ",
                     params.scalar_type());
    const int64_t channels = x.dim() < 2 ? 0 : x.size(1), each = channels == 1 ? 3 : 10;
    TORCH_CHECK_VALUE((channels == 1 || channels == 3) && x.dim() == params.dim() && x.size(0) == params.size(0) &&
                          x.sizes().slice(2) == params.sizes().slice(2) && params.size(1) > 0 &&
                          params.size(1) % each == 0 && levels > 1,
                      "got params ", params.sizes(), ", x ", x.sizes(), " and ", levels,
                      " levels; accepted: [N, 3 K, *S] and [N, 1, *S], [N, 10 K, *S] and [N, 3, *S]; 2 levels or more");
    auto out = logistic_mixture_empty(params, x, levels, gradient);
    if (params.numel() == 0) {
        std::get<0>(out).zero_();
        return out;
    }
    const auto last = [](const Tensor& t) { return t.movedim(1, -1); };
    const bool interleaved = last(params).is_contiguous();
    const Tensor ps = interleaved ? params : params.contiguous();
    const Tensor xs = interleaved ? last(x).contiguous() : x.contiguous();
    auto& [nll, slope] = out;
    const Tensor result = !gradient ? Tensor() : slope.strides() == ps.strides() ? slope : at::empty_like(ps);
    AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "infovae_fast::logistic_mixture", [&] {
        using T = scalar_t;
        const int64_t n = x.size(0);
        logistic_mixture<T>({n, x.numel() / (n * channels), params.size(1) / each, channels, levels, interleaved,
                             ps.const_data_ptr<T>(), xs.const_data_ptr<T>(),
                             gradient ? result.mutable_data_ptr<T>() : nullptr, nll.template mutable_data_ptr<T>()});
    });
    if (gradient && !result.is_same(slope)) slope.copy_(result);
    return out;
}

template <typename T>
T* data(const Tensor& t, std::initializer_list<int64_t> shape, const Tensor& like) {
    TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), "got ", t.scalar_type(), " beside ", like.scalar_type());
    TORCH_CHECK_VALUE(t.is_contiguous() && t.sizes() == at::IntArrayRef(shape), "got shape ", t.sizes(),
                      "; accepted: contiguous ", at::IntArrayRef(shape));
    return t.data_ptr<T>();
}

template <typename T>
PixelRow<T> pixel_row(at::TensorList bases, at::TensorList state, at::TensorList horizontal, at::TensorList step,
                      at::TensorList step_bias, at::TensorList head, const Tensor& memory, at::IntArrayRef reaches,
                      int64_t image_channels) {
    const int64_t layers = int64_t(bases.size());
    TORCH_CHECK_VALUE(layers > 0 && state.size() == bases.size() && horizontal.size() == bases.size() &&
                          reaches.size() == bases.size() && step.size() + 1 == bases.size() &&
                          step_bias.size() == step.size() && head.size() == 6 && bases[0].dim() == 3,
                      "pixel_row: the lists do not fit ", layers, " layers");
    const int64_t n = bases[0].size(0), width = bases[0].size(1), maps = bases[0].size(2) / 2;
    const int64_t groups = head[0].size(0), params = head[5].numel();
    TORCH_CHECK_VALUE(groups > 0 && maps > 0 && image_channels > 0 && maps % groups == 0 && params % groups == 0,
                      "pixel_row: got ", maps, " maps, ", params, " params and ", image_channels, " channels in ", groups,
                      " groups");
    const int64_t own = maps / groups;
    PixelRow<T> row{n, width, maps, groups, params, {}};
    for (int64_t l = 0; l < layers; ++l) {
        const int64_t channels = l == 0 ? image_channels : maps, k = horizontal[l].size(1);
        TORCH_CHECK_VALUE(0 <= reaches[l] && reaches[l] <= state[l].size(1) && k % channels == 0 &&
                              (reaches[l] + width) * channels <= state[l].size(1) && k / channels <= reaches[l] + 1,
                          "pixel_row: layer ", l, " has state ", state[l].sizes(), " and weights ", horizontal[l].sizes());
        const bool last = l == layers - 1;
        row.layers.push_back({data<T>(bases[l], {n, width, 2 * maps}, memory),
                              data<T>(state[l], {n, state[l].size(1)}, memory), state[l].size(1), channels, reaches[l],
                              k / channels, data<T>(horizontal[l], {groups, k, 2 * own}, memory),
                              last ? nullptr : data<T>(step[l], {groups, maps, own}, memory),
                              last ? nullptr : data<T>(step_bias[l], {maps}, memory)});
    }
    row.skip = data<T>(head[0], {groups, layers * maps, own}, memory), row.skip_bias = data<T>(head[1], {maps}, memory);
    row.hidden = data<T>(head[2], {groups, maps, own}, memory), row.hidden_bias = data<T>(head[3], {maps}, memory);
    row.output = data<T>(head[4], {groups, maps, params / groups}, memory);
    row.output_bias = data<T>(head[5], {params}, memory);
    row.memory = data<T>(memory, {n, (layers + 2) * maps}, memory);
    return row;
}

// weights = (vertical, its bias, link, its bias) of each layer, conditions = (above, beside) [1 or n, 1 or H, 1 or W, 2C].
void vertical_row_cpu(at::TensorList weights, at::TensorList conditions, at::TensorList rings, at::TensorList bases,
                      at::IntArrayRef reaches, int64_t i) {
    const size_t layers = bases.size();
    TORCH_CHECK_VALUE(layers > 0 && weights.size() == 4 * layers && conditions.size() == 2 * layers &&
                          rings.size() == layers && reaches.size() == layers && bases[0].dim() == 3 &&
                          bases[0].size(2) % 2 == 0 && i >= 0,
                      "vertical_row: the lists do not fit row ", i, " of ", layers, " layers");
    const Tensor& like = bases[0];
    const int64_t n = like.size(0), width = like.size(1), wide = like.size(2);
    AT_DISPATCH_FLOATING_TYPES(like.scalar_type(), "infovae_fast::vertical_row", [&] {
        using T = scalar_t;
        VerticalRow<T> row{n, width, wide / 2, i, {}};
        for (size_t l = 0; l < layers; ++l) {
            TORCH_CHECK_VALUE(reaches[l] >= 0 && rings[l].dim() == 4 && (l == 0 || rings[l].size(3) == wide / 2),
                              "vertical_row: layer ", l, " has reach ", reaches[l], " and ring ", rings[l].sizes());
            const int64_t r = reaches[l], channels = rings[l].size(3);
            const int64_t taps = (l == 0 ? r : r + 1) * (2 * r + 1);
            typename VerticalRow<T>::Layer layer{data<T>(rings[l], {n, r + 1, width + 2 * r, channels}, like),
                                                 data<T>(bases[l], {n, width, wide}, like), channels, r, l == 0,
                                                 data<T>(weights[4 * l], {taps * channels, wide}, like),
                                                 data<T>(weights[4 * l + 1], {wide}, like),
                                                 data<T>(weights[4 * l + 2], {wide, wide}, like),
                                                 data<T>(weights[4 * l + 3], {wide}, like)};
            const auto at_row = [&](const Tensor& c, const T*& start, int64_t& image, int64_t& column) {
                TORCH_CHECK_VALUE(c.dim() == 4 && (c.size(0) == 1 || c.size(0) == n) && c.size(1) > 0 &&
                                      (c.size(2) == 1 || c.size(2) == width) && c.size(3) == wide,
                                  "conditions: got shape ", c.sizes());
                start = data<T>(c, {c.size(0), c.size(1), c.size(2), wide}, like) +
                        std::min(i, c.size(1) - 1) * c.size(2) * wide;
                image = c.size(0) == 1 ? 0 : c.size(1) * c.size(2) * wide;
                column = c.size(2) == 1 ? 0 : wide;
            };
            at_row(conditions[2 * l], layer.above, layer.above_image, layer.above_column);
            at_row(conditions[2 * l + 1], layer.beside, layer.beside_image, layer.beside_column);
            row.layers.push_back(layer);
        }
        vertical_row<T>(row);
    });
}

Tensor pixel_params_cpu(at::TensorList bases, at::TensorList state, at::TensorList horizontal, at::TensorList step,
                        at::TensorList step_bias, at::TensorList head, const Tensor& memory, at::IntArrayRef reaches,
                        int64_t image_channels, int64_t column, int64_t group) {
    Tensor out;
    AT_DISPATCH_FLOATING_TYPES(memory.scalar_type(), "infovae_fast::pixel_params", [&] {
        const auto row = pixel_row<scalar_t>(bases, state, horizontal, step, step_bias, head, memory, reaches, image_channels);
        TORCH_CHECK_VALUE(0 <= column && column < row.width && 0 <= group && group < row.groups, "no column ", column,
                          " of group ", group);
        out = at::empty({row.n, row.params / row.groups}, memory.options());
        pixel_params<scalar_t>(row, column, group, out.mutable_data_ptr<scalar_t>());
    });
    return out;
}

void draw_bits_cpu(at::TensorList bases, at::TensorList state, at::TensorList horizontal, at::TensorList step,
                   at::TensorList step_bias, at::TensorList head, const Tensor& memory, at::IntArrayRef reaches,
                   int64_t image_channels, const Tensor& x, const Tensor& uniforms, const Tensor& known,
                   const Tensor& mask, double temperature) {
    AT_DISPATCH_FLOATING_TYPES(memory.scalar_type(), "infovae_fast::draw_bits", [&] {
        using T = scalar_t;
        const auto row = pixel_row<T>(bases, state, horizontal, step, step_bias, head, memory, reaches, image_channels);
        const auto shape = {row.n, image_channels, row.width};
        TORCH_CHECK_VALUE(row.params == image_channels && image_channels % row.groups == 0,
                          "draw_bits: got ", row.params, " params for ", image_channels, " channels; accepted: one each");
        TORCH_CHECK_VALUE(uniforms.scalar_type() == at::kFloat && mask.scalar_type() == at::kBool &&
                              uniforms.is_contiguous() && mask.is_contiguous() && uniforms.sizes() == at::IntArrayRef(shape) &&
                              mask.sizes() == at::IntArrayRef(shape),
                          "draw_bits: accepted: float32 uniforms and bool mask, contiguous ", at::IntArrayRef(shape));
        draw_bits<T>(row, {uniforms.const_data_ptr<float>(), data<T>(known, shape, memory), mask.const_data_ptr<bool>(),
                           data<T>(x, shape, memory), image_channels, T(temperature)});
    });
}

// x like known, and params [n, P, H, W] if they are wanted.
std::tuple<Tensor, Tensor> draw_images_empty(const Tensor& /*table*/, at::TensorList /*conditions*/, at::IntArrayRef sizes,
                                             const std::optional<Tensor>& /*uniforms*/, const Tensor& known,
                                             const std::optional<Tensor>& /*mask*/, double /*temperature*/, bool params) {
    TORCH_CHECK_VALUE(sizes.size() == 7 && known.dim() == 4, "draw_images: got ", sizes.size(), " sizes and ", known.dim(),
                      " dimensions; accepted: 7 sizes, known [n, C, H, W]");
    const auto s = known.sym_sizes();
    return {at::empty_symint(s, known.options()),
            params ? at::empty_symint({s[0], sizes[2], s[2], s[3]}, known.options()) : at::empty({0}, known.options())};
}

#ifdef WITH_CUDA
std::tuple<Tensor, Tensor> draw_images_cuda(const Tensor& table, at::TensorList conditions, at::IntArrayRef sizes,
                                            const std::optional<Tensor>& uniforms, const Tensor& known,
                                            const std::optional<Tensor>& mask, double temperature, bool params) {
    const auto out = draw_images_empty(table, conditions, sizes, uniforms, known, mask, temperature, params);
    const int64_t n = known.size(0), channels = known.size(1), height = known.size(2), width = known.size(3);
    const int64_t maps = sizes[0], groups = sizes[1], count = sizes[2], layers = int64_t(conditions.size()) / 2;
    TORCH_CHECK_VALUE(channels > 0 && height > 0 && width > 0 && maps > 0 && groups > 0 && count > 0 &&
                          maps % groups == 0 && count % groups == 0 && channels % groups == 0 && sizes[3] > 0 &&
                          sizes[4] >= 0 && sizes[5] >= 0 && sizes[6] >= 0 && layers > 0 && conditions.size() % 2 == 0,
                      "draw_images: got known ", known.sizes(), ", sizes ", sizes, " and ", conditions.size(), " conditions");
    const int64_t levels = sizes[5], mixtures = sizes[6], draws = channels + (mixtures > 0 ? 1 : 0);
    const bool mixes = mixtures > 0 && groups == 1 && levels > 1 && (channels == 1 || channels == 3);
    const int64_t wanted = mixtures > 0 ? (channels == 1 ? 3 : 10) * mixtures : std::max<int64_t>(levels, 1) * channels;
    TORCH_CHECK_VALUE(uniforms.has_value() == mask.has_value(), "draw_images: got uniforms or a mask; accepted: both, or neither");
    TORCH_CHECK_VALUE(!uniforms.has_value() || (count == wanted && levels != 1 && (mixtures == 0 || mixes)), "draw_images: got ",
                      count, " params of ", groups, " groups for ", channels, " channels, ", levels, " levels and ", mixtures,
                      " mixtures");
    const auto shape = conditions[0].sizes();
    const int64_t size = int64_t(known.element_size()), wide = (2 * maps * size + 15) / 16 * 16 / size;
    TORCH_CHECK_VALUE(shape.size() == 4 && (shape[0] == 1 || shape[0] == n) && (shape[1] == 1 || shape[1] == height) &&
                          (shape[2] == 1 || shape[2] == width) && shape[3] == wide,
                      "conditions: got shape ", shape, "; accepted: [1 or n, 1 or H, 1 or W, ", wide, "]");
    const auto here = [&](const Tensor& t) {
        TORCH_CHECK_VALUE(t.device() == known.device(), "got ", t.device(), " beside ", known.device());
        return t.contiguous();
    };
    const auto aligned = [&](const Tensor& t) {
        TORCH_CHECK_VALUE(t.device() == known.device(), "got ", t.device(), " beside ", known.device());
        TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, "draw_images: got a view that starts ",
                          "between vectors; accepted: aligned to 16 bytes");
        return t;
    };
    const Tensor weights = aligned(table.contiguous()), given = here(known);
    const Tensor u = uniforms.has_value() ? here(*uniforms) : Tensor(), m = mask.has_value() ? here(*mask) : Tensor();
    TORCH_CHECK_VALUE(!u.defined() || (u.scalar_type() == at::kFloat && m.scalar_type() == at::kBool &&
                                       u.sizes() == at::IntArrayRef({n, draws, height, width}) && m.sizes() == known.sizes()),
                      "draw_images: accepted: float32 uniforms [n, ", draws, ", H, W] and bool mask of shape ", known.sizes());
    const c10::cuda::CUDAGuard guard(known.device());
    int processors = 1, shared = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, known.get_device()));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, known.get_device()));
    AT_DISPATCH_FLOATING_TYPES(known.scalar_type(), "infovae_fast::draw_images", [&] {
        using T = scalar_t;
        PixelImages<T> images{n, channels, height, width, maps, groups, count, layers, sizes[3], sizes[4],
                              data<T>(weights, {weights.numel()}, known)};
        for (size_t k = 0; k < conditions.size(); ++k) {
            const Tensor& c = aligned(conditions[k]);
            (k % 2 == 0 ? images.above : images.beside)
                .push_back(data<T>(c, {shape[0], shape[1], shape[2], shape[3]}, known));
        }
        images.condition_image = shape[0] == 1 ? 0 : shape[1] * shape[2] * shape[3];
        images.condition_row = shape[1] == 1 ? 0 : shape[2] * shape[3];
        images.condition_column = shape[2] == 1 ? 0 : shape[3];
        images.levels = levels, images.mixtures = mixtures;
        images.uniforms = u.defined() ? u.const_data_ptr<float>() : nullptr;
        images.known = given.const_data_ptr<T>();
        images.mask = m.defined() ? m.const_data_ptr<bool>() : nullptr;
        images.temperature = T(temperature);
        images.x = std::get<0>(out).template mutable_data_ptr<T>();
        images.out = params ? std::get<1>(out).template mutable_data_ptr<T>() : nullptr;
        const ImagesNeed need = images_cuda_need(images, processors, size_t(shared));
        TORCH_CHECK_VALUE(need.error != nullptr || need.table == weights.numel(), "table: got ", weights.numel(),
                          " numbers; accepted: ", need.table);
        const char* error = need.error;
        if (error == nullptr) {
            const Tensor workspace = at::empty({int64_t(need.workspace)}, known.options().dtype(at::kByte));
            error = images_cuda(images, workspace.mutable_data_ptr(), processors, size_t(shared),
                                c10::cuda::getCurrentCUDAStream().stream());
        }
        TORCH_CHECK(error == nullptr, "draw_images on ", known.device(), ": ", error);
    });
    return out;
}
#endif

// params [codes, P, H, W], channels last; sizes = (P, layers, maps, first reach, reach).
Tensor resident_empty(const Tensor& /*table*/, const Tensor& /*biases*/, const std::optional<Tensor>& /*condition*/,
                      const Tensor& y, c10::SymInt codes, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(sizes.size() == 5 && y.dim() == 4, "resident: got ", sizes.size(), " sizes and ", y.dim(),
                      " dimensions; accepted: 5 sizes, y [N, C, H, W]");
    return at::empty_symint({codes, y.sym_size(2), y.sym_size(3), sizes[0]}, y.options()).permute({0, 3, 1, 2});
}

#ifdef WITH_CUDA
Tensor resident_cuda_op(const Tensor& table, const Tensor& biases, const std::optional<Tensor>& condition, const Tensor& y,
                        c10::SymInt codes, at::IntArrayRef sizes) {
    Tensor out = resident_empty(table, biases, condition, y, codes, sizes);
    const int64_t n = out.size(0), layers = sizes[1], maps = sizes[2], first_reach = sizes[3], reach = sizes[4];
    TORCH_CHECK_VALUE(sizes[0] > 0 && layers > 0 && maps > 0 && first_reach > 0 && reach >= 0 && y.size(1) > 0 &&
                          y.size(2) > 0 && y.size(3) > 0 && (n == 0 || y.size(0) > 0),
                      "resident: got y ", y.sizes(), " for ", n, " codes and sizes ", sizes);
    const auto given = [&](const Tensor& t, at::ScalarType type, at::IntArrayRef shape, const char* name) -> const void* {
        TORCH_CHECK_VALUE(t.device() == y.device() && t.scalar_type() == type && t.sizes() == shape && t.is_contiguous(), name,
                          ": got ", t.scalar_type(), " ", t.sizes(), " on ", t.device(), "; accepted: contiguous ", type, " ",
                          shape, " on ", y.device());
        return t.const_data_ptr();
    };
    const at::ScalarType type = y.scalar_type();
    TORCH_CHECK_VALUE(type == at::kHalf || type == at::kBFloat16, "resident: got ", type, "; accepted: 16 bit numbers");
    Resident network{n, y.size(0), y.size(1), y.size(2), y.size(3), sizes[0], layers, maps, first_reach, reach};
    const ResidentNeed need = resident_cuda_need(network);
    TORCH_CHECK_VALUE(need.error == nullptr, "resident: got sizes ", sizes, " and y ", y.sizes(), " for ", n, " codes; accepted: ",
                      need.error);
    network.y = given(y, type, y.sizes(), "y");
    network.table = given(table, type, {need.table}, "table");
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(network.table) % 16 == 0, "table: got a view that starts between vectors; ",
                      "accepted: aligned to 16 bytes");
    network.biases = static_cast<const float*>(given(biases, at::kFloat, {need.biases}, "biases"));
    if (condition.has_value()) network.condition = given(*condition, type, {n, layers * 4 * maps}, "condition");
    network.out = out.mutable_data_ptr();
    if (n == 0) return out;
    const c10::cuda::CUDAGuard guard(y.device());
    const char* error = resident_cuda(type == at::kBFloat16, network, c10::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(error == nullptr, "resident on ", y.device(), ": ", error);
    return out;
}
#endif

}  // namespace

TORCH_LIBRARY(infovae_fast, m) {
    // Energy [...] in float64, forces [..., N, D] and [..., M, D], potentials [..., N] and [..., M] of the cloud [x; y],
    // with weights a and b of the points and w = (w_xx, w_xy, w_yy); what is not asked for comes back empty. A bandwidth
    // that is in memory, perhaps a GPU's, comes as `lengths` [S] in place of the numbers.
    m.def("pairwise(Tensor x, Tensor? y, Tensor? v, Tensor? a, Tensor? b, bool rbf, float[] bandwidth, Tensor? lengths, "
          "float[] weight, float alpha, float[] w, bool energy, bool x_force, bool y_force, bool potentials) -> "
          "(Tensor energy, Tensor x_force, Tensor y_force, Tensor x_potential, Tensor y_potential)",
          {at::Tag::pt2_compliant_tag});
    // out, and with a gate (not "") what goes into it if it is to be kept; taps = (dy_0, dx_0, dy_1, ...), colours =
    // (groups, are they interleaved, does the last tap join a group to itself).
    m.def("masked_conv_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? condition, Tensor? link, Tensor? link_weight, "
          "int[] taps, int[] colours, str gate, bool keep) -> (Tensor out, Tensor f)",
          {at::Tag::pt2_compliant_tag});
    // From the gradients to out and, with a gate, to the f that was kept: to what is asked for, with a gate also to f in
    // all. `condition_gradient` is that to a condition of all pixels, [N, Cout]; that to a spatial one is f's.
    m.def("masked_conv_backward(Tensor gradient, Tensor? f_gradient, Tensor x, Tensor weight, Tensor? link, "
          "Tensor? link_weight, Tensor f, int[] taps, int[] colours, str gate, bool to_x, bool to_weight, bool to_link, "
          "bool to_link_weight, bool to_f, bool to_bias, bool to_condition) -> (Tensor x_gradient, Tensor weight_gradient, "
          "Tensor link_gradient, Tensor link_weight_gradient, Tensor f_gradient, Tensor bias_gradient, "
          "Tensor condition_gradient)",
          {at::Tag::pt2_compliant_tag});
    // The halves of f, each with an image added; and from gradients to both those to what is asked for.
    m.def("masked_conv_halves_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? added, Tensor? added_b, int[] taps, "
          "int[] colours) -> (Tensor a, Tensor b)",
          {at::Tag::pt2_compliant_tag});
    m.def("masked_conv_halves_backward(Tensor gradient, Tensor gradient_b, Tensor x, Tensor weight, int[] taps, "
          "int[] colours, bool to_x, bool to_weight, bool to_bias) -> (Tensor x_gradient, Tensor weight_gradient, "
          "Tensor bias_gradient)",
          {at::Tag::pt2_compliant_tag});
    // -log P of each example, [N], and if wanted its gradient to params.
    m.def("logistic_mixture(Tensor params, Tensor x, int levels, bool gradient) -> (Tensor nll, Tensor gradient)",
          {at::Tag::pt2_compliant_tag});
    // The vertical stack of a gated PixelCNN at row i: bases, and row i of all rings but the first.
    m.def("vertical_row(Tensor[] weights, Tensor[] conditions, Tensor(a!)[] rings, Tensor(b!)[] bases, int[] reaches, int i)"
          " -> ()");
    // A gated PixelCNN at one column and group, params [n, P / G]; and at a whole row of bits x [n, C, width], drawn on
    // the way. The lists are those of models/incremental.py, head = (skip, its bias, hidden, .., output, ..).
    m.def("pixel_params(Tensor[] bases, Tensor(a!)[] state, Tensor[] horizontal, Tensor[] step, Tensor[] step_bias, "
          "Tensor[] head, Tensor(b!) memory, int[] reaches, int image_channels, int column, int group) -> Tensor");
    m.def("draw_bits(Tensor[] bases, Tensor(a!)[] state, Tensor[] horizontal, Tensor[] step, Tensor[] step_bias, "
          "Tensor[] head, Tensor(b!) memory, int[] reaches, int image_channels, Tensor(c!) x, Tensor uniforms, "
          "Tensor known, Tensor mask, float temperature) -> ()");
    // Whole images of a gated PixelCNN on a GPU, x [n, C, H, W], and if wanted params [n, P, H, W] of every pixel. `Images`
    // of models/incremental.py makes the table; sizes = (maps, groups, P, first reach, reach, levels, mixtures). Without
    // uniforms everything is known.
    m.def("draw_images(Tensor table, Tensor[] conditions, int[] sizes, Tensor? uniforms, Tensor known, Tensor? mask, "
          "float temperature, bool params) -> (Tensor x, Tensor params)",
          {at::Tag::pt2_compliant_tag});
    // params [codes, P, H, W] of whole images y = 2 x - 1 [N, C, H, W] on a GPU, code k of image k % N. `tables` of
    // models/resident.py tells where the weights are; condition [codes, layers * 4 * maps].
    m.def("resident(Tensor table, Tensor biases, Tensor? condition, Tensor y, SymInt codes, int[] sizes) -> Tensor",
          {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(infovae_fast, CPU, m) {
    m.impl("vertical_row", vertical_row_cpu);
    m.impl("pixel_params", pixel_params_cpu);
    m.impl("draw_bits", draw_bits_cpu);
    m.impl("pairwise", pairwise_native);
    m.impl("masked_conv_forward", masked_conv_forward_native);
    m.impl("masked_conv_backward", masked_conv_backward_native);
    m.impl("logistic_mixture", logistic_mixture_cpu);
}
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(infovae_fast, CUDA, m) {
    m.impl("pairwise", pairwise_native);
    m.impl("masked_conv_forward", masked_conv_forward_native);
    m.impl("masked_conv_backward", masked_conv_backward_native);
    m.impl("masked_conv_halves_forward", masked_conv_halves_forward_cuda);
    m.impl("masked_conv_halves_backward", masked_conv_halves_backward_cuda);
    m.impl("draw_images", draw_images_cuda);
    m.impl("resident", resident_cuda_op);
}
#endif
TORCH_LIBRARY_IMPL(infovae_fast, Meta, m) {
    m.impl("pairwise", pairwise_empty);
    m.impl("draw_images", draw_images_empty);
    m.impl("resident", resident_empty);
    m.impl("masked_conv_forward", masked_conv_forward_empty);
    m.impl("masked_conv_backward", masked_conv_backward_empty);
    m.impl("masked_conv_halves_forward", masked_conv_halves_forward_empty);
    m.impl("masked_conv_halves_backward", masked_conv_halves_backward_empty);
    m.impl("logistic_mixture", logistic_mixture_empty);
}

}  // namespace infovae_fast

PYBIND11_MODULE(_C, m) {
    m.doc() = "Loads the native operators of infovae_fast into torch.ops.infovae_fast; tells what was built.";
    static constexpr std::pair<const char*, const char*> baked[] = {BUILD_FACTS};
    for (const auto& [name, text] : baked) {  // _C.cpp and _C.cuda: "built", or why not
        if (std::string_view(name) == "cpp" || std::string_view(name) == "cuda") m.attr(name) = text;
    }
    m.def("usual_mmd", infovae_fast::usual_mmd);
    m.def("usual_stein", infovae_fast::usual_stein);
    m.def("build_info", [] {
        pybind11::dict facts;
        for (const auto& [name, text] : baked) facts[name] = text;
        facts["vector unit here"] = infovae_fast::vector_unit();
        return facts;
    });
}
