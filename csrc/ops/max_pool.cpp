#include <limits>
#include <tuple>

#include "kernels/max_pool.h"
#include "kernels/switch_unpool.h"
#include "ops/tensor.h"

namespace convviz {
namespace {

using Pair = std::vector<int64_t>;

// Below 2^31, as no product of two then overflows and a switch holds every position of a window.
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

void check_pair(const Pair& values, int64_t least, const char* op, const char* name) {
  STD_TORCH_CHECK(values.size() == 2 && values[0] >= least && values[1] >= least && values[0] <= kMost &&
                      values[1] <= kMost,
                  op, ": ", name, " must be two integers of at least ", least, " and below 2^31.");
}

struct Axes {
  WindowAxis h, w;
};

Axes pool_axes(int64_t height, int64_t width, const Pair& kernel, const Pair& stride, const Pair& padding,
               const Pair& dilation, const char* op) {
  check_pair(kernel, 1, op, "kernel");
  check_pair(stride, 1, op, "stride");
  check_pair(padding, 0, op, "padding");
  check_pair(dilation, 1, op, "dilation");
  STD_TORCH_CHECK(kernel[0] * kernel[1] <= kMost, op, ": a window must have fewer than 2^31 positions, not ",
                  kernel[0], "x", kernel[1], ".");
  return {{height, 0, kernel[0], stride[0], padding[0], dilation[0]},
          {width, 0, kernel[1], stride[1], padding[1], dilation[1]}};
}

// torch's formula: with ceil_mode the last window must start inside the input or its left padding.
int64_t pooled_size(const WindowAxis& axis, bool ceil_mode) {
  const int64_t room = axis.in + 2 * axis.padding - axis.dilation * (axis.kernel - 1) - 1;
  if (room < 0 && !ceil_mode) return 0;
  int64_t out = (room + (ceil_mode ? axis.stride - 1 : 0)) / axis.stride + 1;
  if (ceil_mode && (out - 1) * axis.stride >= axis.in + axis.padding) --out;
  return out;
}

ScalarType switch_dtype(const WindowAxis& h, const WindowAxis& w) {
  const int64_t positions = h.kernel * w.kernel;
  if (positions <= std::numeric_limits<int8_t>::max()) return ScalarType::Char;
  return positions <= std::numeric_limits<int16_t>::max() ? ScalarType::Short : ScalarType::Int;
}

template <class F>
void with_switch_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Char:
      return f(Tag<int8_t>{});
    case ScalarType::Short:
      return f(Tag<int16_t>{});
    default:
      return f(Tag<int32_t>{});
  }
}

std::tuple<Tensor, Tensor> relu_max_pool2d(Tensor x, Pair kernel, Pair stride, Pair padding, Pair dilation,
                                           bool ceil_mode, bool relu) {
  const char* op = "relu_max_pool2d";
  const ImageLayout layout = image_layout(x, op, "x");
  Axes axes = pool_axes(x.size(2), x.size(3), kernel, stride, padding, dilation, op);
  axes.h.out = pooled_size(axes.h, ceil_mode);
  axes.w.out = pooled_size(axes.w, ceil_mode);
  STD_TORCH_CHECK(axes.h.out >= 1 && axes.w.out >= 1, op, ": an input of ", axes.h.in, "x", axes.w.in,
                  " is too small for the window.");
  const std::vector<int64_t> size{x.size(0), x.size(1), axes.h.out, axes.w.out};
  const std::vector<int64_t> strides = image_strides(size, layout);
  Tensor out = empty_strided(size, strides, x.scalar_type(), x);
  Tensor switches = empty_strided(size, strides, switch_dtype(axes.h, axes.w), x);
  if (product(size) == 0) return {out, switches};

  with_dtype(x.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_switch_type(switches.scalar_type(), [&](auto switch_tag) {
      using S = typename decltype(switch_tag)::type;
      const MaxPoolArgs<T, S> args{read<T>(x), write<T>(out), write<S>(switches), size[0], size[1], axes.h,
                                   axes.w,     relu};
      const bool contiguous = layout == ImageLayout::kContiguous;
      if (x.is_cuda()) {
        on_cuda(x, op, [&](void* stream) {
          return contiguous ? CONVVIZ_CUDA_CALL(max_pool_contiguous_cuda(args, stream))
                            : CONVVIZ_CUDA_CALL(max_pool_channels_last_cuda(args, stream));
        });
      } else if (contiguous) {
        parallel(size[0] * size[1] * axes.h.out, axes.w.out * kernel[0] * kernel[1],
                 [&](int64_t begin, int64_t end) { max_pool_contiguous_cpu(args, begin, end); });
      } else {
        parallel(size[0] * axes.h.out, size[1] * axes.w.out * kernel[0] * kernel[1],
                 [&](int64_t begin, int64_t end) { max_pool_channels_last_cpu(args, begin, end); });
      }
    });
  });
  return {out, switches};
}

Tensor switch_unpool2d(Tensor grad, Tensor switches, std::vector<int64_t> size, Pair kernel, Pair stride,
                       Pair padding, Pair dilation, int64_t rule, bool overwrite) {
  const char* op = "switch_unpool2d";
  const ImageLayout layout = image_layout(switches, op, "switches");
  check_pair(size, 0, op, "size");
  STD_TORCH_CHECK(rule >= 0 && rule <= 3, op, ": the rule must be 0, 1, 2 or 3, got ", rule, ".");
  Axes axes = pool_axes(size[0], size[1], kernel, stride, padding, dilation, op);
  axes.h.out = switches.size(2);
  axes.w.out = switches.size(3);
  STD_TORCH_CHECK(switches.scalar_type() == switch_dtype(axes.h, axes.w), op, ": a window of ", kernel[0],
                  "x", kernel[1], " has another dtype of switches.");
  STD_TORCH_CHECK(grad.dim() == 4, op, ": grad must have 4 dimensions, got ", grad.dim(), ".");
  const int64_t switch_batch = switches.size(0), batch = grad.size(0), channels = grad.size(1);
  STD_TORCH_CHECK(channels == switches.size(1) && grad.size(2) == axes.h.out && grad.size(3) == axes.w.out,
                  op, ": grad and switches must have the same channels, height and width.");
  STD_TORCH_CHECK(switch_batch > 0 ? batch % switch_batch == 0 : batch == 0, op,
                  ": grad's batch must be a multiple of ", switch_batch, ", got ", batch, ".");
  check_same_device(grad, switches, op);
  const std::vector<int64_t> out_size{batch, channels, size[0], size[1]};
  Tensor out = empty_strided(out_size, image_strides(out_size, layout), grad.scalar_type(), grad);
  if (product(out_size) == 0) return out;

  with_dtype(grad.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_switch_type(switches.scalar_type(), [&](auto switch_tag) {
      using S = typename decltype(switch_tag)::type;
      UnpoolArgs<T, S> args{};
      args.grad = read<T>(grad);
      args.switches = read<S>(switches);
      args.out = write<T>(out);
      args.batch = batch;
      args.channels = channels;
      args.switch_batch = Divider(switch_batch);
      args.h = axes.h;
      args.w = axes.w;
      args.n_stride = grad.stride(0);
      args.c_stride = grad.stride(1);
      args.h_stride = grad.stride(2);
      args.w_stride = grad.stride(3);
      args.rule = make_rule<acc_t<T>>(static_cast<RuleCode>(rule));
      args.overwrite = overwrite;
      const bool contiguous = layout == ImageLayout::kContiguous;
      if (grad.is_cuda()) {
        on_cuda(grad, op, [&](void* stream) {
          return contiguous ? CONVVIZ_CUDA_CALL(unpool_contiguous_cuda(args, stream))
                            : CONVVIZ_CUDA_CALL(unpool_channels_last_cuda(args, stream));
        });
      } else if (contiguous) {
        parallel(batch * channels * size[0], size[1],
                 [&](int64_t begin, int64_t end) { unpool_contiguous_cpu(args, begin, end); });
      } else {
        parallel(batch * size[0], channels * size[1],
                 [&](int64_t begin, int64_t end) { unpool_channels_last_cpu(args, begin, end); });
      }
    });
  });
  return out;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("relu_max_pool2d", TORCH_BOX(&relu_max_pool2d));
  m.impl("switch_unpool2d", TORCH_BOX(&switch_unpool2d));
}

}  // namespace

CONVVIZ_IMPLEMENT(implement)

}  // namespace convviz
