// The operators with their first derivatives.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

namespace infovae_fast {

// MMD^2 of two clouds on the CPU by one call, because at small N Python takes longer than the sums: unbiased, or biased
// if the value phi(0) of the diagonal is given. None where anything is unusual, the result too: the caller finds out.
pybind11::object usual_mmd(pybind11::handle x, pybind11::handle y, bool rbf, const std::vector<double>& bandwidth,
                           const std::vector<double>& weight, double alpha, std::optional<double> diagonal);

}  // namespace infovae_fast
