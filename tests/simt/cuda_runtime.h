// A GPU for tests: with this folder on the include path, g++ compiles a .cu file as C++ and its kernels run on the CPU.
//
// Blocks run one after the other, each from shared memory that is poisoned anew (bytes 0xFF: NaN, -1). The threads of
// a block are fibres: each runs until it waits at a barrier or a warp operation, and a warp runs until all of it waits
// for other warps. So a result that lacks a barrier, or counts on the order of the blocks, depends on SIMT_ORDER:
//
//     forward (the default), reverse, shuffle or shuffle:SEED      the order of lanes, of warps and of blocks
//
// Asynchronous copies (__pipeline_memcpy_async) leave poison until their thread has waited for them, and read then.
//
// Threads that wait for others which have exited, or which wait at another line, are reported and the process aborts;
// here that includes exited lanes in a mask, which CUDA permits at times. What a lane that takes no part would give is
// poison. Dynamic shared memory is shared_memory<T>(), from here; under nvcc (#ifdef __CUDACC__) the .cu defines it:
//
//     template <typename T>
//     __device__ __forceinline__ T* shared_memory() {
//         extern __shared__ __align__(16) unsigned char bytes[];
//         return reinterpret_cast<T*>(bytes);
//     }
//
// Not here: <<<...>>> (use cudaLaunchKernelEx), launch attributes, waiting for another block, inline PTX, arithmetic in
// 16 bits (cuda_fp16.h and cuda_bf16.h convert), products of matrices but for those of warp_matrix.h. Fences do nothing,
// so a missing one does not show. Registers, launch bounds and the sum of static and dynamic shared memory are not
// limited. Launch from one CPU thread at a time.
#pragma once
#define INFOVAE_FAST_SIMT

#include <link.h>
#include <math.h>
#include <sys/mman.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>  // says __noinline__, so it must come before the macro
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef __x86_64__
#define SIMT_UCONTEXT
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // nothing else may be: that is how poisoning finds them
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

#define SIMT_VECTORS(T, name)                                                       \
    struct __align__(2 * sizeof(T)) name##2 { T x, y; };                            \
    struct name##3 { T x, y, z; };                                                  \
    struct __align__(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                      \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }              \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(unsigned char, uchar)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
SIMT_VECTORS(long long, longlong)
SIMT_VECTORS(unsigned long long, ulonglong)
SIMT_VECTORS(float, float)
SIMT_VECTORS(double, double)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// The numbers of CUDA, as tests see them through ctypes.
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration = 9, cudaErrorNotSupported = 801 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

#pragma GCC visibility push(hidden)  // libraries in one process do not share what follows

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kSharedDefault = 48 << 10, kSharedMost = 227 << 10;
constexpr size_t kSharedAlignment = 128;  // of dynamic shared memory
constexpr size_t kStack = 256 << 10, kGuard = 64 << 10;

// ---- fibres ----

#ifdef SIMT_UCONTEXT
using Context = ucontext_t;
inline void swap(Context* from, Context* to) { swapcontext(from, to); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    makecontext(&context, entry, 0);
}
#else
using Context = void**;  // the stack pointer; on the stack lie the registers that a call preserves, and where to return
__attribute__((naked, noipa)) inline void swap(Context* /*from: rdi*/, Context* /*to: rsi*/) {
    asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi);"
        "mov (%rsi), %rsp; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
inline void prepare(Context& context, char* stack, void (*entry)()) {
    context = reinterpret_cast<Context>(stack + kStack) - 8;
    context[6] = reinterpret_cast<void*>(entry);
}
#endif

// Where a thread waits: for the lanes of the mask, or for the whole block (0). Without a file: it has exited.
struct Stop {
    const char* file;
    int line;
    unsigned mask;
    bool operator==(const Stop& other) const { return file == other.file && line == other.line && mask == other.mask; }
};

struct Fibre {
    Context context;
    const void* stack;
    size_t size;
};

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    unsigned group;
};

struct Thread : Fibre {
    uint3 index;
    bool ready;
    Stop stop;
    std::vector<Copy> copies;  // that are under way, and the number of groups so far
    unsigned groups;
    uint64_t value, result;  // what it brings to the others and gets from them
    int source;              // the lane that it reads
};
constexpr int kVotes = -1;  // the source that stands for all: a bit for each lane with a value

inline Thread threads[kMaxThreads];
inline Thread* running;
inline unsigned thread_count;
inline Fibre scheduler, *left;
inline const std::function<void()>* kernel;
inline void* dynamic_shared;
inline std::map<const void*, size_t> raised;  // the kernels with a higher limit of dynamic shared memory
inline cudaError_t last_error;

inline void arrive([[maybe_unused]] void* fake) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, &left->stack, &left->size);
#endif
}

inline void go(Fibre& from, Fibre& to) {
    void* fake = nullptr;
    left = &from;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake, to.stack, to.size);
#endif
    swap(&from.context, &to.context);
    arrive(fake);
}

inline void live() {
    arrive(nullptr);
    for (;;) {  // a block of some launch
        (*kernel)();
        running->ready = false;
        running->stop = {};
        go(*running, scheduler);
    }
}

inline void create(Thread& thread) {
    char* memory = static_cast<char*>(mmap(nullptr, kGuard + kStack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    char* stack = memory + kGuard;  // below stays closed, so that an overflow does not go unseen
    if (memory == MAP_FAILED || mprotect(stack, kStack, PROT_READ | PROT_WRITE)) {
        std::perror("simt: the stack of a thread");
        std::abort();
    }
    thread.stack = stack;
    thread.size = kStack;
    prepare(thread.context, stack, live);
}

// ---- the scheduler ----

inline char order;  // the first letter of SIMT_ORDER
inline uint64_t seed;

inline void read_order() {
    const char* given = std::getenv("SIMT_ORDER");
    const std::string text = given && *given ? given : "forward", name = text.substr(0, text.find(':'));
    if (text != "forward" && text != "reverse" && name != "shuffle") {
        std::fprintf(stderr, "simt: SIMT_ORDER=%s; accepted: forward, reverse, shuffle, shuffle:SEED\n", given);
        std::abort();
    }
    order = name[0];
    seed = name == text ? 0 : std::atoi(text.c_str() + name.size() + 1);
}

template <typename Visit>
void in_order(size_t count, Visit visit) {
    std::vector<size_t> items(count);
    std::iota(items.begin(), items.end(), 0);
    if (order == 'r') std::reverse(items.begin(), items.end());
    for (size_t i = count; order == 's' && i > 1; --i) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        std::swap(items[i - 1], items[(seed >> 33) % i]);
    }
    for (size_t item : items) visit(item);
}

[[noreturn]] inline void diverged(const Thread* first, unsigned count) {
    std::map<std::string, std::vector<uint3>> groups;
    for (const Thread* thread = first; thread < first + count; ++thread) {
        const auto [file, line, mask] = thread->stop;
        char text[512] = "exited";
        if (file) std::snprintf(text, sizeof text, "at %s:%d, with all of the block", file, line);
        if (file && mask) std::snprintf(text, sizeof text, "at %s:%d, with the lanes 0x%08x", file, line, mask);
        groups[text].push_back(thread->index);
    }
    std::fprintf(stderr, "simt: block (%u, %u, %u): threads that never meet\n", blockIdx.x, blockIdx.y, blockIdx.z);
    for (const auto& [text, at] : groups) {
        const auto [x, y, z] = at[0];
        std::fprintf(stderr, "  (%u, %u, %u) and %zu more: %s\n", x, y, z, at.size() - 1, text.c_str());
    }
    std::abort();
}

// Lets those lanes go on whose partners have all come, each with the value of its source. False: there were none.
inline bool release(Thread* warp, unsigned lanes) {
    bool any = false;
    for (Thread* first = warp; first < warp + lanes; ++first) {
        if (first->ready || !first->stop.mask) continue;
        uint64_t partners = 0, votes = 0;
        bool complete = true;
        for (unsigned l = 0; l < lanes; ++l) {
            if (!(first->stop.mask >> l & 1)) continue;
            complete &= !warp[l].ready && warp[l].stop == first->stop;
            partners |= uint64_t(1) << l;
            votes |= uint64_t(warp[l].value != 0) << l;
        }
        if (!complete) continue;
        for (unsigned l = 0; l < lanes; ++l) {
            if (!(partners >> l & 1)) continue;
            const int source = warp[l].source;
            warp[l].result = source == kVotes ? votes : partners >> source & 1 ? warp[source].value : ~uint64_t(0);
            warp[l].ready = any = true;
        }
    }
    return any;
}

// Until each of its threads has exited or waits for the block.
inline void run_warp(Thread* warp, unsigned lanes) {
    do {
        in_order(lanes, [&](size_t lane) {
            running = warp + lane;
            threadIdx = running->index;
            if (running->ready) go(scheduler, *running);
        });
    } while (release(warp, lanes));
    for (unsigned lane = 0; lane < lanes; ++lane)
        if (warp[lane].stop.mask) diverged(warp, lanes);
}

inline void run_block() {
    Thread* const end = threads + thread_count;
    for (Thread* thread = threads; thread < end; ++thread) thread->ready = true, thread->copies.clear();
    for (;;) {
        in_order((thread_count + warpSize - 1) / warpSize, [&](size_t w) {
            Thread* warp = threads + w * warpSize;
            run_warp(warp, std::min<unsigned>(warpSize, end - warp));
        });
        uint64_t votes = 0;
        for (Thread* thread = threads; thread < end; ++thread) {
            if (!(thread->stop == threads->stop)) diverged(threads, thread_count);
            votes += thread->value != 0;
        }
        if (!threads->stop.file) return;
        for (Thread* thread = threads; thread < end; ++thread) thread->ready = true, thread->result = votes;
    }
}

// The thread_local memory of this library, which is that of its __shared__ variables.
inline std::pair<char*, size_t> static_shared() {
    __shared__ char member;
    std::pair<char*, size_t> memory(&member, 0);
    const auto search = [](dl_phdr_info* library, size_t, void* found) {
        auto& [begin, size] = *static_cast<std::pair<char*, size_t>*>(found);
        char* const own = static_cast<char*>(library->dlpi_tls_data);
        for (int i = 0; own && i < library->dlpi_phnum; ++i) {
            const auto& part = library->dlpi_phdr[i];
            if (part.p_type != PT_TLS || begin < own || begin >= own + part.p_memsz) continue;
            begin = own, size = part.p_memsz;
            return 1;
        }
        return 0;
    };
    dl_iterate_phdr(search, &memory);
    return memory;
}

inline cudaError_t check(const cudaLaunchConfig_t& config, const void* function) {
    const dim3 g = config.gridDim, b = config.blockDim;
    if (config.numAttrs) return cudaErrorNotSupported;
    if (!g.x || !g.y || !g.z || g.x > INT_MAX || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
    if (!b.x || !b.y || !b.z || b.x > kMaxThreads || b.y > kMaxThreads || b.z > 64 || b.x * b.y * b.z > kMaxThreads)
        return cudaErrorInvalidConfiguration;
    const size_t limit = raised.count(function) ? raised[function] : kSharedDefault;
    return config.dynamicSmemBytes > std::max(limit, kSharedDefault) ? cudaErrorInvalidValue : cudaSuccess;
}

inline uint3 unravel(size_t i, dim3 size) {
    return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

inline void launch(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
    kernel = &body;
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    thread_count = blockDim.x * blockDim.y * blockDim.z;
    read_order();
    for (unsigned t = 0; t < thread_count; ++t) {
        if (!threads[t].stack) create(threads[t]);
        threads[t].index = unravel(t, blockDim);
    }
    const auto shared = static_shared();
    in_order(size_t(gridDim.x) * gridDim.y * gridDim.z, [&](size_t block) {
        blockIdx = unravel(block, gridDim);
        std::memset(shared.first, 0xFF, shared.second);
        // New for each block and of this very size, so that the address sanitizer knows its bounds.
        const size_t bytes = config.dynamicSmemBytes;
        void* aligned = nullptr;
        if (bytes && posix_memalign(&aligned, kSharedAlignment, bytes)) std::abort();
        const std::unique_ptr<void, void (*)(void*)> memory(aligned, std::free);
        if (bytes) std::memset(memory.get(), 0xFF, bytes);
        dynamic_shared = memory.get();
        run_block();
    });
}

// ---- what kernels call ----

inline uint64_t wait(Stop stop, uint64_t value, int source) {
    Thread& self = *running;
    self.ready = false;
    self.stop = stop;
    self.value = value;
    self.source = source;
    go(self, scheduler);
    return self.result;
}

inline int lane() { return (running - threads) % warpSize; }

// A call is known by its place: the default argument is that of the caller.
constexpr Stop here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line, 0}; }

inline uint64_t with_lanes(unsigned mask, uint64_t value, int source, Stop stop) {
    stop.mask = mask;
    if (!(mask >> lane() & 1)) {
        std::fprintf(stderr, "simt: lane %d is not in its mask 0x%08x at %s:%d\n", lane(), mask, stop.file, stop.line);
        std::abort();
    }
    return wait(stop, value, source);
}

template <typename T>
T shuffle(unsigned mask, T value, int source, Stop stop) {
    static_assert(std::is_arithmetic_v<T>);
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof value);
    word = with_lanes(mask, word, source, stop);
    std::memcpy(&value, &word, sizeof value);
    return value;
}

template <typename To, typename From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <typename T>
using Given = std::common_type_t<T>;  // the pointer alone tells T: atomicAdd(unsigned*, 1)

template <typename T, typename Change>
T update(T* address, Change change) {
    const T old = *address;
    *address = change(old);
    return old;
}

}  // namespace simt

template <typename T>
T* shared_memory() {
    return static_cast<T*>(simt::dynamic_shared);
}

inline void __syncthreads(simt::Stop stop = simt::here()) { simt::wait(stop, 0, 0); }
inline int __syncthreads_count(int p, simt::Stop stop = simt::here()) { return simt::wait(stop, p != 0, 0); }
inline int __syncthreads_or(int p, simt::Stop stop = simt::here()) { return simt::wait(stop, p != 0, 0) > 0; }
inline int __syncthreads_and(int p, simt::Stop stop = simt::here()) { return simt::wait(stop, p == 0, 0) == 0; }
inline void __syncwarp(unsigned mask = ~0u, simt::Stop stop = simt::here()) {
    simt::with_lanes(mask, 0, simt::kVotes, stop);
}
inline unsigned __ballot_sync(unsigned mask, int p, simt::Stop stop = simt::here()) {
    return simt::with_lanes(mask, p != 0, simt::kVotes, stop);
}
inline int __any_sync(unsigned mask, int p, simt::Stop stop = simt::here()) {
    return simt::with_lanes(mask, p != 0, simt::kVotes, stop) != 0;
}
inline int __all_sync(unsigned mask, int p, simt::Stop stop = simt::here()) {
    return simt::with_lanes(mask, p == 0, simt::kVotes, stop) == 0;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Stop stop = simt::here()) {
    return simt::shuffle(mask, value, (simt::lane() & -width) | (source & (width - 1)), stop);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bit, int width = 32, simt::Stop stop = simt::here()) {
    const int lane = simt::lane(), source = lane ^ bit;
    return simt::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane, stop);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, simt::Stop stop = simt::here()) {
    const int lane = simt::lane(), source = lane + int(by);
    return simt::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane, stop);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, simt::Stop stop = simt::here()) {
    const int lane = simt::lane(), source = lane - int(by);
    return simt::shuffle(mask, value, source >= (lane & -width) ? source : lane, stop);
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline unsigned atomicInc(unsigned* at, unsigned most) {
    return simt::update(at, [&](unsigned old) { return old >= most ? 0 : old + 1; });
}
template <typename T>
T atomicAdd(T* at, simt::Given<T> value) {
    return simt::update(at, [&](T old) { return old + value; });
}
template <typename T>
T atomicMax(T* at, simt::Given<T> value) {
    return simt::update(at, [&](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* at, simt::Given<T> value) {
    return simt::update(at, [&](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicExch(T* at, simt::Given<T> value) {
    return simt::update(at, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* at, simt::Given<T> expected, simt::Given<T> value) {
    return simt::update(at, [&](T old) { return old == expected ? value : old; });
}
template <typename T>
T __ldg(const T* at) {
    return *at;
}

// ---- cuda_pipeline.h ----

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
    if ((bytes != 4 && bytes != 8 && bytes != 16) || (uintptr_t(to) | uintptr_t(from)) % bytes) {
        std::fprintf(stderr, "simt: a copy of %zu bytes, %p to %p; accepted: 4, 8 or 16, aligned\n", bytes, from, to);
        std::abort();
    }
    std::memset(to, 0xFF, bytes);
    simt::running->copies.push_back({to, from, bytes, simt::running->groups});
}
inline void __pipeline_commit() { ++simt::running->groups; }
inline void __pipeline_wait_prior(unsigned prior) {
    simt::Thread& self = *simt::running;
    auto copy = self.copies.begin();
    for (; copy != self.copies.end() && self.groups - copy->group > std::min(prior, 8u); ++copy) {
        std::memcpy(copy->to, copy->from, copy->bytes);
    }
    self.copies.erase(self.copies.begin(), copy);
}

// ---- arithmetic ----

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }  // NaN gives 0
inline int __float2int_rn(float x) {  // as on the device, where the conversion saturates
    return x != x ? 0 : x >= 0x1p31f ? INT_MAX : x < -0x1p31f ? INT_MIN : int(lrintf(x));
}
inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
template <typename A, typename B, typename C = std::common_type_t<A, B>>
std::enable_if_t<std::is_arithmetic_v<C>, C> min(A a, B b) {
    if constexpr (std::is_floating_point_v<C>) return std::fmin(C(a), C(b));  // a number rather than NaN
    return C(b) < C(a) ? C(b) : C(a);
}
template <typename A, typename B, typename C = std::common_type_t<A, B>>
std::enable_if_t<std::is_arithmetic_v<C>, C> max(A a, B b) {
    if constexpr (std::is_floating_point_v<C>) return std::fmax(C(a), C(b));
    return C(a) < C(b) ? C(b) : C(a);
}

// ---- the host's side ----

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
    const cudaError_t error = simt::check(*config, reinterpret_cast<const void*>(kernel));
    if (error) return simt::last_error = error;
    const auto launch = [&](Params... params) { simt::launch(*config, [&] { kernel(params...); }); };
    launch(std::forward<Args>(args)...);
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || size_t(bytes) > simt::kSharedMost) return simt::last_error = cudaErrorInvalidValue;
    simt::raised[reinterpret_cast<const void*>(kernel)] = bytes;
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads, size_t bytes) {
    *blocks = std::min<int>(2048 / threads, simt::kSharedMost / (bytes + 1024));  // as if registers were no limit
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return simt::last_error; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess                     ? "no error"
           : error == cudaErrorInvalidValue         ? "invalid argument"
           : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                    : "operation not supported";
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t = nullptr) {
    std::memset(to, byte, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
    *value = attribute == cudaDevAttrMultiProcessorCount      ? 4
             : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                              : int(simt::kSharedMost);
    return cudaSuccess;
}

#pragma GCC visibility pop
