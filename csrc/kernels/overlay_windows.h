// Rectangles of maps, read from base and patch and written, or added, to a result: gather_windows,
// add_windows and occlude.
#pragma once

#include "kernels/window_sources.h"

namespace convviz {

template <class T>
struct OverlayArgs {
  WindowSources<T> from;
  Activation<T> activation;  // of the patch, or of the sum
  T pad;
  bool add;
  MapView<T> out;
  int64_t count, channels, height, width;  // of the result

  CONVVIZ_HD T sum(T old, T value) const {
    return static_cast<T>(Activation<T>::clamp(to_acc(old) + to_acc(value), activation.low, activation.high));
  }
  // The value to write where `value` was read.
  CONVVIZ_HD T result(T old, T value, bool in_patch, int64_t c) const {
    if (add) return sum(old, value);
    return in_patch ? static_cast<T>(activation(value, c)) : value;
  }
};

// U times V channels of one pixel of channels_last maps, `step` apart: what it takes to find the pixel is
// worth several vectors. For the GPU: item i, channels fastest.
template <class T, int V, int U>
struct OverlayChannels {
  OverlayArgs<T> args;
  Divider groups, width, height;  // groups: step / V, which leaves no remainder
  int64_t step;                   // channels / U

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t n = i;
    const int64_t c = groups.split(n) * V, x = width.split(n), y = height.split(n);
    const WindowSources<T>& from = args.from;
    const AxisEntry rows = from.row(n), cols = from.col(n);
    const int64_t map_y = rows.origin + y, map_x = cols.origin + x;
    const T* source = nullptr;
    bool in_patch = false;
    if (in_map(map_y, from.height) && in_map(map_x, from.width)) {
      const auto row = from.at(n, from.tables.image(n), rows, cols, map_y);
      in_patch = row.in_patch && cols.in_patch(map_x);
      source = (in_patch ? row.patch + map_x * from.patch.w : row.base + map_x * from.base.w) + c;
    }
    T values[U][V];
    CONVVIZ_UNROLL
    for (int u = 0; u < U; ++u) {
      if (source != nullptr) {
        load_pack(source + u * step, values[u]);
      } else {
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) values[u][l] = args.pad;
      }
    }
    T* out = args.out.data + n * args.out.n + y * args.out.h + x * args.out.w + c;
    CONVVIZ_UNROLL
    for (int u = 0; u < U; ++u) {
      if (args.add) {
        T old[V];
        load_pack(out + u * step, old);
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) values[u][l] = args.sum(old[l], values[u][l]);
      } else if (in_patch && !args.activation.plain) {
        acc_t<T> numbers[V];
        args.activation.template lanes<V, true>(values[u], c + u * step, V, numbers);
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) values[u][l] = static_cast<T>(numbers[l]);
      }
      store_pack(out + u * step, values[u]);
    }
  }
};

// V elements that follow each other in a row of the result, with any strides. A row is one of a pixel's
// (LAST) or of one channel's. For the GPU: item i, `groups` items a row.
template <class T, int V, bool LAST>
struct OverlayElements {
  OverlayArgs<T> args;
  Divider groups, channels, height;
  bool packed;  // the result's packs of V lie where the GPU may write them at once

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t n = i, c = 0;
    const int64_t first = groups.split(n) * V;
    const int64_t y = height.split(n);
    if (!LAST) c = channels.split(n);
    const int64_t left = (LAST ? args.width * args.channels : args.width) - first;
    int64_t x = first;
    if (LAST) c = channels.split(x);
    const WindowSources<T>& from = args.from;
    const AxisEntry rows = from.row(n), cols = from.col(n);
    const int64_t map_y = rows.origin + y;
    typename WindowSources<T>::Row row{nullptr, nullptr, false};
    const bool inside = in_map(map_y, from.height);
    if (inside) row = from.at(n, from.tables.image(n), rows, cols, map_y);
    T* out = args.out.data + n * args.out.n + y * args.out.h + x * args.out.w + c * args.out.c;
    T* const begin = out;
    T values[V];
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) {
      if (l < left) {
        const int64_t map_x = cols.origin + x;
        T value = args.pad;
        bool in_patch = false;
        if (inside && in_map(map_x, from.width)) {
          in_patch = row.in_patch && cols.in_patch(map_x);
          value = in_patch ? row.patch[map_x * from.patch.w + c * from.patch.c]
                           : row.base[map_x * from.base.w + c * from.base.c];
        }
        values[l] = args.result(args.add ? *out : value, value, in_patch, c);
        if (!packed || left < V) *out = values[l];
        if (LAST && c + 1 < args.channels) {
          ++c;
          out += args.out.c;
        } else {
          ++x;
          out += args.out.w;
          if (LAST) {
            out -= c * args.out.c;
            c = 0;
          }
        }
      }
    }
    if (packed && left >= V) store_pack(begin, values);
  }
};

// channels_last: rows of the result, n * height + y, for maps whose channels follow each other (a patch may
// also have one value for all). Planes: n * channels + c, any strides.
template <class T>
void overlay_channels_last_cpu(const OverlayArgs<T>& args, int64_t begin, int64_t end);
template <class T>
void overlay_planes_cpu(const OverlayArgs<T>& args, int64_t begin, int64_t end);

// Enqueues on the CUDA stream and returns CUDA's error code.
template <class T>
int overlay_cuda(const OverlayArgs<T>& args, void* stream);

}  // namespace convviz
