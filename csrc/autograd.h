// The operators with their first derivatives.
#pragma once

#include <pybind11/pybind11.h>

#include <string_view>

namespace infovae_fast {

// infovae_fast.divergences.mmd of two clouds on the CPU by one call, because at small N Python takes longer than the
// sums. None where anything is unusual, the result too: the caller finds out. `kernel`: None, or its `plain` is taken.
pybind11::object usual_mmd(pybind11::handle x, pybind11::handle y, pybind11::handle kernel, std::string_view estimator,
                           std::string_view backend);

}  // namespace infovae_fast
