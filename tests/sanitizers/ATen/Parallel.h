// What csrc/cpu uses of torch's header of this name, with std::thread, whose start and end ThreadSanitizer knows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline int threads = 1;
inline thread_local int number = 0;  // of this thread in the loop that runs
inline int get_num_threads() { return threads; }
inline int get_thread_num() { return number; }

// f(begin, end) over pieces of at least `grain`, one for each thread; the first one runs in the thread that calls.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
    if (begin >= end) return;
    const int64_t most = (end - begin + grain - 1) / grain;
    const int64_t pieces = std::min<int64_t>(get_num_threads(), most), size = (end - begin + pieces - 1) / pieces;
    std::vector<std::thread> others;
    for (int64_t start = begin + size; start < end; start += size) {
        const int here = int((start - begin) / size);
        others.emplace_back([&f, here, start, stop = std::min(start + size, end)] { number = here, f(start, stop); });
    }
    f(begin, std::min(begin + size, end));
    for (std::thread& other : others) other.join();
}

}  // namespace at
