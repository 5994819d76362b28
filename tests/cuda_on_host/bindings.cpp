// The launchers of csrc/kernels/*_cuda.cu for NumPy arrays. These carry addresses only, and sizes and strides
// are given in elements; of the window ops' arrays the sizes and strides are read too. float16 and bfloat16
// arrays hold the values' bits.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "kernels/conv2d_input_grad.h"
#include "kernels/mask_images.h"
#include "kernels/max_abs_channels.h"
#include "kernels/max_pool.h"
#include "kernels/overlay_windows.h"
#include "kernels/philox.h"
#include "kernels/pool_windows.h"
#include "kernels/relu.h"
#include "kernels/replace_ranked.h"
#include "kernels/sum_windows.h"
#include "kernels/switch_unpool.h"
#include "kernels/window_mean.h"
#include "kernels/winograd.h"

namespace py = pybind11;
using namespace convviz;

namespace {

using Ints = std::vector<int64_t>;

template <class T>
struct Tag {
  using type = T;
};

template <class F>
void with_dtype(const std::string& dtype, const F& f) {
  if (dtype == "float64") return f(Tag<double>{});
  if (dtype == "float32") return f(Tag<float>{});
  if (dtype == "float16") return f(Tag<Half>{});
  if (dtype == "bfloat16") return f(Tag<BFloat16>{});
  throw std::invalid_argument("no dtype " + dtype);
}

template <class F>
void with_switches(const py::array& switches, const F& f) {
  switch (switches.itemsize()) {
    case 1:
      return f(Tag<int8_t>{});
    case 2:
      return f(Tag<int16_t>{});
    default:
      return f(Tag<int32_t>{});
  }
}

template <class T>
T* pointer(const py::array& array) {
  return static_cast<T*>(const_cast<void*>(array.data()));
}

void check(int code) {
  if (code != 0) throw std::runtime_error("launch failed");
}

WindowAxis axis(const Ints& values) {
  return {values[0], values[1], values[2], values[3], values[4], values[5]};
}

void relu(const std::string& dtype, const py::array& x, const py::array& out, const py::array& mask,
          int64_t numel, double lower, std::optional<double> upper) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const A none = std::numeric_limits<A>::quiet_NaN();
    const ReluArgs<T> args{pointer<T>(x), pointer<T>(out),       pointer<uint8_t>(mask),
                           numel,         static_cast<A>(lower), upper ? static_cast<A>(*upper) : none};
    check(relu_cuda(args, nullptr));
  });
}

// size, stride: of the gradient's dimensions in the memory order of the forward's output.
void relu_backward(const std::string& dtype, const py::array& grad, const py::array& mask,
                   const py::array& out, int64_t mask_numel, const Ints& size, const Ints& stride,
                   int64_t rule) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    ReluBackwardArgs<T> args{};
    args.grad = pointer<T>(grad);
    args.mask = pointer<uint8_t>(mask);
    args.out = pointer<T>(out);
    args.numel = 1;
    args.mask_numel = Divider(mask_numel);
    args.rank = static_cast<int>(size.size());
    for (int d = 0; d < args.rank; ++d) {
      args.numel *= size[d];
      args.size[d] = Divider(size[d]);
      args.stride[d] = stride[d];
    }
    args.rule = make_rule<acc_t<T>>(static_cast<RuleCode>(rule));
    check(relu_backward_cuda(args, nullptr));
  });
}

void relu_max_pool2d(const std::string& dtype, bool channels_last, const py::array& x, const py::array& out,
                     const py::array& switches, int64_t batch, int64_t channels, const Ints& h, const Ints& w,
                     bool relu) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_switches(switches, [&](auto switch_tag) {
      using S = typename decltype(switch_tag)::type;
      const MaxPoolArgs<T, S> args{
          pointer<T>(x), pointer<T>(out), pointer<S>(switches), batch, channels, axis(h), axis(w), relu};
      check(channels_last ? max_pool_channels_last_cuda(args, nullptr)
                          : max_pool_contiguous_cuda(args, nullptr));
    });
  });
}

void switch_unpool2d(const std::string& dtype, bool channels_last, const py::array& grad, const Ints& stride,
                     const py::array& switches, const py::array& out, int64_t batch, int64_t switch_batch,
                     int64_t channels, const Ints& h, const Ints& w, int64_t rule, bool overwrite) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_switches(switches, [&](auto switch_tag) {
      using S = typename decltype(switch_tag)::type;
      UnpoolArgs<T, S> args{};
      args.grad = pointer<T>(grad);
      args.switches = pointer<S>(switches);
      args.out = pointer<T>(out);
      args.batch = batch;
      args.channels = channels;
      args.switch_batch = Divider(switch_batch);
      args.h = axis(h);
      args.w = axis(w);
      args.n_stride = stride[0];
      args.c_stride = stride[1];
      args.h_stride = stride[2];
      args.w_stride = stride[3];
      args.rule = make_rule<acc_t<T>>(static_cast<RuleCode>(rule));
      args.overwrite = overwrite;
      check(channels_last ? unpool_channels_last_cuda(args, nullptr) : unpool_contiguous_cuda(args, nullptr));
    });
  });
}

// `packed` holds at least [taps, padded input channels, channels] numbers of the type that sums are kept in.
void conv2d_input_grad(const std::string& dtype, bool channels_last, const py::array& grad,
                       const py::array& weight, const Ints& weight_stride, const py::array& packed,
                       const py::array& out, int64_t batch, int64_t channels, int64_t in_channels,
                       const Ints& h, const Ints& w) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const InputGradArgs<T> args{pointer<T>(grad), pointer<A>(packed), pointer<T>(out), batch,
                                channels,         in_channels,        axis(h),         axis(w)};
    const int64_t padded = padded_in_channels(in_channels), taps = args.h.kernel * args.w.kernel;
    const PackWeight<T> pack{pointer<T>(weight), pointer<A>(packed),     weight_stride[0], weight_stride[1],
                             weight_stride[2],   weight_stride[3],       in_channels,      Divider(padded),
                             Divider(channels),  Divider(args.w.kernel), Divider(taps),    channels_last};
    check(pack_weight_cuda(pack, channels * padded * taps, nullptr));
    check(channels_last ? input_grad_channels_last_cuda(args, nullptr)
                        : input_grad_contiguous_cuda(args, nullptr));
  });
}

void max_abs_channels(const std::string& dtype, bool channels_last, const py::array& x, const py::array& out,
                      int64_t batch, int64_t channels, int64_t pixels) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaxAbsArgs<T> args{pointer<T>(x), pointer<T>(out), batch, channels, pixels};
    check(channels_last ? max_abs_channels_last_cuda(args, nullptr) : max_abs_contiguous_cuda(args, nullptr));
  });
}

// The tables: variants, rows, cols.
using Tables = std::vector<py::array>;

struct Bounds {
  std::optional<py::array> bias;
  double low, high;
};

template <class T>
MapView<T> view(const py::array& map, int64_t channel = 0) {
  const int64_t item = map.itemsize(), c = map.shape(1) == 1 ? 1 : map.strides(1) / item;
  auto* data = const_cast<std::remove_const_t<T>*>(pointer<std::remove_const_t<T>>(map));
  return {data + channel * c, map.strides(0) / item, c, map.strides(2) / item, map.strides(3) / item};
}

template <class T>
WindowSources<T> sources(const py::array& base, const py::array& patch, const Tables& tables) {
  const WindowTables windows{
      pointer<int64_t>(tables[0]), pointer<int64_t>(tables[1]), pointer<int64_t>(tables[2]), base.shape(0),
      tables[1].shape(0),          tables[2].shape(0),          tables[1].shape(1)};
  return {view<const T>(base), view<const T>(patch), base.shape(2), base.shape(3),
          patch.shape(2),      patch.shape(3),       windows};
}

template <class T>
Activation<T> activation(const Bounds& bounds) {
  using A = acc_t<T>;
  const A inf = std::numeric_limits<A>::infinity(), low = static_cast<A>(bounds.low),
          high = static_cast<A>(bounds.high);
  return {bounds.bias ? pointer<T>(*bounds.bias) : nullptr, low, high,
          !bounds.bias && low == -inf && high == inf};
}

void overlay_windows(const std::string& dtype, const py::array& base, const py::array& patch,
                     const Tables& tables, const py::array& out, int64_t channel, double pad, bool add,
                     std::optional<py::array> bias, double low, double high) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    OverlayArgs<T> args{};
    args.from = sources<T>(base, patch, tables);
    args.activation = activation<T>({bias, low, high});
    args.pad = static_cast<T>(static_cast<acc_t<T>>(pad));
    args.add = add;
    args.out = view<T>(out, channel);
    args.count = out.shape(0);
    args.channels = base.shape(1);
    args.height = out.shape(2);
    args.width = out.shape(3);
    check(overlay_cuda(args, nullptr));
  });
}

void pool_rectangles(const std::string& dtype, const py::array& base, const py::array& patch,
                     const Tables& tables, const py::array& out, const Ints& h, const Ints& w, bool average,
                     bool count_padding, double divisor, std::optional<py::array> bias, double low,
                     double high) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    PoolWindowsArgs<T> args{};
    args.from = sources<T>(base, patch, tables);
    args.activation = activation<T>({bias, low, high});
    args.h = axis(h);
    args.w = axis(w);
    args.count_padding = count_padding;
    args.divisor = static_cast<acc_t<T>>(divisor);
    args.out = view<T>(out);
    args.count = out.shape(0);
    args.channels = out.shape(1);
    check(pool_windows_cuda(args, average, nullptr));
  });
}

void sum_windows(const std::string& dtype, const py::array& base, const py::array& patch,
                 const Tables& tables, const py::array& out, std::optional<py::array> bias, double low,
                 double high) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const SumWindowsArgs<T> args{sources<T>(base, patch, tables), activation<T>({bias, low, high}),
                                 pointer<acc_t<T>>(out), out.shape(0), out.shape(1)};
    check(sum_windows_cuda(args, nullptr));
  });
}

void mean_of_windows(const std::string& dtype, const py::array& scores, const py::array& out,
                     const Ints& window, const Ints& stride) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const WindowMeanArgs<T> args{pointer<T>(scores),
                                 pointer<T>(out),
                                 scores.shape(0),
                                 {scores.shape(1), out.shape(1), window[0], Divider(stride[0])},
                                 {scores.shape(2), out.shape(2), window[1], Divider(stride[1])}};
    check(window_mean_cuda(args, nullptr));
  });
}

// x: [N, C, H, W] in channels_last; out: [tiles, 16, C].
void winograd_input(const std::string& dtype, const py::array& x, const py::array& out, const Ints& padding) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t height = x.shape(2) + 2 * padding[0] - 2, width = x.shape(3) + 2 * padding[1] - 2;
    const WinogradInputArgs<T> args{pointer<T>(x),
                                    pointer<T>(out),
                                    out.shape(0),
                                    x.shape(1),
                                    x.shape(2),
                                    x.shape(3),
                                    padding[0],
                                    padding[1],
                                    Divider(ceil_div(width, 2)),
                                    Divider(ceil_div(height, 2))};
    check(winograd_input_cuda(args, nullptr));
  });
}

// products: [tiles, 16, C]; out: [N, C, H, W] in channels_last.
void winograd_output(const std::string& dtype, const py::array& products, std::optional<py::array> bias,
                     const py::array& out, double low, double high) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const WinogradOutputArgs<T> args{pointer<T>(products),
                                     bias ? pointer<T>(*bias) : nullptr,
                                     pointer<T>(out),
                                     products.shape(0),
                                     products.shape(2),
                                     out.shape(2),
                                     out.shape(3),
                                     Divider(ceil_div(out.shape(3), 2)),
                                     Divider(ceil_div(out.shape(2), 2)),
                                     static_cast<acc_t<T>>(low),
                                     static_cast<acc_t<T>>(high)};
    check(winograd_output_cuda(args, nullptr));
  });
}

// images, out: [N, C, H, W] in either layout; grids: [M, h, w].
void mask_images(const std::string& dtype, bool channels_last, const py::array& images,
                 const py::array& grids, const py::array& image, const py::array& offsets,
                 const py::array& out, const std::vector<double>& scale, const std::vector<double>& shift) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaskImagesArgs<T> args{pointer<T>(images),
                                 pointer<T>(grids),
                                 pointer<int64_t>(image),
                                 pointer<int64_t>(offsets),
                                 pointer<T>(out),
                                 images.shape(0),
                                 out.shape(0),
                                 out.shape(1),
                                 out.shape(2),
                                 out.shape(3),
                                 {grids.shape(1), scale[0], shift[0]},
                                 {grids.shape(2), scale[1], shift[1]}};
    check(mask_images_cuda(args, channels_last, nullptr));
  });
}

// images, out: [N, C, H, W] in either layout; fills: the images' shape, at these strides in elements.
void replace_ranked(bool channels_last, const py::array& images, const py::array& fills,
                    const std::vector<int64_t>& fill_strides, const py::array& ranks, const py::array& image,
                    const py::array& low, const py::array& high, const py::array& out) {
  const auto call = [&](auto tag) {
    using B = typename decltype(tag)::type;
    const ReplaceRankedArgs<B> args{pointer<B>(images),
                                    pointer<B>(fills),
                                    pointer<int32_t>(ranks),
                                    pointer<int64_t>(image),
                                    pointer<int64_t>(low),
                                    pointer<int64_t>(high),
                                    pointer<B>(out),
                                    images.shape(0),
                                    out.shape(0),
                                    out.shape(1),
                                    out.shape(2),
                                    out.shape(3),
                                    fill_strides[0],
                                    fill_strides[1],
                                    fill_strides[2],
                                    fill_strides[3]};
    check(replace_ranked_cuda(args, channels_last, nullptr));
  };
  switch (images.itemsize()) {
    case 2:
      return call(Tag<uint16_t>{});
    case 4:
      return call(Tag<uint32_t>{});
    default:
      return call(Tag<uint64_t>{});
  }
}

void philox(const py::array& streams, const py::array& out, uint64_t seed, uint64_t block) {
  const int64_t words = out.shape(1), blocks = ceil_div(words, 4);
  const Philox args{pointer<int64_t>(streams), pointer<int64_t>(out), words, Divider(blocks), seed, block};
  check(philox_cuda(args, streams.shape(0) * blocks, nullptr));
}

}  // namespace

PYBIND11_MODULE(_cuda_on_host, m) {
  m.def("relu", &relu);
  m.def("relu_backward", &relu_backward);
  m.def("relu_max_pool2d", &relu_max_pool2d);
  m.def("switch_unpool2d", &switch_unpool2d);
  m.def("conv2d_input_grad", &conv2d_input_grad);
  m.def("max_abs_channels", &max_abs_channels);
  m.def("overlay_windows", &overlay_windows);
  m.def("pool_windows", &pool_rectangles);
  m.def("sum_windows", &sum_windows);
  m.def("window_mean", &mean_of_windows);
  m.def("winograd_input", &winograd_input);
  m.def("winograd_output", &winograd_output);
  m.def("mask_images", &mask_images);
  m.def("philox", &philox);
  m.def("replace_ranked", &replace_ranked);
  m.def("divide", [](int64_t index, int64_t divisor) { return Divider(divisor).quotient(index); });
  m.def("load_vector", [](const py::array& from) {
    float to[4];
    load_pack(pointer<float>(from), to);
    return std::vector<float>(to, to + 4);
  });
  m.def("counts", [] { return py::make_tuple(cuda_on_host::launches, cuda_on_host::threads); });
}
