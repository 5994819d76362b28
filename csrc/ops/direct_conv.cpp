#include "kernels/direct_conv.h"

#include "ops/convolution.h"

namespace convviz {
namespace {

// Height and width of the result.
std::pair<int64_t, int64_t> size_of_result(const Tensor& x, const std::vector<int64_t>& kernel,
                                           const std::vector<int64_t>& stride, const char* op) {
  check_channels_last(x, op, "x");
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && kernel[0] >= 1 && kernel[1] >= 1 &&
                      stride[0] >= 1 && stride[1] >= 1,
                  op, ": kernel and stride must be two integers of at least 1.");
  STD_TORCH_CHECK(x.size(2) >= kernel[0] && x.size(3) >= kernel[1], op,
                  ": x must be as large as the kernel.");
  return {(x.size(2) - kernel[0]) / stride[0] + 1, (x.size(3) - kernel[1]) / stride[1] + 1};
}

void run(const Tensor& out, int64_t channel, const Tensor& x, const Tensor& weight,
         const std::optional<Tensor>& bias, int64_t results, const std::vector<int64_t>& kernel,
         const std::vector<int64_t>& stride, double low, double high, const char* op) {
  const auto [height, width] = size_of_result(x, kernel, stride, op);
  check_float32(x, op, "x");
  check_float32(weight, op, "weight");
  const int64_t taps = kernel[0] * kernel[1] * x.size(1);
  STD_TORCH_CHECK(results >= 0 && weight.dim() == 3 && weight.is_contiguous() &&
                      weight.size(0) == ceil_div(results, kResultBlock) && weight.size(1) == taps &&
                      weight.size(2) == kResultBlock,
                  op, ": weight must be contiguous, [ceil(results / 32), taps, 32].");
  const DirectConvArgs args{read<float>(x),
                            read<float>(weight),
                            bias_of(bias, results, op),
                            channels_of(out, x, channel, results, height, width, op),
                            x.size(1),
                            results,
                            x.size(2),
                            x.size(3),
                            height,
                            width,
                            kernel[0],
                            kernel[1],
                            stride[0],
                            stride[1],
                            out.size(1),
                            static_cast<float>(low),
                            static_cast<float>(high)};
  if (out.numel() == 0) return;
  const int64_t images = x.size(0), segments = direct_conv_segments(args, images);
  parallel(segments, images * height * width / segments * taps * results,
           [&](int64_t begin, int64_t end) { direct_conv_cpu(args, images, begin, end); });
}

Tensor direct_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t results,
                     std::vector<int64_t> kernel, std::vector<int64_t> stride, double low, double high) {
  const char* op = "direct_conv2d";
  const auto [height, width] = size_of_result(x, kernel, stride, op);
  STD_TORCH_CHECK(results >= 0, op, ": results must be at least 0.");
  const Tensor out = empty_result(x, results, height, width);
  run(out, 0, x, weight, bias, results, kernel, stride, low, high, op);
  return out;
}

void direct_conv2d_(Tensor out, Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t results,
                    std::vector<int64_t> kernel, std::vector<int64_t> stride, int64_t channel, double low,
                    double high) {
  run(out, channel, x, weight, bias, results, kernel, stride, low, high, "direct_conv2d_");
}

}  // namespace

// On a GPU convolutions are the library's.
STABLE_TORCH_LIBRARY_IMPL(convviz, CPU, m) {
  m.impl("direct_conv2d", TORCH_BOX(&direct_conv2d));
  m.impl("direct_conv2d_", TORCH_BOX(&direct_conv2d_));
}

}  // namespace convviz
