// Images times masks that small grids are sampled for bilinearly on the way: RISE's masks, activation maps.
#pragma once

#include "kernels/types.h"

namespace convviz {

// Where position p of an axis of a result reads the grid: (p + offset) * scale + shift, brought into the
// grid.
struct SampleAxis {
  int64_t size;  // of the grid, at least 1
  double scale, shift;
};

// The value there: low's, and `weight` of the way to high's.
struct Sample {
  int64_t low, high;
  double weight;
};

// The position is offset + p. In float64, also where the masks are float32: it costs little, and a mask does
// not depend on how far its offset is.
CONVVIZ_HD Sample sample_at(const SampleAxis& axis, double position) {
  const double at = position * axis.scale + axis.shift, last = static_cast<double>(axis.size - 1);
  const double inside = at > 0 ? (at < last ? at : last) : 0.0;
  Sample s;
  s.low = static_cast<int64_t>(inside);
  s.high = min_of(s.low + 1, axis.size - 1);
  s.weight = inside - static_cast<double>(s.low);
  return s;
}

// Where both are the same, exactly that.
template <class A>
CONVVIZ_HD A blend(A low, A high, A weight) {
  return low + (high - low) * weight;
}

template <class T>
struct MaskImagesArgs {
  const T* images;         // [batch, channels, height, width] or, in channels_last, [batch, height, width,
                           // channels]
  const T* grids;          // [count, h.size, w.size]
  const int64_t* image;    // [count]; beyond the batch: the nearest
  const int64_t* offsets;  // [count, 2]: vertical, horizontal
  T* out;                  // as the images, count of them
  int64_t batch, count, channels, height, width;
  SampleAxis h, w;

  CONVVIZ_HD int64_t image_of(int64_t n) const { return max_of(int64_t{0}, min_of(image[n], batch - 1)); }
  CONVVIZ_HD const T* grid_row(int64_t n, int64_t row) const { return grids + (n * h.size + row) * w.size; }
  CONVVIZ_HD Sample row(int64_t n, int64_t y) const {
    return sample_at(h, static_cast<double>(offsets[2 * n]) + static_cast<double>(y));
  }
  CONVVIZ_HD Sample column(int64_t n, int64_t x) const {
    return sample_at(w, static_cast<double>(offsets[2 * n + 1]) + static_cast<double>(x));
  }
  // A row of the grid between its columns.
  CONVVIZ_HD acc_t<T> across(const T* grid, const Sample& column) const {
    return blend(to_acc(grid[column.low]), to_acc(grid[column.high]), static_cast<acc_t<T>>(column.weight));
  }
  CONVVIZ_HD acc_t<T> mask(int64_t n, const Sample& row, const Sample& column) const {
    return blend(across(grid_row(n, row.low), column), across(grid_row(n, row.high), column),
                 static_cast<acc_t<T>>(row.weight));
  }
  static CONVVIZ_HD T masked(T value, acc_t<T> mask) { return static_cast<T>(to_acc(value) * mask); }
};

// V pixels of a row in all channels of a contiguous result. For the GPU: item i, `groups` items a row.
template <class T, int V>
struct MaskPlanes {
  MaskImagesArgs<T> args;
  Divider groups, height;
  bool packed;  // rows are whole packs of V, which lie where the GPU may move them at once

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t n = i;
    const int64_t first = groups.split(n) * V, y = height.split(n), left = args.width - first;
    const Sample row = args.row(n, y);
    acc_t<T> mask[V];
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) mask[l] = l < left ? args.mask(n, row, args.column(n, first + l)) : 0;
    const int64_t plane = args.height * args.width, place = y * args.width + first;
    const T* from = args.images + args.image_of(n) * args.channels * plane + place;
    T* to = args.out + n * args.channels * plane + place;
    for (int64_t c = 0; c < args.channels; ++c, from += plane, to += plane) {
      if (packed) {
        T values[V];
        load_pack(from, values);
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) values[l] = args.masked(values[l], mask[l]);
        store_pack(to, values);
      } else {
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) {
          if (l < left) to[l] = args.masked(from[l], mask[l]);
        }
      }
    }
  }
};

// V elements that follow each other in a row of a channels_last result. For the GPU: item i, `groups` items a
// row.
template <class T, int V>
struct MaskPixels {
  MaskImagesArgs<T> args;
  Divider groups, height, channels;
  bool packed;

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t n = i;
    const int64_t first = groups.split(n) * V, y = height.split(n);
    const int64_t length = args.width * args.channels, left = length - first;
    int64_t x = first;
    int64_t c = channels.split(x);
    const Sample row = args.row(n, y);
    const T* from = args.images + (args.image_of(n) * args.height + y) * length + first;
    T* to = args.out + (n * args.height + y) * length + first;
    acc_t<T> mask = args.mask(n, row, args.column(n, x));
    T values[V];
    if (packed) load_pack(from, values);
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) {
      if (l < left) {
        values[l] = args.masked(packed ? values[l] : from[l], mask);
        if (!packed) to[l] = values[l];
        if (++c == args.channels) {
          c = 0;
          mask = args.mask(n, row, args.column(n, ++x));
        }
      }
    }
    if (packed) store_pack(to, values);
  }
};

// Rows of the result, n * height + y.
template <class T>
void mask_images_cpu(const MaskImagesArgs<T>& args, bool channels_last, int64_t begin, int64_t end);

// Enqueues on the CUDA stream and returns CUDA's error code.
template <class T>
int mask_images_cuda(const MaskImagesArgs<T>& args, bool channels_last, void* stream);

}  // namespace convviz
