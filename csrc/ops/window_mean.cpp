#include "kernels/window_mean.h"

#include "ops/tensor.h"

namespace convviz {
namespace {

using Pair = std::vector<int64_t>;

void check_pair(const Pair& values, int64_t least, const char* op, const char* name) {
  STD_TORCH_CHECK(values.size() == 2 && values[0] >= least && values[1] >= least, op, ": ", name,
                  " must be two integers of at least ", least, ".");
}

Tensor window_mean(Tensor scores, Pair size, Pair window, Pair stride) {
  const char* op = "window_mean";
  STD_TORCH_CHECK(scores.dim() == 3 && scores.is_contiguous(), op,
                  ": scores must be contiguous, of 3 dimensions.");
  check_pair(size, 0, op, "size");
  check_pair(window, 1, op, "window");
  check_pair(stride, 1, op, "stride");
  const int64_t maps = scores.size(0);
  const Tensor out =
      empty_strided({maps, size[0], size[1]}, {size[0] * size[1], size[1], 1}, scores.scalar_type(), scores);
  if (out.numel() == 0) return out;
  with_dtype(scores.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const WindowMeanArgs<T> args{read<T>(scores),
                                 write<T>(out),
                                 maps,
                                 {scores.size(1), size[0], window[0], Divider(stride[0])},
                                 {scores.size(2), size[1], window[1], Divider(stride[1])}};
    if (out.is_cuda()) {
      on_cuda(out, op, [&](void* stream) { return CONVVIZ_CUDA_CALL(window_mean_cuda(args, stream)); });
    } else {
      parallel(maps * size[0], 4 * size[1],
               [&](int64_t begin, int64_t end) { window_mean_cpu(args, begin, end); });
    }
  });
  return out;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("window_mean", TORCH_BOX(&window_mean));
}

}  // namespace

CONVVIZ_IMPLEMENT(implement)

}  // namespace convviz
