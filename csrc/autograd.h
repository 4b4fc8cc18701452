// The operators with their first derivatives.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>

#include "pairwise.h"

namespace infovae_fast {

// `pairwise_cuda` on the device of x and its current stream, or an error; `lengths`: the bandwidths, if they are a tensor.
template <typename T>
void pairwise_on_gpu(const PairwiseProblem<T>& problem, int64_t clouds, const at::Tensor& x,
                     const std::optional<at::Tensor>& lengths, const Affine<T>& affine);
bool has_tensor_cores(const at::Tensor& x);  // those that `pairwise_cuda` uses, where x is

// infovae_fast.divergences.mmd, and stein_direction on the CPU, by one call, because at small N Python takes longer than
// the sums. None where anything is unusual, the result too: the caller finds out. `kernel`: None, or its
// `plain` is taken; `score`: None or a tensor.
pybind11::object usual_mmd(pybind11::handle x, pybind11::handle y, pybind11::handle kernel, pybind11::handle estimator,
                           pybind11::handle backend);
pybind11::object usual_stein(pybind11::handle z, pybind11::handle score, pybind11::handle kernel, pybind11::handle backend);

}  // namespace infovae_fast
