// ReLU and max pooling in one pass, giving the pooled map and, for each window, the position of its maximum.
//
// switch = position p = kh * KW + kw of the first maximum, or ~p where, with a ReLU in front, the whole
// window is dead.
#pragma once

#include <limits>

#include "kernels/types.h"
#include "kernels/window.h"

namespace convviz {

template <class T, class S>
struct MaxPoolArgs {
  const T* x;
  T* out;
  S* switches;
  int64_t batch, channels;
  WindowAxis h, w;
  bool relu;
};

// V windows side by side: neighbouring channels (channels_last) or neighbouring windows of a row
// (contiguous). `x` is tap (0, 0) of the first lane; taps, rows and lanes are `column`, `row` and `lane`
// elements apart. Lanes beyond `lanes` do not exist; FULL says that all V do. LANE, where it is not 0, is
// `lane` known to the compiler.
template <int V, int LANE, bool FULL, class T, class S>
CONVVIZ_HD void pool_windows(const MaxPoolArgs<T, S>& args, const Taps& h, const Taps& w, const T* x,
                             int64_t row, int64_t column, int64_t lane, int lanes, T* out, S* switches) {
  using A = acc_t<T>;
  using I = lane_index_t<T>;
  const int count = FULL ? V : lanes;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  constexpr I no_position = std::numeric_limits<S>::min();
  const bool empty = h.begin >= h.end || w.begin >= w.end;
  const I first = static_cast<I>(h.begin * args.w.kernel + w.begin);
  // With a ReLU a value counts only above 0, so that a window without one keeps its first position, marked
  // dead.
  const A start = args.relu && !empty ? A(0) : lowest;
  const I start_position = empty ? no_position : args.relu ? ~first : first;
  A best[V];
  I position[V];
  CONVVIZ_LANES
  for (int l = 0; l < V; ++l) {
    best[l] = start;
    position[l] = start_position;
  }
  for (int64_t kh = h.begin; kh < h.end; ++kh) {
    for (int64_t kw = w.begin; kw < w.end; ++kw) {
      const T* tap = x + kh * args.h.dilation * row + kw * args.w.dilation * column;
      const I p = static_cast<I>(kh * args.w.kernel + kw);
      T values[V];
      if (FULL && LANE == 1) {
        load_pack(tap, values);
      } else {
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) {
          values[l] = FULL || l < count ? tap[l * (LANE != 0 ? LANE : lane)] : static_cast<T>(A(0));
        }
      }
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) {
        const A value = to_acc(values[l]);
        const bool better = (value > best[l]) | (value != value);
        best[l] = better ? value : best[l];
        position[l] = better ? p : position[l];
      }
    }
  }
  T maxima[V];
  S chosen[V];
  CONVVIZ_LANES
  for (int l = 0; l < V; ++l) {
    maxima[l] = static_cast<T>(best[l]);
    chosen[l] = static_cast<S>(position[l]);
  }
  if (FULL) {
    store_pack(out, maxima);
    store_pack(switches, chosen);
  } else {
    for (int l = 0; l < count; ++l) {
      out[l] = maxima[l];
      switches[l] = chosen[l];
    }
  }
}

// V channels of one window. For the GPU: item i is a window's channels V*j ... V*j + V - 1, channels fastest.
template <class T, class S, int V>
struct MaxPoolChannelsLast {
  MaxPoolArgs<T, S> args;
  Divider groups, out_width, out_height;  // groups: channels / V, which leaves no remainder

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t rest = i;
    const int64_t c = groups.split(rest) * V, ow = out_width.split(rest), oh = out_height.split(rest);
    const Taps h = taps_of(args.h, oh), w = taps_of(args.w, ow);
    channels<true>(rest, h, w, c, V, i * V);
  }

  // `at` is the window's place in out and switches, channel c's.
  template <bool FULL>
  CONVVIZ_HD void channels(int64_t n, const Taps& h, const Taps& w, int64_t c, int lanes, int64_t at) const {
    const int64_t column = args.channels, row = args.w.in * column;
    const T* x = args.x + (n * args.h.in + h.start) * row + w.start * column + c;
    pool_windows<V, 1, FULL>(args, h, w, x, row, column, 1, lanes, args.out + at, args.switches + at);
  }
};

// One window of a contiguous map: item i, rows first.
template <class T, class S>
struct MaxPoolContiguous {
  MaxPoolArgs<T, S> args;
  Divider out_width, out_height;

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t plane = i;
    const int64_t ow = out_width.split(plane), oh = out_height.split(plane);
    windows<1, 1, true>(plane, taps_of(args.h, oh), taps_of(args.w, ow), 1, i);
  }

  // V windows of a row, `w` being the first one's taps; they are every lane's unless V is 1. LANE is the
  // stride, or 0.
  template <int V, int LANE, bool FULL>
  CONVVIZ_HD void windows(int64_t plane, const Taps& h, const Taps& w, int lanes, int64_t at) const {
    const T* x = args.x + (plane * args.h.in + h.start) * args.w.in + w.start;
    pool_windows<V, LANE, FULL>(args, h, w, x, args.w.in, 1, args.w.stride, lanes, args.out + at,
                                args.switches + at);
  }
};

// Rows of windows, begin <= row < end: n * out height + oh, or (n * channels + c) * out height + oh.
template <class T, class S>
void max_pool_channels_last_cpu(const MaxPoolArgs<T, S>& args, int64_t begin, int64_t end);
template <class T, class S>
void max_pool_contiguous_cpu(const MaxPoolArgs<T, S>& args, int64_t begin, int64_t end);

// Enqueue on the CUDA stream and return CUDA's error code.
template <class T, class S>
int max_pool_channels_last_cuda(const MaxPoolArgs<T, S>& args, void* stream);
template <class T, class S>
int max_pool_contiguous_cuda(const MaxPoolArgs<T, S>& args, void* stream);

}  // namespace convviz
