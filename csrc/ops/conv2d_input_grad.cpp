#include "kernels/conv2d_input_grad.h"

#include <type_traits>

#include "ops/tensor.h"

namespace convviz {
namespace {

WindowAxis conv_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding,
                     int64_t dilation) {
  const char* op = "conv2d_input_grad";
  STD_TORCH_CHECK(stride >= 1 && padding >= 0 && dilation >= 1 && kernel >= 1, op,
                  ": stride, dilation and kernel must be at least 1 and padding at least 0.");
  const int64_t room = in + 2 * padding - dilation * (kernel - 1) - 1;
  STD_TORCH_CHECK(room >= 0 && out == room / stride + 1, op, ": a convolution of ", in,
                  " positions does not give ", out, ".");
  return {in, out, kernel, stride, padding, dilation};
}

Tensor conv2d_input_grad(Tensor grad, Tensor weight, std::vector<int64_t> size, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const char* op = "conv2d_input_grad";
  const ImageLayout layout = image_layout(grad, op, "grad");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == grad.size(1), op,
                  ": weight must have 4 dimensions and as many output channels as grad has channels.");
  STD_TORCH_CHECK(weight.scalar_type() == grad.scalar_type(), op,
                  ": weight and grad must have the same dtype.");
  STD_TORCH_CHECK(size.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": size, stride, padding and dilation must be pairs.");
  const int64_t batch = grad.size(0), channels = grad.size(1), in_channels = weight.size(1);
  STD_TORCH_CHECK(in_channels >= 1 && in_channels <= 4, op, ": serves 1 to 4 input channels, got ",
                  in_channels, ".");
  check_same_device(grad, weight, op);
  const int64_t kernel_h = weight.size(2), kernel_w = weight.size(3);
  const WindowAxis h = conv_axis(size[0], grad.size(2), kernel_h, stride[0], padding[0], dilation[0]);
  const WindowAxis w = conv_axis(size[1], grad.size(3), kernel_w, stride[1], padding[1], dilation[1]);
  const std::vector<int64_t> out_size{batch, in_channels, size[0], size[1]};
  Tensor out = empty_strided(out_size, image_strides(out_size, layout), grad.scalar_type(), grad);
  if (product(out_size) == 0) return out;

  const bool channels_last = layout == ImageLayout::kChannelsLast;
  const int64_t padded = padded_in_channels(in_channels), taps = kernel_h * kernel_w;
  const int64_t packed_count = channels * padded * taps;
  with_dtype(grad.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    // Freed at the end of the call; on CUDA torch's allocator keeps it from other streams' use.
    const Tensor packed = empty_strided(
        {packed_count}, {1}, std::is_same<A, double>::value ? ScalarType::Double : ScalarType::Float, grad);
    const PackWeight<T> pack{read<T>(weight),   write<A>(packed),  weight.stride(0), weight.stride(1),
                             weight.stride(2),  weight.stride(3),  in_channels,      Divider(padded),
                             Divider(channels), Divider(kernel_w), Divider(taps),    channels_last};
    const InputGradArgs<T> args{
        read<T>(grad), read<A>(packed), write<T>(out), batch, channels, in_channels, h, w};
    if (grad.is_cuda()) {
      on_cuda(grad, op, [&](void* stream) {
        const int code = CONVVIZ_CUDA_CALL(pack_weight_cuda(pack, packed_count, stream));
        if (code != 0) return code;
        return channels_last ? CONVVIZ_CUDA_CALL(input_grad_channels_last_cuda(args, stream))
                             : CONVVIZ_CUDA_CALL(input_grad_contiguous_cuda(args, stream));
      });
      return;
    }
    pack_weight_cpu(pack, packed_count);
    const int64_t work = size[1] * in_channels * channels * taps / (stride[0] * stride[1]);
    parallel(batch * size[0], work, [&](int64_t begin, int64_t end) {
      if (channels_last) {
        input_grad_channels_last_cpu(args, begin, end);
      } else {
        input_grad_contiguous_cpu(args, begin, end);
      }
    });
  });
  return out;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("conv2d_input_grad", TORCH_BOX(&conv2d_input_grad));
}

}  // namespace

CONVVIZ_IMPLEMENT(implement)

}  // namespace convviz
