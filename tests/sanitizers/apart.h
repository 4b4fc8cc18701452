// Included before a file of csrc/cpu for AddressSanitizer: the pieces of a workspace lie apart, so that a step past
// the end of one is seen, and start as NaN, so that a result shows what was read before it was written.
#pragma once

#define Carver TightCarver
#define Workspace KeptWorkspace
#include "cpu/vector.h"
#undef Carver
#undef Workspace

#include <sanitizer/asan_interface.h>

namespace infovae_fast {

struct Workspace : KeptWorkspace {
    char* reserve(size_t bytes) {
        char* const memory = KeptWorkspace::reserve(bytes);
        ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
        std::memset(memory, 0xff, bytes);
        return memory;
    }
};

struct Carver : TightCarver {
    static constexpr size_t kGap = 256;
    template <typename T>
    T* take(int64_t count) {
        T* const piece = TightCarver::take<T>(count);
        used += kGap;
        if (start != nullptr) {
            char* const end = reinterpret_cast<char*>(piece + count);
            ASAN_POISON_MEMORY_REGION(end, start + used - end);
        }
        return piece;
    }
};

}  // namespace infovae_fast
