// Launches. On GPUs since sm_90 a kernel may start before the one in front of it has ended: its blocks take the room that
// becomes free and wait where it says `after_previous`, which saves the microseconds between two launches.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

namespace infovae_fast {
namespace {

// At the start of every kernel that `launch` launches, before it reads or writes what another may have written or read.
__device__ __forceinline__ void after_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}

// The text of an error, or null; PyTorch would find it once more where it looks after launches of its own.
inline const char* text_of(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
}

#ifdef __CUDACC__
struct KernelFacts {
    bool may_overlap;   // was what runs here compiled with `after_previous` in it
    cudaError_t shared;  // may a launch ask for all the shared memory that the GPU has for a block
};
inline KernelFacts facts_of(const void* kernel) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, KernelFacts> known;  // by kernel and device
    int device = 0, most = 0;
    const auto unknown = [](cudaError_t error) {
        cudaGetLastError();
        return KernelFacts{false, error};
    };
    if (const cudaError_t error = cudaGetDevice(&device)) return unknown(error);
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find({kernel, device});
    if (found != known.end()) return found->second;
    cudaFuncAttributes attributes{};
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return unknown(error);
    cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     most - int(attributes.sharedSizeBytes));
    }
    if (error != cudaSuccess) cudaGetLastError();
    return known[{kernel, device}] = {attributes.ptxVersion >= 90, error};
}
#endif

// Once and for all: other threads launch the same kernel with more, or with less.
template <typename Kernel>
cudaError_t allow_shared(Kernel* kernel, size_t bytes) {
    if (bytes <= 48 << 10) return cudaSuccess;
#ifdef __CUDACC__
    return facts_of(reinterpret_cast<const void*>(kernel)).shared;
#else
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
#endif
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                   const Arguments&... arguments) {
    if (const cudaError_t error = allow_shared(kernel, shared)) return error;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(unsigned(threads), 1, 1);
    config.dynamicSmemBytes = shared, config.stream = stream;
#ifdef __CUDACC__
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap, config.numAttrs = facts_of(reinterpret_cast<const void*>(kernel)).may_overlap ? 1 : 0;
#endif
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace
}  // namespace infovae_fast
