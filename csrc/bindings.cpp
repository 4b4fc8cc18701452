// Every native schema on one page, the operators on points and params, and the Python module that tells what was built.
// PyTorch and our kernels meet here and in bindings_*.cpp alone: csrc/cuda/*.cu see pointers, sizes and a stream.
#include <ATen/Dispatch.h>
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
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "autograd.h"
#include "build_facts.h"  // written by setup.py: BUILD_FACTS, a list of {"name", "text"},
#include "cpu/vector.h"
#include "logistic_mixture.h"
#include "pairwise.h"

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
    for (const double length : problem.radial.bandwidth) {  // one that is learnt may have changed since the kernel was made
        TORCH_CHECK_VALUE(length > 0 && std::isfinite(length), "bandwidth: got ", length, "; accepted: finite numbers above 0");
    }
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
    TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(-1) > 0 && x.size(-2) > 0, "x: got shape ", x.sizes(), "; accepted: [..., N, D]");
    TORCH_CHECK_VALUE(w.size() == 3, "w: got ", w.size(), " numbers; accepted: w_xx, w_xy, w_yy");
    const size_t scales = lengths.has_value() ? size_t(lengths->numel()) : bandwidth.size();
    TORCH_CHECK_VALUE(scales > 0 && scales == weight.size(), "bandwidth and weight: got ", scales, " and ",
                      weight.size(), " numbers; give one of each per scale");
    TORCH_CHECK_VALUE(!(v.has_value() && y_force), "v belongs to the forces on x; ask for y_force without it");
    TORCH_CHECK_VALUE(!y.has_value() || y->dim() == x.dim(), "y: got shape ", y->sizes(), " beside x ", x.sizes(),
                      "; accepted: as many dimensions");
    const int64_t n = x.size(-2), d = x.size(-1), m = y.has_value() ? y->size(-2) : 0;
    const int64_t clouds = x.numel() / std::max<int64_t>(1, n * d);
    const auto contiguous = [&](const char* name, const std::optional<Tensor>& t, int64_t points, bool coordinates) {
        if (!t.has_value()) return Tensor();
        TORCH_CHECK_TYPE(t->scalar_type() == x.scalar_type(), name, ": got ", t->scalar_type(), " beside ", x.scalar_type());
        TORCH_CHECK_VALUE(t->device() == x.device(), name, ": got ", t->device(), " beside ", x.device());
        std::vector<int64_t> shape = x.sizes().slice(0, x.dim() - 2).vec();
        shape.push_back(points);
        if (coordinates) shape.push_back(d);
        TORCH_CHECK_VALUE(t->sizes() == at::IntArrayRef(shape), name, ": got shape ", t->sizes(), " beside x ", x.sizes(),
                          "; accepted: ", at::IntArrayRef(shape));
        return t->contiguous();
    };
    const Tensor xs = x.contiguous(), ys = contiguous("y", y, m, true), vs = contiguous("v", v, n, true),
                 as = contiguous("a", a, n, false), bs = contiguous("b", b, m, false);
    auto out = pairwise_empty(x, y, v, a, b, rbf, bandwidth, lengths, weight, alpha, w, energy, x_force, y_force,
                              potentials);
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
    m.impl("pairwise", pairwise_native);
    m.impl("logistic_mixture", logistic_mixture_cpu);
}
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(infovae_fast, CUDA, m) {
    m.impl("pairwise", pairwise_native);
}
#endif
TORCH_LIBRARY_IMPL(infovae_fast, Meta, m) {
    m.impl("pairwise", pairwise_empty);
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
