// The backward of relu_max_pool2d: unpooling through the switches and the ReLU's rule in one pass.
//
// Every input position receives the gradients of the windows whose switch points at it, in ascending order of
// the windows.
#pragma once

#include <limits>

#include "kernels/rules.h"
#include "kernels/types.h"
#include "kernels/window.h"

namespace convviz {

template <class T, class S>
struct UnpoolArgs {
  const T* grad;
  const S* switches;
  T* out;
  int64_t batch, channels;  // of the gradient: `batch` is a multiple of the switches' batch
  Divider switch_batch;
  WindowAxis h, w;                                 // `in` is the result's size, `out` the gradient's
  int64_t n_stride, c_stride, h_stride, w_stride;  // of the gradient
  Rule<acc_t<T>> rule;
  bool overwrite;  // of several gradients for one position take the largest, not the sum
};

// The signal at a position after one more window has pointed at it; `first` if none has before.
template <bool OVERWRITE, class A>
CONVVIZ_HD A combined(A signal, A value, bool first) {
  if (!OVERWRITE) return signal + value;
  return first | (value > signal) | (value != value) ? value : signal;
}

// Where the first lane's windows are: a gradient and a switch for window (oh, ow). The next lane's are `lane`
// elements on in the gradient and one in the switches.
template <class T, class S>
struct StridedWindows {
  const T* grad;
  const S* switches;
  int64_t row, column, lane, switch_row, switch_column;
  CONVVIZ_HD const T* grad_at(int64_t oh, int64_t ow) const { return grad + oh * row + ow * column; }
  CONVVIZ_HD const S* switch_at(int64_t oh, int64_t ow) const {
    return switches + oh * switch_row + ow * switch_column;
  }
};

// Adds the gradients of those lanes whose switch is p or ~p.
template <bool OVERWRITE, int V, class T, class S>
CONVVIZ_HD void add_lanes(S p, const S (&chosen)[V], const T (&values)[V], acc_t<T> (&signal)[V],
                          S (&found)[V]) {
  CONVVIZ_LANES
  for (int l = 0; l < V; ++l) {
    const S at = static_cast<S>(chosen[l] < 0 ? ~chosen[l] : chosen[l]);
    const acc_t<T> value = to_acc(values[l]);
    if (OVERWRITE) {
      const acc_t<T> next = combined<true>(signal[l], value, found[l] == 0);
      signal[l] = at == p ? next : signal[l];
      found[l] |= static_cast<S>(at == p ? 1 : 0);
    } else {
      signal[l] = combined<false>(signal[l], at == p ? value : acc_t<T>(0), false);
    }
    found[l] |= static_cast<S>(chosen[l] == p ? 2 : 0);
  }
}

// V input positions side by side: neighbouring channels, or positions of a row one pooling stride apart,
// which then belong to neighbouring windows. CHECK: lane l looks at window ow + l of a row, which may not
// exist. UNIT: windows.lane is 1.
template <int V, bool CHECK, bool UNIT, class T, class S>
CONVVIZ_HD void unpool(const UnpoolArgs<T, S>& args, const Cover& h, const Cover& w,
                       const StridedWindows<T, S>& windows, bool packed, T (&result)[V]) {
  using A = acc_t<T>;
  constexpr S nowhere = std::numeric_limits<S>::min();  // the switch of a window without a position
  A signal[V];
  S found[V];  // bit 1: a window that was alive points here; bit 0, for `overwrite`: any window does
  CONVVIZ_LANES
  for (int l = 0; l < V; ++l) {
    signal[l] = A(0);
    found[l] = 0;
  }
  for (int64_t oh = h.first; oh <= h.last; ++oh) {
    const int64_t kh = tap_on(args.h, h, oh);
    if (kh < 0) continue;
    for (int64_t ow = w.first; ow <= w.last; ++ow) {
      const int64_t kw = tap_on(args.w, w, ow);
      if (kw < 0) continue;
      const S p = static_cast<S>(kh * args.w.kernel + kw);
      const T* from = windows.grad_at(oh, ow);
      const S* pointers = windows.switch_at(oh, ow);
      T values[V];
      S chosen[V];
      if (CHECK) {
        const int low = static_cast<int>(max_of<int64_t>(0, -ow));
        const int high = static_cast<int>(min_of<int64_t>(V, args.w.out - ow));
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) chosen[l] = (l >= low) & (l < high) ? pointers[l] : nowhere;
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) {
          values[l] = (l >= low) & (l < high) ? from[UNIT ? l : l * windows.lane] : static_cast<T>(A(0));
        }
      } else {
        if (packed) {
          load_pack(pointers, chosen);
        } else {
          CONVVIZ_LANES
          for (int l = 0; l < V; ++l) chosen[l] = pointers[l];
        }
        if (UNIT && packed) {
          load_pack(from, values);
        } else {
          CONVVIZ_LANES
          for (int l = 0; l < V; ++l) values[l] = from[UNIT ? l : l * windows.lane];
        }
      }
      if (args.overwrite) {
        add_lanes<true>(p, chosen, values, signal, found);
      } else {
        add_lanes<false>(p, chosen, values, signal, found);
      }
    }
  }
  CONVVIZ_LANES
  for (int l = 0; l < V; ++l) result[l] = static_cast<T>(args.rule.apply(found[l] & 2, signal[l]));
}

// What both layouts need besides the arguments.
template <class T, class S>
struct UnpoolGeometry {
  UnpoolArgs<T, S> args;
  Divider stride_h, stride_w, height, width, channels;
  int64_t back_h, back_w;

  UnpoolGeometry() = default;
  explicit UnpoolGeometry(const UnpoolArgs<T, S>& a)
      : args(a),
        stride_h(a.h.stride),
        stride_w(a.w.stride),
        height(a.h.in),
        width(a.w.in),
        channels(a.channels),
        back_h(windows_back(a.h)),
        back_w(windows_back(a.w)) {}

  CONVVIZ_HD Cover rows(int64_t h) const { return cover_of(args.h, stride_h, back_h, h); }
  CONVVIZ_HD Cover columns(int64_t w) const { return cover_of(args.w, stride_w, back_w, w); }
  CONVVIZ_HD int64_t switch_image(int64_t n) const {
    return args.switch_batch.divisor == args.batch ? n : args.switch_batch.split(n);
  }
  // The windows of plane n * channels + c of a contiguous map.
  CONVVIZ_HD StridedWindows<T, S> plane(int64_t n) const {
    const int64_t c = channels.split(n), switch_plane = switch_image(n) * args.channels + c;
    return {args.grad + n * args.n_stride + c * args.c_stride,
            args.switches + switch_plane * args.h.out * args.w.out,
            args.h_stride,
            args.w_stride,
            args.w_stride,
            args.w.out,
            1};
  }
};

// V channels of one position. For the GPU: item i is a position's channels V*j ... V*j + V - 1, channels
// fastest.
template <class T, class S, int V, bool UNIT>
struct UnpoolChannelsLast {
  UnpoolGeometry<T, S> geometry;
  Divider groups;  // channels / V, which leaves no remainder
  bool packed;

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t n = i;
    const int64_t c = groups.split(n) * V, w = geometry.width.split(n), h = geometry.height.split(n);
    T result[V];
    channels(n, geometry.rows(h), geometry.columns(w), c, result);
    if (packed) {
      store_pack(geometry.args.out + i * V, result);
    } else {
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) geometry.args.out[i * V + l] = result[l];
    }
  }

  template <int LANES>
  CONVVIZ_HD void channels(int64_t n, const Cover& h, const Cover& w, int64_t c, T (&result)[LANES]) const {
    const UnpoolArgs<T, S>& args = geometry.args;
    const int64_t column = args.channels, row = args.w.out * column;
    const StridedWindows<T, S> windows{args.grad + n * args.n_stride + c * args.c_stride,
                                       args.switches + geometry.switch_image(n) * args.h.out * row + c,
                                       args.h_stride,
                                       args.w_stride,
                                       args.c_stride,
                                       row,
                                       column};
    unpool<LANES, false, UNIT>(args, h, w, windows, packed, result);
  }
};

// V * STEP neighbours in a row of a contiguous map, STEP being the pooling's stride: item i is the i-th such
// group, rows first. STEP 0 serves all other strides one position at a time.
template <class T, class S, int V, int STEP>
struct UnpoolContiguous {
  static constexpr int kPhases = STEP == 0 ? 1 : STEP;
  static constexpr int kWidth = V * kPhases;
  UnpoolGeometry<T, S> geometry;
  Divider groups;  // of a row, the last one may be short
  bool packed;     // all rows of the result may be written in packs of kWidth

  CONVVIZ_HD void operator()(int64_t i) const {
    const UnpoolArgs<T, S>& args = geometry.args;
    int64_t plane = i;
    const int64_t first = groups.split(plane) * kWidth, row = geometry.height.split(plane);
    const Cover h = geometry.rows(row);
    const StridedWindows<T, S> windows = geometry.plane(plane);
    T line[kWidth];
    CONVVIZ_LANES
    for (int phase = 0; phase < kPhases; ++phase) {
      T result[V];
      if (STEP == 0) {
        unpool<V, false, false>(args, h, geometry.columns(first), windows, false, result);
      } else {
        // The first lane's windows without regard to the edges: the other lanes' are next to them.
        Cover w;
        w.offset = first + phase + args.w.padding;
        w.last = geometry.stride_w.quotient(w.offset);
        w.first = w.last - geometry.back_w + 1;
        unpool<V, true, false>(args, h, w, windows, false, result);
      }
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) line[l * kPhases + phase] = result[l];
    }
    T* out = args.out + (plane * args.h.in + row) * args.w.in + first;
    if (packed) {
      store_pack(out, line);
    } else {
      CONVVIZ_LANES
      for (int l = 0; l < kWidth; ++l) {
        if (first + l < args.w.in) out[l] = line[l];
      }
    }
  }
};

// Rows of the result, begin <= row < end: n * height + h, or (n * channels + c) * height + h.
template <class T, class S>
void unpool_channels_last_cpu(const UnpoolArgs<T, S>& args, int64_t begin, int64_t end);
template <class T, class S>
void unpool_contiguous_cpu(const UnpoolArgs<T, S>& args, int64_t begin, int64_t end);

// Enqueue on the CUDA stream and return CUDA's error code.
template <class T, class S>
int unpool_channels_last_cuda(const UnpoolArgs<T, S>& args, void* stream);
template <class T, class S>
int unpool_contiguous_cuda(const UnpoolArgs<T, S>& args, void* stream);

}  // namespace convviz
