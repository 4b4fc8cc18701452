// csrc/cuda/resident.cu by plain pointers, for tests/simt/resident.py.
#include "resident.h"

extern "C" const char* resident(bool bfloat16, const int64_t* s, const void* y, const void* table, int64_t elements,
                                const void* condition, const float* biases, int64_t biases_elements, void* out,
                                int64_t* used) {  // shared memory, tiles, readers
    const infovae_fast::Resident network{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7],
                                         s[8], s[9], y,    table, condition, biases, out};
    const infovae_fast::ResidentNeed need = infovae_fast::resident_cuda_need(network);
    used[0] = int64_t(need.shared), used[1] = need.tiles, used[2] = need.readers;
    if (need.error == nullptr && (need.table != elements || need.biases != biases_elements)) return "the table has another size";
    return infovae_fast::resident_cuda(bfloat16, network, nullptr);
}
