// csrc/cuda/incremental.cu by plain pointers, for tests/simt/incremental.py.
#include "incremental.h"

namespace {

template <typename T>
const char* run(const int64_t* s, const T* table, int64_t elements, const T* const* conditions, const int64_t* strides,
                const float* uniforms, const T* known, const bool* mask, double temperature, T* x, T* out,
                int processors, int64_t shared, int64_t* used) {
    infovae_fast::PixelImages<T> images{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], table, {}, {},
                                        strides[0], strides[1], strides[2], s[10], s[11], uniforms, known, mask,
                                        T(temperature), x, out};
    for (int64_t layer = 0; layer < images.layers; ++layer) {
        images.above.push_back(conditions[2 * layer]);
        images.beside.push_back(conditions[2 * layer + 1]);
    }
    const infovae_fast::ImagesNeed need = infovae_fast::images_cuda_need(images, processors, size_t(shared));
    *used = int64_t(need.shared);
    if (need.error != nullptr) return need.error;
    if (need.table != elements) return "the table has another size";
    std::vector<unsigned char> workspace(need.workspace, 0xff);
    return infovae_fast::images_cuda(images, workspace.data(), processors, size_t(shared), nullptr);
}

}  // namespace

#define ENTRY(name, T)                                                                                               \
    extern "C" const char* name(const int64_t* sizes, const T* table, int64_t elements, const T* const* conditions,  \
                                const int64_t* strides, const float* uniforms, const T* known, const bool* mask,     \
                                double temperature, T* x, T* out, int processors, int64_t shared, int64_t* used) {   \
        return run<T>(sizes, table, elements, conditions, strides, uniforms, known, mask, temperature, x, out,       \
                      processors, shared, used);                                                                     \
    }
ENTRY(images_float, float)
ENTRY(images_double, double)
