// Work that the threads of one parallel region do step by step: to start a region takes longer than many a step.
#pragma once

#include <array>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <exception>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace infovae_fast {

// An item of a step is done by the thread that asks for it first, and a step ends when all its items are done. Nobody waits
// for a thread that has not come: one alone would do everything.
template <int most>
class Steps {
public:
    // What each thread has of them; all take the same steps.
    class Walk {
    public:
        explicit Walk(Steps& steps) : steps_(steps) {}

        template <typename F>
        void each(int64_t count, const F& f) {
            assert(at_ < most);
            Step& step = steps_.steps_[at_++];
            for (int64_t k; (k = step.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
                steps_.attempt([&] { f(k); });
                step.done.fetch_add(1, std::memory_order_release);
            }
            int spins = 0;
            while (step.done.load(std::memory_order_acquire) < count) {
                if (spins < kSpins) {
                    ++spins, pause();
                } else {
                    std::this_thread::yield();
                }
            }
        }

        template <typename F>
        void once(const F& f) {
            each(1, [&](int64_t) { f(); });
        }

    private:
        Steps& steps_;
        int at_ = 0;
    };

    // The first exception of an item; items of later steps were not begun then.
    void rethrow() const {
        if (error_ != nullptr) std::rethrow_exception(error_);
    }

private:
    static constexpr int kSpins = 2000;
    struct alignas(64) Step {
        std::atomic<int64_t> next{0}, done{0};
    };

    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    template <typename F>
    void attempt(const F& f) {
        if (failed_.load(std::memory_order_relaxed)) return;
        try {
            f();
        } catch (...) {
            if (!failed_.exchange(true)) error_ = std::current_exception();
        }
    }

    std::array<Step, most> steps_;
    std::atomic<bool> failed_{false};
    std::exception_ptr error_;
};

}  // namespace infovae_fast
