#include "kernels/overlay_windows.h"

#include <limits>

#include "ops/window_sources.h"

namespace convviz {
namespace {

using Size = std::vector<int64_t>;

// Channels channel ... channel + C - 1 of `out` become, or get added, what base and patch hold.
struct Overlay {
  const Tensor &out, &base, &patch;
  const Tensor* bias;
  double pad, low, high;
  bool add;
  int64_t channel;
};

void run(const Overlay& call, const WindowTables& tables, const char* op) {
  const Tensor& out = call.out;
  const int64_t channels = call.base.size(1);
  if (out.numel() == 0 || channels == 0) return;
  with_dtype(out.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    OverlayArgs<T> args{};
    args.from = make_sources<T>(call.base, call.patch, tables);
    args.activation = make_activation<T>(call.bias, call.low, call.high);
    args.pad = static_cast<T>(static_cast<acc_t<T>>(call.pad));
    args.add = call.add;
    args.out = view(write<T>(out) + call.channel * out.stride(1), out);
    if (channels == 1) args.out.c = 1;
    args.count = out.size(0);
    args.channels = channels;
    args.height = out.size(2);
    args.width = out.size(3);
    const MapView<const T>& patch = args.from.patch;
    if (out.is_cuda()) {
      on_cuda(out, op, [&](void* stream) { return CONVVIZ_CUDA_CALL(overlay_cuda(args, stream)); });
    } else if (args.out.c == 1 && args.from.base.c == 1 &&
               (patch.c == 1 || (patch.c == 0 && (args.add || args.activation.plain)))) {
      parallel(args.count * args.height, channels * args.width,
               [&](int64_t begin, int64_t end) { overlay_channels_last_cpu(args, begin, end); });
    } else {
      parallel(args.count * channels, args.height * args.width,
               [&](int64_t begin, int64_t end) { overlay_planes_cpu(args, begin, end); });
    }
  });
}

const Tensor* address(const std::optional<Tensor>& tensor) {
  return tensor ? &*tensor : nullptr;
}

Tensor gather_windows(Tensor base, Tensor patch, Tensor variants, Tensor rows, Tensor cols, Size size,
                      double pad, std::optional<Tensor> bias, double low, double high) {
  const char* op = "gather_windows";
  check_sources(base, patch, variants, op);
  check_bias(bias, patch, op);
  check_size(size, op);
  const WindowTables tables = make_tables(variants, rows, cols, 2, base, op);
  const Tensor out =
      empty_images({patch.size(0), patch.size(1), size[0], size[1]}, layout_of(patch, base), patch);
  run({out, base, patch, address(bias), pad, low, high, false, 0}, tables, op);
  return out;
}

void check_out(const Tensor& out, const Tensor& patch, int64_t channel, const char* op) {
  check_images(out, op, "out");
  check_same_kind(out, patch, op);
  STD_TORCH_CHECK(out.size(0) == patch.size(0) && channel >= 0 && channel <= out.size(1) - patch.size(1), op,
                  ": out must have patch's variants and room for its channels.");
}

void gather_windows_(Tensor out, Tensor base, Tensor patch, Tensor variants, Tensor rows, Tensor cols,
                     int64_t channel, double pad, std::optional<Tensor> bias, double low, double high) {
  const char* op = "gather_windows_";
  check_sources(base, patch, variants, op);
  check_bias(bias, patch, op);
  check_out(out, patch, channel, op);
  run({out, base, patch, address(bias), pad, low, high, false, channel},
      make_tables(variants, rows, cols, 2, base, op), op);
}

void add_windows_(Tensor out, Tensor base, Tensor patch, Tensor variants, Tensor rows, Tensor cols,
                  double low, double high) {
  const char* op = "add_windows_";
  check_sources(base, patch, variants, op);
  check_out(out, patch, 0, op);
  STD_TORCH_CHECK(out.size(1) == patch.size(1), op, ": out must have patch's channels.");
  run({out, base, patch, nullptr, 0.0, low, high, true, 0}, make_tables(variants, rows, cols, 2, base, op),
      op);
}

Tensor occlude(Tensor images, Tensor fill, Tensor variants, Tensor rows, Tensor cols, Size size) {
  const char* op = "occlude";
  check_images(images, op, "images");
  check_images(fill, op, "fill");
  check_same_kind(images, fill, op);
  STD_TORCH_CHECK(sizes_of(fill) == sizes_of(images), op, ": fill must be expanded to the images' shape.");
  check_size(size, op);
  const WindowTables tables = make_tables(variants, rows, cols, 3, images, op);
  const Tensor out =
      empty_images({variants.size(0), images.size(1), size[0], size[1]}, layout_of(images, images), images);
  constexpr double inf = std::numeric_limits<double>::infinity();
  run({out, images, fill, nullptr, 0.0, -inf, inf, false, 0}, tables, op);
  return out;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("gather_windows", TORCH_BOX(&gather_windows));
  m.impl("gather_windows_", TORCH_BOX(&gather_windows_));
  m.impl("add_windows_", TORCH_BOX(&add_windows_));
  m.impl("occlude", TORCH_BOX(&occlude));
}

}  // namespace

CONVVIZ_IMPLEMENT(implement)

}  // namespace convviz
