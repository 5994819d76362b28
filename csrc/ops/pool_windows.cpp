#include "kernels/pool_windows.h"

#include "kernels/sum_windows.h"
#include "ops/window_sources.h"

namespace convviz {
namespace {

using Ints = std::vector<int64_t>;

// Bounds so wide that products with far positions (see `bounded`) stay in 64 bits.
void check_pair(const Ints& values, int64_t least, const char* op, const char* name) {
  constexpr int64_t kMost = int64_t{1} << 20;
  STD_TORCH_CHECK(values.size() == 2 && std::min(values[0], values[1]) >= least &&
                      std::max(values[0], values[1]) <= kMost,
                  op, ": ", name, " must be two integers from ", least, " to ", kMost, ".");
}

Tensor pool_windows(Tensor base, Tensor patch, Tensor variants, Tensor rows, Tensor cols, Ints size,
                    Ints kernel, Ints stride, Ints padding, Ints dilation, bool average,
                    bool count_include_pad, std::optional<int64_t> divisor_override,
                    std::optional<Tensor> bias, double low, double high) {
  const char* op = "pool_windows";
  check_sources(base, patch, variants, op);
  check_bias(bias, patch, op);
  check_size(size, op);
  check_pair(kernel, 1, op, "kernel");
  check_pair(stride, 1, op, "stride");
  check_pair(padding, 0, op, "padding");
  check_pair(dilation, 1, op, "dilation");
  const WindowTables tables = make_tables(variants, rows, cols, 2, base, op);
  const ImageLayout layout = layout_of(patch, base);
  const Tensor out = empty_images({patch.size(0), patch.size(1), size[0], size[1]}, layout, patch);
  if (out.numel() == 0) return out;
  with_dtype(patch.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    PoolWindowsArgs<T> args{};
    args.from = make_sources<T>(base, patch, tables);
    args.activation = make_activation<T>(bias ? &*bias : nullptr, low, high);
    args.h = {base.size(2), size[0], kernel[0], stride[0], padding[0], dilation[0]};
    args.w = {base.size(3), size[1], kernel[1], stride[1], padding[1], dilation[1]};
    args.count_padding = count_include_pad;
    args.divisor = static_cast<acc_t<T>>(divisor_override.value_or(0));
    args.out = view(write<T>(out), out);
    args.count = out.size(0);
    args.channels = out.size(1);
    const int64_t taps = kernel[0] * kernel[1];
    if (out.is_cuda()) {
      on_cuda(out, op,
              [&](void* stream) { return CONVVIZ_CUDA_CALL(pool_windows_cuda(args, average, stream)); });
    } else if (args.out.c == 1 && args.from.base.c == 1 && args.from.patch.c == 1) {
      parallel(args.count * size[0], args.channels * size[1] * taps, [&](int64_t begin, int64_t end) {
        pool_windows_channels_last_cpu(args, average, begin, end);
      });
    } else {
      parallel(args.count * args.channels, size[0] * size[1] * taps,
               [&](int64_t begin, int64_t end) { pool_windows_planes_cpu(args, average, begin, end); });
    }
  });
  return out;
}

Tensor sum_windows(Tensor base, Tensor patch, Tensor variants, Tensor rows, Tensor cols,
                   std::optional<Tensor> bias, double low, double high) {
  const char* op = "sum_windows";
  check_sources(base, patch, variants, op);
  check_bias(bias, patch, op);
  const WindowTables tables = make_tables(variants, rows, cols, 1, base, op);
  const int64_t count = patch.size(0), channels = patch.size(1);
  const bool wide = patch.scalar_type() == ScalarType::Double;
  const Tensor out =
      empty_strided({count, channels}, {channels, 1}, wide ? ScalarType::Double : ScalarType::Float, patch);
  if (out.numel() == 0) return out;
  with_dtype(patch.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const SumWindowsArgs<T> args{make_sources<T>(base, patch, tables),
                                 make_activation<T>(bias ? &*bias : nullptr, low, high), write<acc_t<T>>(out),
                                 count, channels};
    const int64_t positions = patch.size(2) * patch.size(3);
    if (out.is_cuda()) {
      on_cuda(out, op, [&](void* stream) { return CONVVIZ_CUDA_CALL(sum_windows_cuda(args, stream)); });
    } else if (args.from.base.c == 1 && args.from.patch.c == 1) {
      parallel(count * ceil_div(channels, kSumBlock), positions * kSumBlock,
               [&](int64_t begin, int64_t end) { sum_windows_channels_last_cpu(args, begin, end); });
    } else {
      parallel(count * channels, positions,
               [&](int64_t begin, int64_t end) { sum_windows_planes_cpu(args, begin, end); });
    }
  });
  return out;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("pool_windows", TORCH_BOX(&pool_windows));
  m.impl("sum_windows", TORCH_BOX(&sum_windows));
}

}  // namespace

CONVVIZ_IMPLEMENT(implement)

}  // namespace convviz
