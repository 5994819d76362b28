// How the sum over a map changes where a patch replaces the base: one number for each variant and channel, in
// the type that sums are kept in, because a sum over a map soon is more than a half type can hold.
#pragma once

#include "kernels/window_sources.h"

namespace convviz {

template <class T>
struct SumWindowsArgs {
  WindowSources<T> from;
  Activation<T> activation;
  acc_t<T>* out;  // [count, channels]
  int64_t count, channels;
};

// One number: any strides. Rows are summed one by one and then added up, always in the same order. For the
// GPU: item i, channels fastest.
template <class T>
struct SumWindows {
  SumWindowsArgs<T> args;
  Divider channels;

  CONVVIZ_HD void operator()(int64_t i) const {
    using A = acc_t<T>;
    int64_t n = i;
    const int64_t c = channels.split(n);
    const WindowSources<T>& from = args.from;
    const AxisEntry rows = from.row(n), cols = from.col(n);
    const int64_t image = from.tables.image(n);
    const int64_t top = max_of<int64_t>(rows.start, 0), bottom = min_of(rows.end, from.height);
    const int64_t left = max_of<int64_t>(cols.start, 0), right = min_of(cols.end, from.width);
    A total = A(0);
    for (int64_t y = top; y < bottom; ++y) {
      const auto row = from.at(n, image, rows, cols, y);
      const T* base = row.base + left * from.base.w + c * from.base.c;
      const T* patch = row.patch + left * from.patch.w + c * from.patch.c;
      A sum = A(0);
      for (int64_t x = left; x < right; ++x, base += from.base.w, patch += from.patch.w) {
        sum += args.activation(*patch, c) - to_acc(*base);
      }
      total += sum;
    }
    args.out[i] = total;
  }
};

// channels_last: blocks of kSumBlock channels that follow each other, variants first. Planes: n * channels +
// c, with any strides.
constexpr int64_t kSumBlock = 512;
template <class T>
void sum_windows_channels_last_cpu(const SumWindowsArgs<T>& args, int64_t begin, int64_t end);
template <class T>
void sum_windows_planes_cpu(const SumWindowsArgs<T>& args, int64_t begin, int64_t end);

// Enqueues on the CUDA stream and returns CUDA's error code.
template <class T>
int sum_windows_cuda(const SumWindowsArgs<T>& args, void* stream);

}  // namespace convviz
