// What the vector code of the operators shares: the choice of the instruction set, memory, constants of elementary
// functions. each_unit.inc includes the code of a .cpp file once for each instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAVE_AVX 1
#endif

namespace infovae_fast {

enum class Unit { baseline, avx2, avx512, zen4 };  // zen4: AVX-512 too; see `products_of_pairs` in pairwise.inc

#ifdef HAVE_AVX
inline bool is_zen4() {  // of those that have AVX-512
    unsigned a = 0, b, c, d;
    return __builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d) && (a >> 8 & 15) + (a >> 20 & 255) == 0x19;
}
#endif

inline Unit best_unit() {
    Unit best = Unit::baseline;
#ifdef HAVE_AVX
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Unit::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw")) {
        best = is_zen4() ? Unit::zen4 : Unit::avx512;
    }
    if (const char* most = std::getenv("INFOVAE_FAST_VECTOR_UNIT")) {  // to test the others on a machine that has more
        if (!std::strcmp(most, "baseline")) best = Unit::baseline;
        if (!std::strcmp(most, "avx2")) best = std::min(best, Unit::avx2);
        if (!std::strcmp(most, "avx512")) best = std::min(best, Unit::avx512);
        if (!std::strcmp(most, "zen4") && best == Unit::avx512) best = Unit::zen4;  // as right, if not as fast
    }
#endif
    return best;
}
inline const Unit kUnit = best_unit();

inline const char* vector_unit() {
    constexpr const char* names[] = {"baseline", "avx2", "avx512", "zen4"};
    return names[int(kUnit)];
}

// The function of that name for the best unit.
#ifdef HAVE_AVX
#define BEST(...) \
    (kUnit >= Unit::avx512 ? &avx512::__VA_ARGS__ : kUnit == Unit::avx2 ? &avx2::__VA_ARGS__ : &baseline::__VA_ARGS__)
#else
#define BEST(...) (&baseline::__VA_ARGS__)
#endif

template <typename T>
int64_t lanes() {
    return (kUnit >= Unit::avx512 ? 64 : kUnit == Unit::avx2 ? 32 : 16) / int64_t(sizeof(T));
}

template <typename T>
using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <int n>
using Count = std::integral_constant<int, n>;

// 2^r = sum c_i r^i for |r| <= 1/2: minimax polynomials, relative error 7.5e-8 (float) and 3e-18 (double).
template <typename T>
struct Exp2;
template <>
struct Exp2<float> {
    static constexpr float lowest = -126, magic = 12582912;  // 1.5 2^23
    static constexpr int mantissa = 23, degree = 5;
    static constexpr float c[] = {1.00000007165471414f,   0.693146967065035214f,  0.240221197237107197f,
                                  0.0555071327185564420f, 0.00967554134312132739f, 0.00132764726319508761f};
};
template <>
struct Exp2<double> {
    static constexpr double lowest = -1022, magic = 6755399441055744;  // 1.5 2^52
    static constexpr int mantissa = 52, degree = 11;
    static constexpr double c[] = {0.9999999999999999971,     0.69314718055994533046,     0.24022650695910156204,
                                   0.055504108664819921605,   0.0096181291075883352443,   0.0013333558146789921722,
                                   0.00015403530462514432062, 0.000015252733489988525649, 1.321543308967639918e-6,
                                   1.0178198021671930844e-7,  7.0741056135081427963e-9,   4.4352827069572771511e-10};
};

// Q(q) of log2 m = s Q(s^2), s = (m - 1) / (m + 1), m in [sqrt(1/2), sqrt(2)): relative error 7e-10 and 5e-23.
template <typename T>
struct Log2;
template <>
struct Log2<float> {
    static constexpr int32_t sqrt_half = 0x3f3504f3;
    static constexpr int degree = 3;
    static constexpr float c[] = {2.88539007978892671f, 0.961798847641742934f, 0.576714383962467901f,
                                  0.431735879207038553f};
};
template <>
struct Log2<double> {
    static constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcd;
    static constexpr int degree = 9;
    static constexpr double c[] = {2.8853900817779268147,  0.96179669392597560591, 0.57707801635558424025,
                                   0.41219858311161940369, 0.3205988978681115414,  0.26230820279711990419,
                                   0.22195204304832298873, 0.19240865064963936215, 0.16832335414003769723,
                                   0.17375564814128546288};
};

// e^r - 1 = r sum c_i r^i for |r| <= ln(2) / 2: relative error 1.1e-8 (float) and 2.4e-19 (double).
template <typename T>
struct Expm1;
template <>
struct Expm1<float> {
    static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float low = -87.3f, high = 88;  // 2^k is a normal number
    static constexpr float most = 80, most_a = 20, most_b = 60;  // e^most and e^(most_a + most_b) do not overflow
    static constexpr int degree = 5;
    static constexpr float c[] = {1.0f,
                                  0.49999998124795182f,
                                  0.16666506219567093f,
                                  0.041667136210852982f,
                                  0.0083690685627894121f,
                                  0.0013888872635554964f};
};
template <>
struct Expm1<double> {
    static constexpr double log2e = 1.4426950408889634074, ln2_high = 0.693147180369123816490,
                            ln2_low = 1.90821492927058770002e-10;
    static constexpr double low = -708.3, high = 709;
    static constexpr double most = 700, most_a = 44, most_b = 600;
    static constexpr int degree = 11;
    static constexpr double c[] = {1.0,
                                   0.5,
                                   0.16666666666666680657,
                                   0.041666666666666492456,
                                   0.0083333333333197000573,
                                   0.0013888888888965132584,
                                   0.00019841269889815124528,
                                   0.000024801587172496682387,
                                   2.7557241139432478189e-6,
                                   2.7557399888465052079e-7,
                                   2.5109964026544849121e-8,
                                   2.087675138676410372e-9};
};

inline int64_t clamp(int64_t i, int64_t low, int64_t high) { return i < low ? low : i > high ? high : i; }
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Memory for one call, kept for the next one: touching new pages takes longer than most calls.
class Workspace {
public:
    static constexpr size_t kKept = size_t(32) << 20;
    Workspace() {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::swap(memory_, kept_);
        std::swap(size_, kept_size_);
    }
    ~Workspace() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (size_ <= kKept && size_ > kept_size_) {
            std::swap(memory_, kept_);
            std::swap(size_, kept_size_);
        }
        std::free(memory_);
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    char* reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = 0;
            memory_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
            if (memory_ == nullptr) throw std::bad_alloc();
            size_ = bytes;
        }
        return memory_;
    }

private:
    char* memory_ = nullptr;
    size_t size_ = 0;
    static inline std::mutex mutex_;
    static inline char* kept_ = nullptr;
    static inline size_t kept_size_ = 0;
};

// Hands out aligned pieces of memory; with a null start it only counts what is needed.
struct Carver {
    char* start;
    size_t used = 0;
    template <typename T>
    T* take(int64_t count) {
        T* piece = start == nullptr ? nullptr : reinterpret_cast<T*>(start + used);
        used += (size_t(count) * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
};

}  // namespace infovae_fast
