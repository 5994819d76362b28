#include "kernels/winograd_conv.h"

#include <optional>

#include "ops/winograd.h"

namespace convviz {
namespace {

// The whole convolution, on the CPU in float32.
void run(const Tensor& out, int64_t channel, const Tensor& x, const Tensor& weight,
         const std::optional<Tensor>& bias, int64_t results, const std::vector<int64_t>& padding, double low,
         double high, const char* op) {
  const auto [height, width] = convolved_size(x, padding, op);
  check_float32(x, op, "x");
  check_float32(weight, op, "weight");
  STD_TORCH_CHECK(results >= 0 && weight.dim() == 4 && weight.is_contiguous() &&
                      weight.size(0) == ceil_div(results, kResultBlock) && weight.size(1) == 16 &&
                      weight.size(2) == x.size(1) && weight.size(3) == kResultBlock,
                  op, ": weight must be contiguous, [ceil(results / 32), 16, C, 32].");
  const WinogradConvArgs args{read<float>(x),
                              read<float>(weight),
                              bias_of(bias, results, op),
                              channels_of(out, x, channel, results, height, width, op),
                              x.size(1),
                              results,
                              x.size(2),
                              x.size(3),
                              height,
                              width,
                              padding[0],
                              padding[1],
                              out.size(1),
                              static_cast<float>(low),
                              static_cast<float>(high)};
  if (out.numel() == 0) return;
  parallel(x.size(0) * ceil_div(height, 2) * ceil_div(width, 2), 16 * x.size(1) * results,
           [&](int64_t begin, int64_t end) { winograd_conv_cpu(args, begin, end); });
}

Tensor winograd_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t results,
                       std::vector<int64_t> padding, double low, double high) {
  const char* op = "winograd_conv2d";
  const auto [height, width] = convolved_size(x, padding, op);
  STD_TORCH_CHECK(results >= 0, op, ": results must be at least 0.");
  const Tensor out = empty_result(x, results, height, width);
  run(out, 0, x, weight, bias, results, padding, low, high, op);
  return out;
}

void winograd_conv2d_(Tensor out, Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t results,
                      std::vector<int64_t> padding, int64_t channel, double low, double high) {
  run(out, channel, x, weight, bias, results, padding, low, high, "winograd_conv2d_");
}

Tensor winograd_packed(Tensor weight, bool flipped) {
  const char* op = "winograd_packed";
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                      weight.scalar_type() == torch::headeronly::ScalarType::Float,
                  op, ": weight must be [Co, Ci, 3, 3], float32.");
  const int result = flipped ? 1 : 0;
  const int64_t results = weight.size(result), channels = weight.size(1 - result);
  const int64_t blocks = ceil_div(results, kResultBlock), step = channels * kResultBlock;
  Tensor out = empty_strided({blocks, 16, channels, kResultBlock}, {16 * step, step, kResultBlock, 1},
                             weight.scalar_type(), weight);
  if (out.numel() == 0) return out;
  const WinogradPackArgs args{
      read<float>(weight),       write<float>(out), channels,         results, weight.stride(result),
      weight.stride(1 - result), weight.stride(2),  weight.stride(3), flipped};
  parallel(winograd_pack_items(args), 200 * kResultBlock,
           [&](int64_t begin, int64_t end) { winograd_pack_cpu(args, begin, end); });
  return out;
}

}  // namespace

// On a GPU the convolution is left to winograd_input, the library's products and winograd_output.
STABLE_TORCH_LIBRARY_IMPL(convviz, CPU, m) {
  m.impl("winograd_conv2d", TORCH_BOX(&winograd_conv2d));
  m.impl("winograd_conv2d_", TORCH_BOX(&winograd_conv2d_));
  m.impl("winograd_packed", TORCH_BOX(&winograd_packed));
}

}  // namespace convviz
