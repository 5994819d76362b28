#include "kernels/max_abs_channels.h"

#include "ops/tensor.h"

namespace convviz {
namespace {

Tensor max_abs_channels(Tensor x) {
  const char* op = "max_abs_channels";
  const ImageLayout layout = image_layout(x, op, "x");
  const std::vector<int64_t> size = sizes_of(x);
  STD_TORCH_CHECK(size[1] >= 1, op, ": x must have at least one channel.");
  const int64_t pixels = size[2] * size[3];
  Tensor out = empty_strided({size[0], size[2], size[3]}, {pixels, size[3], 1}, x.scalar_type(), x);
  if (x.numel() == 0) return out;
  with_dtype(x.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaxAbsArgs<T> args{read<T>(x), write<T>(out), size[0], size[1], pixels};
    const bool contiguous = layout == ImageLayout::kContiguous;
    if (x.is_cuda()) {
      on_cuda(x, op, [&](void* stream) {
        return contiguous ? CONVVIZ_CUDA_CALL(max_abs_contiguous_cuda(args, stream))
                          : CONVVIZ_CUDA_CALL(max_abs_channels_last_cuda(args, stream));
      });
    } else if (contiguous) {
      parallel(size[0] * ceil_div(pixels, kMaxAbsBlock), kMaxAbsBlock * size[1],
               [&](int64_t begin, int64_t end) { max_abs_contiguous_cpu(args, begin, end); });
    } else {
      parallel(size[0] * pixels, size[1],
               [&](int64_t begin, int64_t end) { max_abs_channels_last_cpu(args, begin, end); });
    }
  });
  return out;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("max_abs_channels", TORCH_BOX(&max_abs_channels));
}

}  // namespace

CONVVIZ_IMPLEMENT(implement)

}  // namespace convviz
