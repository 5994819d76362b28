#include "kernels/winograd_conv.h"

#include <optional>

#include "ops/winograd.h"

namespace convviz {
namespace {

// The whole convolution, on the CPU in float32.
Tensor winograd_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t results,
                       std::vector<int64_t> padding, double low, double high) {
  const char* op = "winograd_conv2d";
  const auto [height, width] = convolved_size(x, padding, op);
  const std::vector<int64_t> size = sizes_of(x);
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float &&
                      weight.scalar_type() == torch::headeronly::ScalarType::Float,
                  op, ": x and weight must be float32.");
  STD_TORCH_CHECK(results >= 0 && weight.dim() == 4 && weight.is_contiguous() &&
                      weight.size(0) == ceil_div(results, kWinogradBlock) && weight.size(1) == 16 &&
                      weight.size(2) == size[1] && weight.size(3) == kWinogradBlock,
                  op, ": weight must be contiguous, [ceil(results / 32), 16, C, 32].");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == results && bias->is_contiguous() &&
                        bias->scalar_type() == x.scalar_type(),
                    op, ": bias must be contiguous, one a result, float32.");
  }
  const std::vector<int64_t> shape{size[0], results, height, width};
  Tensor out = empty_strided(shape, image_strides(shape, ImageLayout::kChannelsLast), x.scalar_type(), x);
  if (out.numel() == 0) return out;
  const WinogradConvArgs args{read<float>(x),
                              read<float>(weight),
                              bias.has_value() ? read<float>(*bias) : nullptr,
                              write<float>(out),
                              size[1],
                              results,
                              size[2],
                              size[3],
                              height,
                              width,
                              padding[0],
                              padding[1],
                              static_cast<float>(low),
                              static_cast<float>(high)};
  parallel(size[0] * ceil_div(height, 2) * ceil_div(width, 2), 16 * size[1] * results,
           [&](int64_t begin, int64_t end) { winograd_conv_cpu(args, begin, end); });
  return out;
}

Tensor winograd_packed(Tensor weight, bool flipped) {
  const char* op = "winograd_packed";
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                      weight.scalar_type() == torch::headeronly::ScalarType::Float,
                  op, ": weight must be [Co, Ci, 3, 3], float32.");
  const int result = flipped ? 1 : 0;
  const int64_t results = weight.size(result), channels = weight.size(1 - result);
  const int64_t blocks = ceil_div(results, kWinogradBlock), step = channels * kWinogradBlock;
  Tensor out = empty_strided({blocks, 16, channels, kWinogradBlock}, {16 * step, step, kWinogradBlock, 1},
                             weight.scalar_type(), weight);
  if (out.numel() == 0) return out;
  const WinogradPackArgs args{
      read<float>(weight),       write<float>(out), channels,         results, weight.stride(result),
      weight.stride(1 - result), weight.stride(2),  weight.stride(3), flipped};
  parallel(winograd_pack_items(args), 200 * kWinogradBlock,
           [&](int64_t begin, int64_t end) { winograd_pack_cpu(args, begin, end); });
  return out;
}

}  // namespace

// On a GPU the convolution is left to winograd_input, the library's products and winograd_output.
STABLE_TORCH_LIBRARY_IMPL(convviz, CPU, m) {
  m.impl("winograd_conv2d", TORCH_BOX(&winograd_conv2d));
  m.impl("winograd_packed", TORCH_BOX(&winograd_packed));
}

}  // namespace convviz
