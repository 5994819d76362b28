#include <limits>
#include <vector>

#include "kernels/isa.h"
#include "kernels/switch_unpool.h"

namespace convviz {

namespace {

// float64 is for checks, and windows of more than 127 positions are rare: they are not worth three
// compilations each.
template <class T, class S, class Loop>
void run(const Loop& loop, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(double) || sizeof(S) != 1) {
    loop(begin, end);
  } else {
    run_widest(loop, begin, end);
  }
}

// As many lanes as the vectors that GCC chooses have switches: it takes the same width for all types of a
// loop.
constexpr int kLanes = 32;

template <class T, class S, bool UNIT>
struct ChannelsLastLoop {
  UnpoolChannelsLast<T, S, 1, UNIT> item;

  template <int V>
  CONVVIZ_HD void channels(int64_t n, const Cover& h, const Cover& w, int64_t& c, T* out) const {
    for (; c + V <= item.geometry.args.channels; c += V) {
      T result[V];
      item.channels(n, h, w, c, result);
      store_pack(out + c, result);
    }
  }

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const UnpoolArgs<T, S>& args = item.geometry.args;
    for (int64_t r = begin; r < end; ++r) {
      int64_t n = r;
      const Cover h = item.geometry.rows(item.geometry.height.split(n));
      T* out = args.out + r * args.w.in * args.channels;
      for (int64_t x = 0; x < args.w.in; ++x, out += args.channels) {
        const Cover w = item.geometry.columns(x);
        int64_t c = 0;
        channels<kLanes>(n, h, w, c, out);
        channels<kLanes / 2>(n, h, w, c, out);
        channels<1>(n, h, w, c, out);
      }
    }
  }
};

// A band of rows of a contiguous map, small enough for the cache. Here the windows are walked, not the
// positions: a window's switch says where its gradient goes, and vectors have little to work on in rows that
// are short and strided. The band belongs to one thread, takes the windows in the same order as a position on
// the GPU does, and is written once.
template <class T, class S>
struct Band {
  using A = acc_t<T>;
  using I = lane_index_t<T>;
  static constexpr int64_t kPositions = 4096;  // of a band; and of a window whose taps are tabled
  const UnpoolGeometry<T, S>& geometry;
  int64_t rows;                              // at most
  std::vector<A> signal;                     // all 0 between two bands
  std::vector<I> found;                      // likewise; bit 1: a window that was alive, bit 0: any window
  int64_t taps, last_down, last_right;       // of a window; from its tap 0 to its last
  std::vector<int64_t> down, right, offset;  // from tap 0 to each, of a window that is not too large
  Divider kernel_width;

  explicit Band(const UnpoolGeometry<T, S>& g)
      : geometry(g),
        rows(max_of<int64_t>(1, kPositions / g.args.w.in)),
        signal(rows * g.args.w.in, A(0)),
        found(rows * g.args.w.in, 0),
        taps(g.args.h.kernel * g.args.w.kernel),
        last_down((g.args.h.kernel - 1) * g.args.h.dilation),
        last_right((g.args.w.kernel - 1) * g.args.w.dilation),
        kernel_width(g.args.w.kernel) {
    if (taps > kPositions) return;
    for (int64_t kh = 0; kh < g.args.h.kernel; ++kh) {
      for (int64_t kw = 0; kw < g.args.w.kernel; ++kw) {
        down.push_back(kh * g.args.h.dilation);
        right.push_back(kw * g.args.w.dilation);
        offset.push_back(down.back() * g.args.w.in + right.back());
      }
    }
  }

  int64_t down_to(int64_t tap) const {
    return down.empty() ? kernel_width.quotient(tap) * geometry.args.h.dilation : down[tap];
  }
  int64_t right_to(int64_t tap) const {
    if (!right.empty()) return right[tap];
    return (tap - kernel_width.quotient(tap) * geometry.args.w.kernel) * geometry.args.w.dilation;
  }

  // Rows first ... last - 1.
  template <bool OVERWRITE>
  void collect(const StridedWindows<T, S>& windows, int64_t first, int64_t last) {
    const UnpoolArgs<T, S>& args = geometry.args;
    const int64_t height = last - first, width = args.w.in;
    const Cover above = geometry.rows(first), below = geometry.rows(last - 1);
    // Copies, as the compiler must take what is written below for the members themselves.
    const int64_t* const table = offset.empty() ? nullptr : offset.data();
    const I count = static_cast<I>(taps);
    const int64_t reach = last_right;
    A* const sums = signal.data();
    I* const marks = found.data();
    for (int64_t oh = above.first; oh <= below.last; ++oh) {
      const T* grad = windows.grad_at(oh, 0);
      const S* switches = windows.switch_at(oh, 0);
      const int64_t top = oh * args.h.stride - args.h.padding - first;
      const bool inside = top >= 0 && top + last_down < height;
      for (int64_t ow = 0; ow < args.w.out; ++ow) {
        const I s = switches[ow], p = s < 0 ? ~s : s;
        if (p >= count) continue;
        const int64_t left = ow * args.w.stride - args.w.padding;
        if (!inside || left < 0 || left + reach >= width) {
          const int64_t h = top + down_to(p), w = left + right_to(p);
          if (h < 0 || h >= height || w < 0 || w >= width) continue;
        }
        const int64_t tap = table != nullptr ? table[p] : down_to(p) * width + right_to(p);
        const int64_t at = top * width + left + tap;
        sums[at] = combined<OVERWRITE>(sums[at], to_acc(grad[ow * windows.column]), marks[at] == 0);
        marks[at] |= s < 0 ? 1 : 3;
      }
    }
  }
};

// Applies the rule to a band and clears it.
template <class T, class S>
struct WriteBand {
  Rule<acc_t<T>> rule;
  acc_t<T>* signal;
  lane_index_t<T>* found;
  T* out;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = static_cast<T>(rule.apply(static_cast<int>(found[i] & 2), signal[i]));
      signal[i] = acc_t<T>(0);
      found[i] = 0;
    }
  }
};

}  // namespace

template <class T, class S>
void unpool_channels_last_cpu(const UnpoolArgs<T, S>& args, int64_t begin, int64_t end) {
  const UnpoolGeometry<T, S> geometry(args);
  if (args.c_stride == 1) {
    run<T, S>(ChannelsLastLoop<T, S, true>{{geometry, Divider(1), true}}, begin, end);
  } else {
    run<T, S>(ChannelsLastLoop<T, S, false>{{geometry, Divider(1), true}}, begin, end);
  }
}

template <class T, class S>
void unpool_contiguous_cpu(const UnpoolArgs<T, S>& args, int64_t begin, int64_t end) {
  const UnpoolGeometry<T, S> geometry(args);
  Band<T, S> band(geometry);
  for (int64_t r = begin; r < end;) {
    int64_t plane = r;
    const int64_t first = geometry.height.split(plane);
    const int64_t last = min_of(min_of(args.h.in, first + band.rows), first + end - r);
    const StridedWindows<T, S> windows = geometry.plane(plane);
    if (args.overwrite) {
      band.template collect<true>(windows, first, last);
    } else {
      band.template collect<false>(windows, first, last);
    }
    const WriteBand<T, S> write{args.rule, band.signal.data(), band.found.data(), args.out + r * args.w.in};
    run<T, S>(write, 0, (last - first) * args.w.in);
    r += last - first;
  }
}

#define CONVVIZ_INSTANTIATE(T, S)                                                          \
  template void unpool_channels_last_cpu<T, S>(const UnpoolArgs<T, S>&, int64_t, int64_t); \
  template void unpool_contiguous_cpu<T, S>(const UnpoolArgs<T, S>&, int64_t, int64_t);
#define CONVVIZ_INSTANTIATE_SWITCHES(T) \
  CONVVIZ_INSTANTIATE(T, int8_t)        \
  CONVVIZ_INSTANTIATE(T, int16_t)       \
  CONVVIZ_INSTANTIATE(T, int32_t)
CONVVIZ_INSTANTIATE_SWITCHES(double)
CONVVIZ_INSTANTIATE_SWITCHES(float)
CONVVIZ_INSTANTIATE_SWITCHES(Half)
CONVVIZ_INSTANTIATE_SWITCHES(BFloat16)
#undef CONVVIZ_INSTANTIATE_SWITCHES
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
