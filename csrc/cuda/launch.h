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

#ifdef __CUDACC__
inline bool may_overlap(const void* kernel) {  // was what runs here compiled with `after_previous` in it
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, bool> known;  // by kernel and device
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find({kernel, device});
    if (found != known.end()) return found->second;
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return cudaGetLastError() == cudaSuccess;  // false
    return known[{kernel, device}] = attributes.ptxVersion >= 90;
}
#endif

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                   const Arguments&... arguments) {
    if (shared > 48 << 10) {  // else another thread's launch of more might come between
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(unsigned(threads), 1, 1);
    config.dynamicSmemBytes = shared, config.stream = stream;
#ifdef __CUDACC__
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap, config.numAttrs = may_overlap(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
#endif
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace
}  // namespace infovae_fast
