// Scores of windows to a map: each pixel's mean over the windows that cover it.
#pragma once

#include "kernels/types.h"

namespace convviz {

// One axis: `count` windows of `window` positions, `stride` apart, on a map of `size`.
struct GridAxis {
  int64_t count, size, window;
  Divider stride;
};

template <class T>
struct WindowMeanArgs {
  const T* scores;  // [maps, h.count, w.count]
  T* out;           // [maps, h.size, w.size]
  int64_t maps;
  GridAxis h, w;
};

// The windows begin <= r < end that cover a position.
struct Covering {
  int64_t begin, end;
};

CONVVIZ_HD Covering covering(const GridAxis& axis, int64_t position) {
  Covering c;
  c.end = min_of(axis.stride.quotient(position) + 1, axis.count);
  c.begin = position < axis.window ? 0 : axis.stride.quotient(position - axis.window) + 1;
  c.begin = min_of(c.begin, c.end);
  return c;
}

// A pixel's sum is taken in columns of the grid, then over the columns, always in the same order. In float64:
// hundreds of windows may cover a pixel.
template <class T>
CONVVIZ_HD double column_sum(const T* scores, int64_t width, const Covering& rows, int64_t column) {
  double sum = 0;
  for (int64_t r = rows.begin; r < rows.end; ++r) sum += static_cast<double>(scores[r * width + column]);
  return sum;
}

template <class T>
CONVVIZ_HD T mean_of(double sum, const Covering& rows, const Covering& cols) {
  const int64_t count = (rows.end - rows.begin) * (cols.end - cols.begin);
  const double mean = count == 0 ? 0.0 : sum / static_cast<double>(count);
  return static_cast<T>(static_cast<acc_t<T>>(mean));
}

// One pixel. For the GPU: item i, maps first.
template <class T>
struct WindowMean {
  WindowMeanArgs<T> args;
  Divider width, height;

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t map = i;
    const int64_t x = width.split(map), y = height.split(map);
    const Covering rows = covering(args.h, y), cols = covering(args.w, x);
    const T* scores = args.scores + map * args.h.count * args.w.count;
    double sum = 0;
    for (int64_t q = cols.begin; q < cols.end; ++q) sum += column_sum(scores, args.w.count, rows, q);
    args.out[i] = mean_of<T>(sum, rows, cols);
  }
};

// Rows of the maps, map * height + y.
template <class T>
void window_mean_cpu(const WindowMeanArgs<T>& args, int64_t begin, int64_t end);

// Enqueues on the CUDA stream and returns CUDA's error code.
template <class T>
int window_mean_cuda(const WindowMeanArgs<T>& args, void* stream);

}  // namespace convviz
