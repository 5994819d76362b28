#include "kernels/winograd.h"

#include <optional>

#include "ops/winograd.h"

namespace convviz {
namespace {

Tensor winograd_input(Tensor x, std::vector<int64_t> padding) {
  const char* op = "winograd_input";
  const auto [height, width] = convolved_size(x, padding, op);
  const std::vector<int64_t> size = sizes_of(x);
  const int64_t rows = ceil_div(height, 2), cols = ceil_div(width, 2), tiles = size[0] * rows * cols;
  Tensor out = empty_strided({tiles, 16, size[1]}, {16 * size[1], size[1], 1}, x.scalar_type(), x);
  if (out.numel() == 0) return out;
  with_dtype(x.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const WinogradInputArgs<T> args{read<T>(x), write<T>(out), tiles,      size[1],       size[2],
                                    size[3],    padding[0],    padding[1], Divider(cols), Divider(rows)};
    if (x.is_cuda()) {
      on_cuda(x, op, [&](void* stream) { return CONVVIZ_CUDA_CALL(winograd_input_cuda(args, stream)); });
    } else {
      parallel(tiles * ceil_div(size[1], kWinogradLanes<T>), 32 * kWinogradLanes<T>,
               [&](int64_t begin, int64_t end) { winograd_input_cpu(args, begin, end); });
    }
  });
  return out;
}

Tensor winograd_output(Tensor products, std::optional<Tensor> bias, std::vector<int64_t> size, double low,
                       double high) {
  const char* op = "winograd_output";
  STD_TORCH_CHECK(products.dim() == 3 && products.is_contiguous() && products.size(1) == 16, op,
                  ": products must be contiguous, [tiles, 16, C].");
  STD_TORCH_CHECK(size.size() == 3 && size[0] >= 0 && size[1] >= 0 && size[2] >= 0, op,
                  ": size must be three integers: images, height, width.");
  const int64_t channels = products.size(2), rows = ceil_div(size[1], 2), cols = ceil_div(size[2], 2);
  STD_TORCH_CHECK(products.size(0) == size[0] * rows * cols, op, ": products have ", products.size(0),
                  " tiles, not those of the size.");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels && bias->is_contiguous(), op,
                    ": bias must be contiguous, one a channel.");
    STD_TORCH_CHECK(bias->scalar_type() == products.scalar_type(), op, ": bias has another dtype.");
    check_same_device(products, *bias, op);
  }
  const std::vector<int64_t> shape{size[0], channels, size[1], size[2]};
  Tensor out = empty_strided(shape, image_strides(shape, ImageLayout::kChannelsLast), products.scalar_type(),
                             products);
  if (out.numel() == 0) return out;
  with_dtype(products.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const WinogradOutputArgs<T> args{read<T>(products),
                                     bias.has_value() ? read<T>(*bias) : nullptr,
                                     write<T>(out),
                                     products.size(0),
                                     channels,
                                     size[1],
                                     size[2],
                                     Divider(cols),
                                     Divider(rows),
                                     static_cast<acc_t<T>>(low),
                                     static_cast<acc_t<T>>(high)};
    if (out.is_cuda()) {
      on_cuda(out, op, [&](void* stream) { return CONVVIZ_CUDA_CALL(winograd_output_cuda(args, stream)); });
    } else {
      parallel(args.tiles * ceil_div(channels, kWinogradLanes<T>), 20 * kWinogradLanes<T>,
               [&](int64_t begin, int64_t end) { winograd_output_cpu(args, begin, end); });
    }
  });
  return out;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("winograd_input", TORCH_BOX(&winograd_input));
  m.impl("winograd_output", TORCH_BOX(&winograd_output));
}

}  // namespace

CONVVIZ_IMPLEMENT(implement)

}  // namespace convviz
