// The operators of bindings.cpp that draw images or compute whole ones again: vertical_row, pixel_params, draw_bits,
// draw_images, resident.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#ifdef WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "incremental.h"
#include "resident.h"

namespace infovae_fast {
namespace {

using at::Tensor;

template <typename T>
T* data(const Tensor& t, std::initializer_list<int64_t> shape, const Tensor& like) {
    TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), "got ", t.scalar_type(), " beside ", like.scalar_type());
    TORCH_CHECK_VALUE(t.is_contiguous() && t.sizes() == at::IntArrayRef(shape), "got shape ", t.sizes(),
                      "; accepted: contiguous ", at::IntArrayRef(shape));
    return t.data_ptr<T>();
}

template <typename T>
PixelRow<T> pixel_row(at::TensorList bases, at::TensorList state, at::TensorList horizontal, at::TensorList step,
                      at::TensorList step_bias, at::TensorList head, const Tensor& memory, at::IntArrayRef reaches,
                      int64_t image_channels) {
    const int64_t layers = int64_t(bases.size());
    TORCH_CHECK_VALUE(layers > 0 && state.size() == bases.size() && horizontal.size() == bases.size() &&
                          reaches.size() == bases.size() && step.size() + 1 == bases.size() &&
                          step_bias.size() == step.size() && head.size() == 6 && bases[0].dim() == 3,
                      "pixel_row: the lists do not fit ", layers, " layers");
    const int64_t n = bases[0].size(0), width = bases[0].size(1), maps = bases[0].size(2) / 2;
    const int64_t groups = head[0].size(0), params = head[5].numel();
    TORCH_CHECK_VALUE(groups > 0 && maps > 0 && image_channels > 0 && maps % groups == 0 && params % groups == 0,
                      "pixel_row: got ", maps, " maps, ", params, " params and ", image_channels, " channels in ", groups,
                      " groups");
    const int64_t own = maps / groups;
    PixelRow<T> row{n, width, maps, groups, params, {}};
    for (int64_t l = 0; l < layers; ++l) {
        const int64_t channels = l == 0 ? image_channels : maps, k = horizontal[l].size(1);
        TORCH_CHECK_VALUE(0 <= reaches[l] && reaches[l] <= state[l].size(1) && k % channels == 0 &&
                              (reaches[l] + width) * channels <= state[l].size(1) && k / channels <= reaches[l] + 1,
                          "pixel_row: layer ", l, " has state ", state[l].sizes(), " and weights ", horizontal[l].sizes());
        const bool last = l == layers - 1;
        row.layers.push_back({data<T>(bases[l], {n, width, 2 * maps}, memory),
                              data<T>(state[l], {n, state[l].size(1)}, memory), state[l].size(1), channels, reaches[l],
                              k / channels, data<T>(horizontal[l], {groups, k, 2 * own}, memory),
                              last ? nullptr : data<T>(step[l], {groups, maps, own}, memory),
                              last ? nullptr : data<T>(step_bias[l], {maps}, memory)});
    }
    row.skip = data<T>(head[0], {groups, layers * maps, own}, memory), row.skip_bias = data<T>(head[1], {maps}, memory);
    row.hidden = data<T>(head[2], {groups, maps, own}, memory), row.hidden_bias = data<T>(head[3], {maps}, memory);
    row.output = data<T>(head[4], {groups, maps, params / groups}, memory);
    row.output_bias = data<T>(head[5], {params}, memory);
    row.memory = data<T>(memory, {n, (layers + 2) * maps}, memory);
    return row;
}

// weights = (vertical, its bias, link, its bias) of each layer, conditions = (above, beside) [1 or n, 1 or H, 1 or W, 2C].
void vertical_row_cpu(at::TensorList weights, at::TensorList conditions, at::TensorList rings, at::TensorList bases,
                      at::IntArrayRef reaches, int64_t i) {
    const size_t layers = bases.size();
    TORCH_CHECK_VALUE(layers > 0 && weights.size() == 4 * layers && conditions.size() == 2 * layers &&
                          rings.size() == layers && reaches.size() == layers && bases[0].dim() == 3 &&
                          bases[0].size(2) % 2 == 0 && i >= 0,
                      "vertical_row: the lists do not fit row ", i, " of ", layers, " layers");
    const Tensor& like = bases[0];
    const int64_t n = like.size(0), width = like.size(1), wide = like.size(2);
    AT_DISPATCH_FLOATING_TYPES(like.scalar_type(), "infovae_fast::vertical_row", [&] {
        using T = scalar_t;
        VerticalRow<T> row{n, width, wide / 2, i, {}};
        for (size_t l = 0; l < layers; ++l) {
            TORCH_CHECK_VALUE(reaches[l] >= 0 && rings[l].dim() == 4 && (l == 0 || rings[l].size(3) == wide / 2),
                              "vertical_row: layer ", l, " has reach ", reaches[l], " and ring ", rings[l].sizes());
            const int64_t r = reaches[l], channels = rings[l].size(3);
            const int64_t taps = (l == 0 ? r : r + 1) * (2 * r + 1);
            typename VerticalRow<T>::Layer layer{data<T>(rings[l], {n, r + 1, width + 2 * r, channels}, like),
                                                 data<T>(bases[l], {n, width, wide}, like), channels, r, l == 0,
                                                 data<T>(weights[4 * l], {taps * channels, wide}, like),
                                                 data<T>(weights[4 * l + 1], {wide}, like),
                                                 data<T>(weights[4 * l + 2], {wide, wide}, like),
                                                 data<T>(weights[4 * l + 3], {wide}, like)};
            const auto at_row = [&](const Tensor& c, const T*& start, int64_t& image, int64_t& column) {
                TORCH_CHECK_VALUE(c.dim() == 4 && (c.size(0) == 1 || c.size(0) == n) && c.size(1) > 0 &&
                                      (c.size(2) == 1 || c.size(2) == width) && c.size(3) == wide,
                                  "conditions: got shape ", c.sizes());
                start = data<T>(c, {c.size(0), c.size(1), c.size(2), wide}, like) +
                        std::min(i, c.size(1) - 1) * c.size(2) * wide;
                image = c.size(0) == 1 ? 0 : c.size(1) * c.size(2) * wide;
                column = c.size(2) == 1 ? 0 : wide;
            };
            at_row(conditions[2 * l], layer.above, layer.above_image, layer.above_column);
            at_row(conditions[2 * l + 1], layer.beside, layer.beside_image, layer.beside_column);
            row.layers.push_back(layer);
        }
        vertical_row<T>(row);
    });
}

Tensor pixel_params_cpu(at::TensorList bases, at::TensorList state, at::TensorList horizontal, at::TensorList step,
                        at::TensorList step_bias, at::TensorList head, const Tensor& memory, at::IntArrayRef reaches,
                        int64_t image_channels, int64_t column, int64_t group) {
    Tensor out;
    AT_DISPATCH_FLOATING_TYPES(memory.scalar_type(), "infovae_fast::pixel_params", [&] {
        const auto row = pixel_row<scalar_t>(bases, state, horizontal, step, step_bias, head, memory, reaches, image_channels);
        TORCH_CHECK_VALUE(0 <= column && column < row.width && 0 <= group && group < row.groups, "no column ", column,
                          " of group ", group);
        out = at::empty({row.n, row.params / row.groups}, memory.options());
        pixel_params<scalar_t>(row, column, group, out.mutable_data_ptr<scalar_t>());
    });
    return out;
}

void draw_bits_cpu(at::TensorList bases, at::TensorList state, at::TensorList horizontal, at::TensorList step,
                   at::TensorList step_bias, at::TensorList head, const Tensor& memory, at::IntArrayRef reaches,
                   int64_t image_channels, const Tensor& x, const Tensor& uniforms, const Tensor& known,
                   const Tensor& mask, double temperature) {
    AT_DISPATCH_FLOATING_TYPES(memory.scalar_type(), "infovae_fast::draw_bits", [&] {
        using T = scalar_t;
        const auto row = pixel_row<T>(bases, state, horizontal, step, step_bias, head, memory, reaches, image_channels);
        const auto shape = {row.n, image_channels, row.width};
        TORCH_CHECK_VALUE(row.params == image_channels && image_channels % row.groups == 0,
                          "draw_bits: got ", row.params, " params for ", image_channels, " channels; accepted: one each");
        TORCH_CHECK_VALUE(uniforms.scalar_type() == at::kFloat && mask.scalar_type() == at::kBool &&
                              uniforms.is_contiguous() && mask.is_contiguous() && uniforms.sizes() == at::IntArrayRef(shape) &&
                              mask.sizes() == at::IntArrayRef(shape),
                          "draw_bits: accepted: float32 uniforms and bool mask, contiguous ", at::IntArrayRef(shape));
        draw_bits<T>(row, {uniforms.const_data_ptr<float>(), data<T>(known, shape, memory), mask.const_data_ptr<bool>(),
                           data<T>(x, shape, memory), image_channels, T(temperature)});
    });
}

// x like known, and params [n, P, H, W] if they are wanted.
std::tuple<Tensor, Tensor> draw_images_empty(const Tensor& /*table*/, at::TensorList /*conditions*/, at::IntArrayRef sizes,
                                             const std::optional<Tensor>& /*uniforms*/, const Tensor& known,
                                             const std::optional<Tensor>& /*mask*/, double /*temperature*/, bool params) {
    TORCH_CHECK_VALUE(sizes.size() == 7 && known.dim() == 4, "draw_images: got ", sizes.size(), " sizes and ", known.dim(),
                      " dimensions; accepted: 7 sizes, known [n, C, H, W]");
    const auto s = known.sym_sizes();
    return {at::empty_symint(s, known.options()),
            params ? at::empty_symint({s[0], sizes[2], s[2], s[3]}, known.options()) : at::empty({0}, known.options())};
}

#ifdef WITH_CUDA
std::tuple<Tensor, Tensor> draw_images_cuda(const Tensor& table, at::TensorList conditions, at::IntArrayRef sizes,
                                            const std::optional<Tensor>& uniforms, const Tensor& known,
                                            const std::optional<Tensor>& mask, double temperature, bool params) {
    const auto out = draw_images_empty(table, conditions, sizes, uniforms, known, mask, temperature, params);
    const int64_t n = known.size(0), channels = known.size(1), height = known.size(2), width = known.size(3);
    const int64_t maps = sizes[0], groups = sizes[1], count = sizes[2], layers = int64_t(conditions.size()) / 2;
    TORCH_CHECK_VALUE(channels > 0 && height > 0 && width > 0 && maps > 0 && groups > 0 && count > 0 &&
                          maps % groups == 0 && count % groups == 0 && channels % groups == 0 && sizes[3] > 0 &&
                          sizes[4] >= 0 && sizes[5] >= 0 && sizes[6] >= 0 && layers > 0 && conditions.size() % 2 == 0,
                      "draw_images: got known ", known.sizes(), ", sizes ", sizes, " and ", conditions.size(), " conditions");
    const int64_t levels = sizes[5], mixtures = sizes[6], draws = channels + (mixtures > 0 ? 1 : 0);
    const bool mixes = mixtures > 0 && groups == 1 && levels > 1 && (channels == 1 || channels == 3);
    const int64_t wanted = mixtures > 0 ? (channels == 1 ? 3 : 10) * mixtures : std::max<int64_t>(levels, 1) * channels;
    TORCH_CHECK_VALUE(uniforms.has_value() == mask.has_value(), "draw_images: got uniforms or a mask; accepted: both, or neither");
    TORCH_CHECK_VALUE(!uniforms.has_value() || (count == wanted && levels != 1 && (mixtures == 0 || mixes)), "draw_images: got ",
                      count, " params of ", groups, " groups for ", channels, " channels, ", levels, " levels and ", mixtures,
                      " mixtures");
    const auto shape = conditions[0].sizes();
    const int64_t size = int64_t(known.element_size()), wide = (2 * maps * size + 15) / 16 * 16 / size;
    TORCH_CHECK_VALUE(shape.size() == 4 && (shape[0] == 1 || shape[0] == n) && (shape[1] == 1 || shape[1] == height) &&
                          (shape[2] == 1 || shape[2] == width) && shape[3] == wide,
                      "conditions: got shape ", shape, "; accepted: [1 or n, 1 or H, 1 or W, ", wide, "]");
    const auto here = [&](const Tensor& t) {
        TORCH_CHECK_VALUE(t.device() == known.device(), "got ", t.device(), " beside ", known.device());
        return t.contiguous();
    };
    const auto aligned = [&](const Tensor& t) {
        TORCH_CHECK_VALUE(t.device() == known.device(), "got ", t.device(), " beside ", known.device());
        TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, "draw_images: got a view that starts ",
                          "between vectors; accepted: aligned to 16 bytes");
        return t;
    };
    const Tensor weights = aligned(table.contiguous()), given = here(known);
    const Tensor u = uniforms.has_value() ? here(*uniforms) : Tensor(), m = mask.has_value() ? here(*mask) : Tensor();
    TORCH_CHECK_VALUE(!u.defined() || (u.scalar_type() == at::kFloat && m.scalar_type() == at::kBool &&
                                       u.sizes() == at::IntArrayRef({n, draws, height, width}) && m.sizes() == known.sizes()),
                      "draw_images: accepted: float32 uniforms [n, ", draws, ", H, W] and bool mask of shape ", known.sizes());
    const c10::cuda::CUDAGuard guard(known.device());
    int processors = 1, shared = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, known.get_device()));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, known.get_device()));
    AT_DISPATCH_FLOATING_TYPES(known.scalar_type(), "infovae_fast::draw_images", [&] {
        using T = scalar_t;
        PixelImages<T> images{n, channels, height, width, maps, groups, count, layers, sizes[3], sizes[4],
                              data<T>(weights, {weights.numel()}, known)};
        for (size_t k = 0; k < conditions.size(); ++k) {
            const Tensor& c = aligned(conditions[k]);
            (k % 2 == 0 ? images.above : images.beside)
                .push_back(data<T>(c, {shape[0], shape[1], shape[2], shape[3]}, known));
        }
        images.condition_image = shape[0] == 1 ? 0 : shape[1] * shape[2] * shape[3];
        images.condition_row = shape[1] == 1 ? 0 : shape[2] * shape[3];
        images.condition_column = shape[2] == 1 ? 0 : shape[3];
        images.levels = levels, images.mixtures = mixtures;
        images.uniforms = u.defined() ? u.const_data_ptr<float>() : nullptr;
        images.known = given.const_data_ptr<T>();
        images.mask = m.defined() ? m.const_data_ptr<bool>() : nullptr;
        images.temperature = T(temperature);
        images.x = std::get<0>(out).template mutable_data_ptr<T>();
        images.out = params ? std::get<1>(out).template mutable_data_ptr<T>() : nullptr;
        const ImagesNeed need = images_cuda_need(images, processors, size_t(shared));
        TORCH_CHECK_VALUE(need.error != nullptr || need.table == weights.numel(), "table: got ", weights.numel(),
                          " numbers; accepted: ", need.table);
        const char* error = need.error;
        if (error == nullptr) {
            const Tensor workspace = at::empty({int64_t(need.workspace)}, known.options().dtype(at::kByte));
            error = images_cuda(images, workspace.mutable_data_ptr(), processors, size_t(shared),
                                c10::cuda::getCurrentCUDAStream().stream());
        }
        TORCH_CHECK(error == nullptr, "draw_images on ", known.device(), ": ", error);
    });
    return out;
}
#endif

// params [codes, P, H, W], channels last; sizes = (P, layers, maps, first reach, reach).
Tensor resident_empty(const Tensor& /*table*/, const Tensor& /*biases*/, const std::optional<Tensor>& /*condition*/,
                      const Tensor& y, c10::SymInt codes, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(sizes.size() == 5 && y.dim() == 4, "resident: got ", sizes.size(), " sizes and ", y.dim(),
                      " dimensions; accepted: 5 sizes, y [N, C, H, W]");
    return at::empty_symint({codes, y.sym_size(2), y.sym_size(3), sizes[0]}, y.options()).permute({0, 3, 1, 2});
}

#ifdef WITH_CUDA
Tensor resident_cuda_op(const Tensor& table, const Tensor& biases, const std::optional<Tensor>& condition, const Tensor& y,
                        c10::SymInt codes, at::IntArrayRef sizes) {
    Tensor out = resident_empty(table, biases, condition, y, codes, sizes);
    const int64_t n = out.size(0), layers = sizes[1], maps = sizes[2], first_reach = sizes[3], reach = sizes[4];
    TORCH_CHECK_VALUE(sizes[0] > 0 && layers > 0 && maps > 0 && first_reach > 0 && reach >= 0 && y.size(1) > 0 &&
                          y.size(2) > 0 && y.size(3) > 0 && (n == 0 || y.size(0) > 0),
                      "resident: got y ", y.sizes(), " for ", n, " codes and sizes ", sizes);
    const auto given = [&](const Tensor& t, at::ScalarType type, at::IntArrayRef shape, const char* name) -> const void* {
        TORCH_CHECK_VALUE(t.device() == y.device() && t.scalar_type() == type && t.sizes() == shape && t.is_contiguous(), name,
                          ": got ", t.scalar_type(), " ", t.sizes(), " on ", t.device(), "; accepted: contiguous ", type, " ",
                          shape, " on ", y.device());
        return t.const_data_ptr();
    };
    const at::ScalarType type = y.scalar_type();
    TORCH_CHECK_VALUE(type == at::kHalf || type == at::kBFloat16, "resident: got ", type, "; accepted: 16 bit numbers");
    Resident network{n, y.size(0), y.size(1), y.size(2), y.size(3), sizes[0], layers, maps, first_reach, reach};
    const ResidentNeed need = resident_cuda_need(network);
    TORCH_CHECK_VALUE(need.error == nullptr, "resident: got sizes ", sizes, " and y ", y.sizes(), " for ", n, " codes; accepted: ",
                      need.error);
    network.y = given(y, type, y.sizes(), "y");
    network.table = given(table, type, {need.table}, "table");
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(network.table) % 16 == 0, "table: got a view that starts between vectors; ",
                      "accepted: aligned to 16 bytes");
    network.biases = static_cast<const float*>(given(biases, at::kFloat, {need.biases}, "biases"));
    if (condition.has_value()) network.condition = given(*condition, type, {n, layers * 4 * maps}, "condition");
    network.out = out.mutable_data_ptr();
    if (n == 0) return out;
    const c10::cuda::CUDAGuard guard(y.device());
    const char* error = resident_cuda(type == at::kBFloat16, network, c10::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(error == nullptr, "resident on ", y.device(), ": ", error);
    return out;
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(infovae_fast, CPU, m) {
    m.impl("vertical_row", vertical_row_cpu);
    m.impl("pixel_params", pixel_params_cpu);
    m.impl("draw_bits", draw_bits_cpu);
}
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(infovae_fast, CUDA, m) {
    m.impl("draw_images", draw_images_cuda);
    m.impl("resident", resident_cuda_op);
}
#endif
TORCH_LIBRARY_IMPL(infovae_fast, Meta, m) {
    m.impl("draw_images", draw_images_empty);
    m.impl("resident", resident_empty);
}

}  // namespace infovae_fast
