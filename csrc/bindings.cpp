// Every native schema on one page, and the Python module that tells what was built.
// The only place where PyTorch and our kernels meet: csrc/cuda/*.cu see pointers, sizes and a stream.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_facts.h"  // written by setup.py: BUILD_FACTS, a list of {"name", "text"},
#include "radial.h"

namespace infovae_fast {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 4096;  // elements a thread takes at least; less is not worth waking it

template <typename T>
std::vector<T> as_vector(const Tensor& t) {
    const Tensor host = t.to(at::kCPU, at::kDouble).contiguous();
    return std::vector<T>(host.data_ptr<double>(), host.data_ptr<double>() + host.numel());
}

template <Kind kind, typename T>
void radial_loop(const Tensor& d2, const Tensor& phi, const Tensor& dphi, const Tensor& bandwidth,
                 const Tensor& weight, double alpha) {
    const std::vector<T> w = as_vector<T>(weight);
    std::vector<T> rate;
    for (const double b : as_vector<double>(bandwidth)) rate.push_back(T(0.5 / (b * b)));
    const T* in = d2.const_data_ptr<T>();
    T* out = phi.mutable_data_ptr<T>();
    T* slope = dphi.mutable_data_ptr<T>();
    at::parallel_for(0, d2.numel(), kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Radial<T> r = radial<kind, T>(in[i], rate.data(), w.data(), int(w.size()), T(alpha));
            out[i] = r.phi;
            slope[i] = r.dphi;
        }
    });
}

std::tuple<Tensor, Tensor> radial_empty(const Tensor& d2, const std::string& /*kind*/, const Tensor& /*bandwidth*/,
                                        const Tensor& /*weight*/, double /*alpha*/) {
    return {at::empty_like(d2, at::MemoryFormat::Contiguous), at::empty_like(d2, at::MemoryFormat::Contiguous)};
}

std::tuple<Tensor, Tensor> radial_cpu(const Tensor& d2, const std::string& kind, const Tensor& bandwidth,
                                      const Tensor& weight, double alpha) {
    TORCH_CHECK_TYPE(d2.scalar_type() == at::kFloat || d2.scalar_type() == at::kDouble, "d2: got ", d2.scalar_type(),
                     "; accepted: float32, float64");
    TORCH_CHECK_VALUE(kind == "rbf" || kind == "rq", "kind: got '", kind, "'; accepted: 'rbf', 'rq'");
    TORCH_CHECK_VALUE(alpha > 0, "alpha: got ", alpha, "; give a positive number");
    TORCH_CHECK_VALUE(bandwidth.dim() == 1 && bandwidth.numel() > 0 && bandwidth.sizes() == weight.sizes(),
                      "bandwidth ", bandwidth.sizes(), " and weight ", weight.sizes(),
                      ": give one of each per scale, both of shape [S], S >= 1");
    auto [phi, dphi] = radial_empty(d2, kind, bandwidth, weight, alpha);
    const Tensor in = d2.contiguous();
    AT_DISPATCH_FLOATING_TYPES(d2.scalar_type(), "infovae_fast::radial", [&] {
        const auto loop = kind == "rbf" ? radial_loop<Kind::rbf, scalar_t> : radial_loop<Kind::rq, scalar_t>;
        loop(in, phi, dphi, bandwidth, weight, alpha);
    });
    return {phi, dphi};
}

}  // namespace

TORCH_LIBRARY(infovae_fast, m) {
    // phi and phi' of squared distances, elementwise; kind "rbf" or "rq", bandwidth and weight [S].
    m.def("radial(Tensor d2, str kind, Tensor bandwidth, Tensor weight, float alpha) -> (Tensor phi, Tensor dphi)",
          {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(infovae_fast, CPU, m) { m.impl("radial", radial_cpu); }
TORCH_LIBRARY_IMPL(infovae_fast, Meta, m) { m.impl("radial", radial_empty); }

}  // namespace infovae_fast

PYBIND11_MODULE(_C, m) {
    m.doc() = "Loads the native operators of infovae_fast into torch.ops.infovae_fast; tells what was built.";
    m.def("build_info", [] {
        pybind11::dict facts;
        const std::pair<const char*, const char*> baked[] = {BUILD_FACTS};
        for (const auto& [name, text] : baked) facts[name] = text;
        return facts;
    });
}
