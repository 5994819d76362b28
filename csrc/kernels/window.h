// Sliding windows along one axis: which inputs a window has, which windows an input has.
#pragma once

#include "kernels/types.h"

namespace convviz {

// One axis of a pooling or a convolution: `in` input positions, `out` windows of `kernel` taps.
struct WindowAxis {
  int64_t in, out, kernel, stride, padding, dilation;
};

// The taps begin <= k < end of a window that lie inside the input. Tap 0 is at `start`, inside or not.
struct Taps {
  int64_t begin, end, start;
};

CONVVIZ_HD Taps taps_of(const WindowAxis& axis, int64_t window) {
  Taps taps;
  taps.start = window * axis.stride - axis.padding;
  taps.begin = 0;
  taps.end = axis.kernel;
  if (axis.dilation == 1) {
    taps.begin = max_of<int64_t>(0, -taps.start);
    taps.end = min_of(axis.kernel, axis.in - taps.start);
  } else {
    while (taps.begin < taps.end && taps.start + taps.begin * axis.dilation < 0) ++taps.begin;
    while (taps.end > taps.begin && taps.start + (taps.end - 1) * axis.dilation >= axis.in) --taps.end;
  }
  return taps;
}

// The windows first <= o <= last that can cover an input position; tap 0 of window o is `offset` - o * stride
// before it.
struct Cover {
  int64_t first, last, offset;
};

// `windows_back`: how many windows can cover one position, at most.
CONVVIZ_HD int64_t windows_back(const WindowAxis& axis) {
  return ((axis.kernel - 1) * axis.dilation) / axis.stride + 1;
}

CONVVIZ_HD Cover cover_of(const WindowAxis& axis, const Divider& stride, int64_t back, int64_t position) {
  Cover cover;
  cover.offset = position + axis.padding;
  cover.last = stride.quotient(cover.offset);
  cover.first = max_of<int64_t>(0, cover.last - back + 1);
  cover.last = min_of(cover.last, axis.out - 1);
  return cover;
}

// The tap of window o that lies on the position, or -1.
CONVVIZ_HD int64_t tap_on(const WindowAxis& axis, const Cover& cover, int64_t o) {
  int64_t tap = cover.offset - o * axis.stride;
  if (axis.dilation != 1) {
    if (tap % axis.dilation != 0) return -1;
    tap /= axis.dilation;
  }
  return tap < axis.kernel ? tap : -1;
}

}  // namespace convviz
