// What the programs here share that run CUDA kernels without PyTorch: an error ends them.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>

inline void check(const char* error) {  // null: none
    if (error == nullptr) return;
    std::fprintf(stderr, "%s\n", error);
    std::exit(1);
}
// Of `check N` the N, of `[commit]` 0; ends the program if it is neither.
inline int checked(int count, char** arguments) {
    const bool check = count > 1 && std::string(arguments[1]) == "check";
    const int n = check && count == 3 ? std::atoi(arguments[2]) : 0;
    if (count > 3 || (count == 3 && !check) || (check && n < 1)) {
        std::fprintf(stderr, "usage: %s [commit] to time, or %s check N, N > 0, to check alone\n", arguments[0], arguments[0]);
        std::exit(2);
    }
    return n;
}
inline void check(cudaError_t error) { check(error == cudaSuccess ? nullptr : cudaGetErrorString(error)); }
