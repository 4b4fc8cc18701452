// What the programs here share that run CUDA kernels without PyTorch: an error ends them.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

inline void check(const char* error) {  // null: none
    if (error == nullptr) return;
    std::fprintf(stderr, "%s\n", error);
    std::exit(1);
}
inline void check(cudaError_t error) { check(error == cudaSuccess ? nullptr : cudaGetErrorString(error)); }
