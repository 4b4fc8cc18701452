// Kernels that tests/test_simt.py runs on tests/simt/cuda_runtime.h, and compiles with nvcc where there is one.
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#ifdef __CUDACC__
template <typename T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return reinterpret_cast<T*>(bytes);
}
#endif

// A template with a name for the linker: libraries that both have it must not share its memory.
template <typename T>
__device__ T* scratch() {
    __shared__ T memory[2];
    return memory;
}

namespace {

template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic, Args... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = dynamic;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename T>
__device__ T block_sum(T value) {
    __shared__ T of_warp[32];
    const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
    for (int offset = warpSize / 2; offset; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
    if (lane == 0) of_warp[warp] = value;
    __syncthreads();
    value = threadIdx.x < blockDim.x / warpSize ? of_warp[lane] : T(0);
    if (warp == 0)
        for (int offset = warpSize / 2; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    __syncthreads();
    return value;
}

// The last block to finish adds up what the blocks found, in an order of its own.
template <typename T>
__global__ void __launch_bounds__(1024) sum(const T* __restrict__ x, int n, T* partial, unsigned* done, T* out) {
    __shared__ bool last;
    T value = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) value += __ldg(x + i);
    value = block_sum(value);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = value;
        __threadfence();
        last = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    value = 0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) value += partial[b];
    value = block_sum(value);
    if (threadIdx.x == 0) *out = value;
}

constexpr int kTile = 32;

__global__ void transpose(const float* x, int rows, int columns, float* out) {
    float* tile = shared_memory<float>();
    const int row = blockIdx.y * kTile, column = blockIdx.x * kTile, t = threadIdx.x;
    for (int i = threadIdx.y; i < kTile; i += blockDim.y)
        if (row + i < rows && column + t < columns) tile[i * (kTile + 1) + t] = x[(row + i) * columns + column + t];
    __syncthreads();
    for (int i = threadIdx.y; i < kTile; i += blockDim.y)
        if (column + i < columns && row + t < rows) out[(column + i) * rows + row + t] = tile[t * (kTile + 1) + i];
}

// Reads what a neighbour wrote. Without the barrier that is a race: in its warp, or between two warps.
__global__ void neighbour(const float* x, int distance, bool barrier, float* out) {
    __shared__ float tile[1024];
    tile[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncthreads();
    out[threadIdx.x] = tile[(threadIdx.x + distance) % blockDim.x];
}

// Four copies in three groups; a row of out after each wait. What is not there yet is poison here, and a race on a GPU.
__global__ void copies(const float* x, float* out) {
    __shared__ __align__(16) float slots[64][4];
    const int thread = threadIdx.x;
    float* const mine = slots[thread];
    for (int k = 0; k < 4; ++k) {
        __pipeline_memcpy_async(mine + k, x + 4 * thread + k, sizeof(float));
        if (k != 1) __pipeline_commit();
    }
    for (int row = 0; row < 3; ++row) {
        __pipeline_wait_prior(2 - row);
        for (int k = 0; k < 4; ++k) out[(row * 64 + thread) * 4 + k] = mine[k];
    }
    __syncthreads();
    __pipeline_memcpy_async(mine, x + 4 * (63 - thread), 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    for (int k = 0; k < 4; ++k) out[(3 * 64 + thread) * 4 + k] = slots[63 - thread][k];
}

enum Mistake { kNone, kExit, kOtherBarrier, kOtherWarpBarrier, kWarpOfExited, kNotInMask };

__global__ void diverge(int mistake) {
    const bool odd = threadIdx.x % 2;
    if (mistake == kExit || mistake == kWarpOfExited) {
        if (odd) return;
    }
    if (mistake == kOtherBarrier && odd) {
        __syncthreads();
    } else if (mistake == kOtherWarpBarrier && odd) {
        __syncwarp();
    } else if (mistake == kWarpOfExited) {
        __syncwarp();
    } else if (mistake == kNotInMask) {
        __syncwarp(0x55555555u);
    } else {
        __syncthreads();
    }
}

__global__ void warp_operations(const int* x, int* out) {
    const int lane = threadIdx.x, mine = x[lane], n = blockDim.x;
    const unsigned all = 0xffffffffu, half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    int row = 0;
    const auto write = [&](int value) { out[n * row++ + lane] = value; };
    write(__shfl_sync(all, mine, lane + 5));
    write(__shfl_sync(all, mine, 3, 8));
    write(__shfl_up_sync(all, mine, 3, 16));
    write(__shfl_down_sync(all, mine, 3, 16));
    write(__shfl_xor_sync(all, mine, 9, 8));
    write(__shfl_xor_sync(half, static_cast<double>(mine), 5) * 2);
    write(static_cast<int>(__ballot_sync(half, mine % 3 == 0)));
    write(__any_sync(half, mine == 20) + 2 * __all_sync(half, mine < 16));
    write(__syncthreads_count(mine % 5 == 0));
    write(__syncthreads_or(mine == 7) + 2 * __syncthreads_and(mine == 7));
    if (lane < 16) __syncwarp(0x0000ffffu);
    write(lane < 7 ? static_cast<int>(__shfl_sync(0x7fu, 10u + mine, 6)) : -1);
}

__global__ void atomics(int* ints, unsigned* tickets, unsigned long long* wide, float* single, double* twice) {
    __shared__ int fixed[2];
    if (threadIdx.x == 0) {
        tickets[1 + blockIdx.x + gridDim.x * blockIdx.y] = atomicAdd(tickets, 1);
        if ((fixed[0] & fixed[1] & scratch<int>()[1] & shared_memory<int>()[6]) != -1) atomicAdd(ints, 1);
        fixed[blockIdx.x % 2] = scratch<int>()[1] = shared_memory<int>()[6] = 0;
    }
    atomicMax(ints + 1, static_cast<int>(threadIdx.x));
    if (atomicCAS(ints + 2, 0, 1) == 0) atomicAdd(ints + 3, 1);
    atomicAdd(wide, 1ull << 40);
    atomicAdd(single, 0.5f);
    atomicAdd(twice, 0.25);
}

__global__ void arithmetic(const float* x, float* out) {
    const float a = x[0], b = x[1];
    const float4 four = make_float4(a, b, min(a, b), max(b, nanf("")));
    *reinterpret_cast<float4*>(out) = four;
    out[4] = exp2f(a) + rsqrtf(b) + __fmaf_rn(a, b, 1.0f) + __frcp_rn(b) + __fdividef(a, b);
    out[5] = __expf(a) + __logf(b) + __log2f(b) + __saturatef(b) + __saturatef(-a);
    out[6] = __int_as_float(__float_as_int(a)) + __uint_as_float(__float_as_uint(b));
    out[7] = static_cast<float>(__longlong_as_double(__double_as_longlong(a)));
    out[8] = __popc(255) + __clz(1) + __ffs(8) + min(3, 2) + max(3u, 4u);
    out[9] = __float2int_rn(2.5f) + (__float2int_rn(1e20f) == 2147483647) + __float2int_rn(nanf(""));
}

__global__ void nothing() {}

// sum_j exp(-|x_i - y_j|^2), the y_j of a tile in shared memory.
__global__ void pairwise(const float* x, const float* y, int n, int m, float* out) {
    __shared__ float4 tile[128];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float total = 0;
    for (int first = 0; first < m; first += blockDim.x) {
        const int j = first + threadIdx.x;
        if (j < m) tile[threadIdx.x] = make_float4(y[3 * j], y[3 * j + 1], y[3 * j + 2], 0);
        __syncthreads();
        for (int k = 0; i < n && k < min(static_cast<int>(blockDim.x), m - first); ++k) {
            const float dx = x[3 * i] - tile[k].x, dy = x[3 * i + 1] - tile[k].y, dz = x[3 * i + 2] - tile[k].z;
            total += expf(-(dx * dx + dy * dy + dz * dz));
        }
        __syncthreads();
    }
    if (i < n) out[i] = total;
}

}  // namespace

extern "C" {

int run_sum_float(const float* x, int n, int blocks, int threads, float* partial, unsigned* done, float* out) {
    return launch(sum<float>, blocks, threads, 0, x, n, partial, done, out);
}
int run_sum_double(const double* x, int n, int blocks, int threads, double* partial, unsigned* done, double* out) {
    return launch(sum<double>, blocks, threads, 0, x, n, partial, done, out);
}
int run_transpose(const float* x, int rows, int columns, int dynamic, float* out) {
    const dim3 grid((columns + kTile - 1) / kTile, (rows + kTile - 1) / kTile);
    return launch(transpose, grid, dim3(kTile, 8), dynamic, x, rows, columns, out);
}
int run_neighbour(const float* x, int n, int distance, bool barrier, float* out) {
    return launch(neighbour, 1, n, 0, x, distance, barrier, out);
}
int run_copies(const float* x, float* out) { return launch(copies, 1, 64, 0, x, out); }
int run_diverge(int mistake) { return launch(diverge, dim3(1, 2), dim3(16, 4), 0, mistake); }
int run_warp_operations(const int* x, int n, int* out) { return launch(warp_operations, 1, n, 0, x, out); }
int run_atomics(int* ints, unsigned* tickets, unsigned long long* wide, float* single, double* twice) {
    return launch(atomics, dim3(4, 2), 96, 28, ints, tickets, wide, single, twice);
}
int run_arithmetic(const float* x, float* out) { return launch(arithmetic, 1, 1, 0, x, out); }
int run_pairwise(const float* x, const float* y, int n, int m, float* out) {
    return launch(pairwise, (n + 127) / 128, 128, 0, x, y, n, m, out);
}
int run_nothing(const int* grid, const int* block, int dynamic, int limit) {
    if (limit) {
        const cudaError_t error = cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
        if (error != cudaSuccess) return error;
    }
    return launch(nothing, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), dynamic);
}
int last_error() { return cudaGetLastError(); }
}
