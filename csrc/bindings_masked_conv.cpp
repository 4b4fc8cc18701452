// The operators masked_conv_* of bindings.cpp, where their schemas are.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zero.h>
#include <torch/library.h>
#ifdef WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "masked_conv.h"

namespace infovae_fast {
namespace {

using at::Tensor;

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

}  // namespace

TORCH_LIBRARY_IMPL(infovae_fast, CPU, m) {
    m.impl("masked_conv_forward", masked_conv_forward_native);
    m.impl("masked_conv_backward", masked_conv_backward_native);
}
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(infovae_fast, CUDA, m) {
    m.impl("masked_conv_forward", masked_conv_forward_native);
    m.impl("masked_conv_backward", masked_conv_backward_native);
    m.impl("masked_conv_halves_forward", masked_conv_halves_forward_cuda);
    m.impl("masked_conv_halves_backward", masked_conv_halves_backward_cuda);
}
#endif
TORCH_LIBRARY_IMPL(infovae_fast, Meta, m) {
    m.impl("masked_conv_forward", masked_conv_forward_empty);
    m.impl("masked_conv_backward", masked_conv_backward_empty);
    m.impl("masked_conv_halves_forward", masked_conv_halves_forward_empty);
    m.impl("masked_conv_halves_backward", masked_conv_halves_backward_empty);
}

}  // namespace infovae_fast
