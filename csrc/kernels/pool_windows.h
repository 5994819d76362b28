// Maximum and average pooling on rectangles of maps, read from base and patch.
#pragma once

#include <limits>

#include "kernels/window.h"
#include "kernels/window_sources.h"

namespace convviz {

template <class T>
struct PoolWindowsArgs {
  WindowSources<T> from;  // its tables' origins are positions of the pooled map
  Activation<T> activation;
  WindowAxis h, w;  // `in` is the map's size, `out` the result's
  bool count_padding;
  acc_t<T> divisor;  // of every window, or 0
  MapView<T> out;
  int64_t count, channels;
};

// How many elements an average of PyTorch's counts along one axis.
template <class T>
CONVVIZ_HD acc_t<T> counted(const WindowAxis& axis, const Taps& taps, bool padding) {
  if (!padding) return static_cast<acc_t<T>>(taps.end - taps.begin);
  return static_cast<acc_t<T>>(min_of(axis.kernel, axis.in + axis.padding - taps.start));
}

// A window's maximum or sum, V channels at a time.
template <class T, int V, bool AVERAGE>
struct Pooled {
  using A = acc_t<T>;
  static constexpr A kStart = AVERAGE ? A(0) : -std::numeric_limits<A>::infinity();
  A total[V];
  A nan[V];  // the last NaN, or a number: the maximum itself passes over NaN

  CONVVIZ_HD Pooled() {
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) {
      total[l] = kStart;
      nan[l] = A(0);
    }
  }

  CONVVIZ_HD void take(const A (&numbers)[V]) {
    if (AVERAGE) {
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) total[l] += numbers[l];
    } else {
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) {
        total[l] = numbers[l] > total[l] ? numbers[l] : total[l];
        nan[l] = numbers[l] != numbers[l] ? numbers[l] : nan[l];
      }
    }
  }

  CONVVIZ_HD void finish(A divisor, T (&result)[V]) const {
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) {
      result[l] = static_cast<T>(AVERAGE ? total[l] / divisor : nan[l] != nan[l] ? nan[l] : total[l]);
    }
  }
};

// What the sum over a window is divided by.
template <class T>
CONVVIZ_HD acc_t<T> divisor_of(const PoolWindowsArgs<T>& args, const Taps& h, const Taps& w) {
  using A = acc_t<T>;
  if (h.begin >= h.end || w.begin >= w.end) return A(1);
  if (args.divisor != A(0)) return args.divisor;
  return counted<T>(args.h, h, args.count_padding) * counted<T>(args.w, w, args.count_padding);
}

// Calls f(tap, in_patch) for each tap of a window that lies in the map, row by row; `tap` points to channel
// 0.
template <class T, class F>
CONVVIZ_HD void for_each_tap(const PoolWindowsArgs<T>& args, int64_t n, int64_t image, const AxisEntry& rows,
                             const AxisEntry& cols, const Taps& h, const Taps& w, const F& f) {
  const WindowSources<T>& from = args.from;
  for (int64_t kh = h.begin; kh < h.end; ++kh) {
    const auto row = from.at(n, image, rows, cols, h.start + kh * args.h.dilation);
    int64_t x = w.start + w.begin * args.w.dilation;
    for (int64_t kw = w.begin; kw < w.end; ++kw, x += args.w.dilation) {
      const bool in_patch = row.in_patch && cols.in_patch(x);
      f(in_patch ? row.patch + x * from.patch.w : row.base + x * from.base.w, in_patch);
    }
  }
}

// Channels c ... c + count - 1 of a window, of V at most. PACKED: there are V, and they follow each other
// everywhere.
template <class T, int V, bool AVERAGE, bool PACKED>
CONVVIZ_HD void pool_window(const PoolWindowsArgs<T>& args, int64_t n, int64_t image, const AxisEntry& rows,
                            const AxisEntry& cols, const Taps& h, const Taps& w, int64_t c, int count,
                            T* out) {
  Pooled<T, V, AVERAGE> pooled;
  for_each_tap(args, n, image, rows, cols, h, w, [&](const T* tap, bool in_patch) {
    T values[V];
    acc_t<T> numbers[V];
    if (PACKED) {
      load_pack(tap + c, values);
    } else {
      const int64_t step = in_patch ? args.from.patch.c : args.from.base.c;
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) values[l] = tap[(l < count ? c + l : c) * step];
    }
    if (in_patch) {
      args.activation.template lanes<V, PACKED>(values, c, count, numbers);
    } else {
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) numbers[l] = to_acc(values[l]);
    }
    pooled.take(numbers);
  });
  T result[V];
  pooled.finish(AVERAGE ? divisor_of(args, h, w) : acc_t<T>(1), result);
  if (PACKED) {
    store_pack(out, result);
  } else {
    for (int l = 0; l < count; ++l) out[l * args.out.c] = result[l];
  }
}

// V channels of one window. For the GPU: item i in the order of the result's memory, channels first or (LAST)
// last.
template <class T, int V, bool AVERAGE, bool LAST>
struct PoolWindows {
  PoolWindowsArgs<T> args;
  Divider groups, width, height;  // groups: channels / V, which leaves no remainder

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t n = i, c = 0;
    if (LAST) c = groups.split(n) * V;
    const int64_t x = width.split(n), y = height.split(n);
    if (!LAST) c = groups.split(n) * V;
    const AxisEntry rows = args.from.row(n), cols = args.from.col(n);
    const Taps h = taps_of(args.h, rows.origin + y), w = taps_of(args.w, cols.origin + x);
    T* out = args.out.data + n * args.out.n + c * args.out.c + y * args.out.h + x * args.out.w;
    pool_window<T, V, AVERAGE, LAST && V != 1>(args, n, args.from.tables.image(n), rows, cols, h, w, c, V,
                                               out);
  }
};

// Rows of the result, n * height + y, for maps whose channels follow each other; planes, n * channels + c,
// with any strides.
template <class T>
void pool_windows_channels_last_cpu(const PoolWindowsArgs<T>& args, bool average, int64_t begin, int64_t end);
template <class T>
void pool_windows_planes_cpu(const PoolWindowsArgs<T>& args, bool average, int64_t begin, int64_t end);

// Enqueues on the CUDA stream and returns CUDA's error code.
template <class T>
int pool_windows_cuda(const PoolWindowsArgs<T>& args, bool average, void* stream);

}  // namespace convviz
