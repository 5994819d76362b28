// What the window ops read: each variant's patch over its clean image's base over padding (see
// window_ops.py).
#pragma once

#include "kernels/types.h"

namespace convviz {

// A batch of maps and its strides.
template <class T>
struct MapView {
  T* data;
  int64_t n, c, h, w;
};

// Whether V channels of a pixel follow each other where the GPU may move them at once.
template <int V, class T>
bool packs(const MapView<T>& map) {
  return map.c == 1 && is_aligned<V>(map.data) && map.n % V == 0 && map.h % V == 0 && map.w % V == 0;
}

// One axis of one variant, in positions of the map: where the result begins, and the patch's range.
// `patch_zero` is the position of the patch's element 0.
struct AxisEntry {
  int64_t origin, start, end, patch_zero;

  CONVVIZ_HD bool in_patch(int64_t position) const { return position >= start && position < end; }
};

CONVVIZ_HD bool in_map(int64_t position, int64_t size) {
  return static_cast<uint64_t>(position) < static_cast<uint64_t>(size);
}

CONVVIZ_HD int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return min_of(max_of(value, low), high);
}

// Tables lie on the device and may say anything. Beyond every map there is nothing but padding, and sums and
// products of such numbers do not overflow.
CONVVIZ_HD int64_t bounded(int64_t position) {
  constexpr int64_t kFar = int64_t{1} << 40;
  return clamped(position, -kFar, kFar);
}

// The variants' tables. A table of one column holds the patch's start, which is the origin too; of two,
// origin and start; of three, origin, start and end of a patch that lies on the map as it is and belongs to
// the image.
struct WindowTables {
  const int64_t *variants, *rows, *cols;
  int64_t images, row_count, col_count, columns;

  CONVVIZ_HD int64_t image(int64_t n) const { return clamped(variants[3 * n], 0, images - 1); }
  CONVVIZ_HD AxisEntry row(int64_t n, int64_t extent) const {
    return entry(rows + columns * clamped(variants[3 * n + 1], 0, row_count - 1), extent);
  }
  CONVVIZ_HD AxisEntry col(int64_t n, int64_t extent) const {
    return entry(cols + columns * clamped(variants[3 * n + 2], 0, col_count - 1), extent);
  }
  CONVVIZ_HD bool of_image() const { return columns == 3; }

  CONVVIZ_HD AxisEntry entry(const int64_t* values, int64_t extent) const {
    AxisEntry e;
    e.origin = bounded(values[0]);
    e.start = columns == 1 ? e.origin : bounded(values[1]);
    e.end = of_image() ? bounded(values[2]) : e.start + extent;
    e.patch_zero = of_image() ? 0 : e.start;
    return e;
  }
};

template <class T>
struct WindowSources {
  MapView<const T> base, patch;
  int64_t height, width, patch_height, patch_width;
  WindowTables tables;

  CONVVIZ_HD AxisEntry row(int64_t n) const { return tables.row(n, patch_height); }
  CONVVIZ_HD AxisEntry col(int64_t n) const { return tables.col(n, patch_width); }

  // Channel 0 of a row of the map, of column 0 of base and patch each. They may be beside the row's memory:
  // only columns that in_map and in_patch allow are read.
  struct Row {
    const T *base, *patch;
    bool in_patch;
  };
  // `y` is inside the map.
  CONVVIZ_HD Row at(int64_t n, int64_t image, const AxisEntry& rows, const AxisEntry& cols, int64_t y) const {
    Row r;
    r.in_patch = rows.in_patch(y);
    r.base = base.data + image * base.n + y * base.h;
    r.patch = patch.data;
    if (r.in_patch) {
      r.patch += (tables.of_image() ? image : n) * patch.n + (y - rows.patch_zero) * patch.h -
                 cols.patch_zero * patch.w;
    }
    return r;
  }
};

// What is done to a patch when it is read: bias, then bounds. NaN stays NaN.
template <class T>
struct Activation {
  using A = acc_t<T>;
  const T* bias;  // or null
  A low, high;
  bool plain;  // nothing is done

  static CONVVIZ_HD A clamp(A value, A low, A high) {
    // One choice after the other: a comparison that is made only after another one stays a branch.
    value = value <= low ? low : value;
    return value >= high ? high : value;
  }

  // V elements of the channels from c on. PACKED: all V exist, and their bias lies where a pack may be read.
  template <int V, bool PACKED>
  CONVVIZ_HD void lanes(const T (&values)[V], int64_t c, int count, A (&numbers)[V]) const {
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) numbers[l] = to_acc(values[l]);
    apply<V, PACKED>(c, count, numbers);
  }
  template <int V, bool PACKED>
  CONVVIZ_HD void apply(int64_t c, int count, A (&numbers)[V]) const {
    if (plain) return;
    const A a = low, b = high;
    if (bias != nullptr) {
      T added[V];
      if (PACKED) {
        load_pack(bias + c, added);
      } else {
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) added[l] = bias[l < count ? c + l : c];
      }
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) numbers[l] += to_acc(added[l]);
    }
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) numbers[l] = clamp(numbers[l], a, b);
  }
  // One element.
  CONVVIZ_HD A operator()(T value, int64_t c) const {
    const T values[1] = {value};
    A numbers[1];
    lanes<1, false>(values, c, 1, numbers);
    return numbers[0];
  }
};

}  // namespace convviz
