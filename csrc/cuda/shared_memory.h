// The dynamic shared memory of a block; tests/simt has its own.
#pragma once

#ifdef __CUDACC__
namespace infovae_fast {
namespace {

template <typename T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return reinterpret_cast<T*>(bytes);
}

}  // namespace
}  // namespace infovae_fast
#endif
