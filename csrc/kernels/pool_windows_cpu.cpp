#include "kernels/isa.h"
#include "kernels/pool_windows.h"

namespace convviz {

namespace {

// Where a window's taps are, found once for all channels: the patch's in front, the base's behind.
template <class T>
struct TapList {
  static constexpr int64_t kMost = 64;
  const T* taps[kMost];
  int patch = 0;
  int64_t base = kMost;
};

template <class T, bool AVERAGE>
struct ChannelsLastLoop {
  PoolWindowsArgs<T> args;
  Divider height;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    constexpr int V = kCpuLanes<T>;
    for (int64_t r = begin; r < end; ++r) {
      int64_t n = r;
      const int64_t y = height.split(n), image = args.from.tables.image(n);
      const AxisEntry rows = args.from.row(n), cols = args.from.col(n);
      const Taps h = taps_of(args.h, rows.origin + y);
      T* out = args.out.data + n * args.out.n + y * args.out.h;
      for (int64_t x = 0; x < args.w.out; ++x, out += args.out.w) {
        const Taps w = taps_of(args.w, cols.origin + x);
        int64_t c = 0;
        if (args.h.kernel * args.w.kernel <= TapList<T>::kMost) {
          TapList<T> list;
          for_each_tap(args, n, image, rows, cols, h, w, [&](const T* tap, bool in_patch) {
            if (in_patch) {
              list.taps[list.patch++] = tap;
            } else {
              list.taps[--list.base] = tap;
            }
          });
          const acc_t<T> divisor = AVERAGE ? divisor_of(args, h, w) : acc_t<T>(1);
          for (; c + V <= args.channels; c += V) channels(list, divisor, c, out + c);
        }
        for (; c < args.channels; c += V) {
          const int count = static_cast<int>(min_of<int64_t>(V, args.channels - c));
          pool_window<T, V, AVERAGE, false>(args, n, image, rows, cols, h, w, c, count, out + c);
        }
      }
    }
  }

  CONVVIZ_HD void channels(const TapList<T>& list, acc_t<T> divisor, int64_t c, T* out) const {
    constexpr int V = kCpuLanes<T>;
    Pooled<T, V, AVERAGE> pooled;
    T values[V];
    acc_t<T> numbers[V];
    for (int i = 0; i < list.patch; ++i) {
      load_pack(list.taps[i] + c, values);
      if (AVERAGE) {
        args.activation.template lanes<V, true>(values, c, V, numbers);
      } else {
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) numbers[l] = to_acc(values[l]);
      }
      pooled.take(numbers);
    }
    // A finite bias and bounds do not change which element is the largest: once for all taps will do.
    if (!AVERAGE && list.patch > 0) args.activation.template apply<V, true>(c, V, pooled.total);
    for (int64_t i = TapList<T>::kMost; i-- > list.base;) {
      load_pack(list.taps[i] + c, values);
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) numbers[l] = to_acc(values[l]);
      pooled.take(numbers);
    }
    T result[V];
    pooled.finish(divisor, result);
    store_pack(out, result);
  }
};

template <class T, bool AVERAGE>
struct PlanesLoop {
  PoolWindowsArgs<T> args;
  Divider channels;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      int64_t n = i;
      const int64_t c = channels.split(n), image = args.from.tables.image(n);
      const AxisEntry rows = args.from.row(n), cols = args.from.col(n);
      T* plane = args.out.data + n * args.out.n + c * args.out.c;
      for (int64_t y = 0; y < args.h.out; ++y) {
        const Taps h = taps_of(args.h, rows.origin + y);
        T* out = plane + y * args.out.h;
        for (int64_t x = 0; x < args.w.out; ++x, out += args.out.w) {
          const Taps w = taps_of(args.w, cols.origin + x);
          pool_window<T, 1, AVERAGE, false>(args, n, image, rows, cols, h, w, c, 1, out);
        }
      }
    }
  }
};

// float64 is for checks, and single elements make no vectors: they are not worth three compilations.
template <class T, bool AVERAGE>
void channels_last(const PoolWindowsArgs<T>& args, int64_t begin, int64_t end) {
  const ChannelsLastLoop<T, AVERAGE> loop{args, Divider(args.h.out)};
  if constexpr (sizeof(T) == sizeof(double)) {
    loop(begin, end);
  } else {
    run_widest(loop, begin, end);
  }
}

template <class T, bool AVERAGE>
void planes(const PoolWindowsArgs<T>& args, int64_t begin, int64_t end) {
  PlanesLoop<T, AVERAGE>{args, Divider(args.channels)}(begin, end);
}

}  // namespace

template <class T>
void pool_windows_channels_last_cpu(const PoolWindowsArgs<T>& args, bool average, int64_t begin,
                                    int64_t end) {
  return average ? channels_last<T, true>(args, begin, end) : channels_last<T, false>(args, begin, end);
}

template <class T>
void pool_windows_planes_cpu(const PoolWindowsArgs<T>& args, bool average, int64_t begin, int64_t end) {
  return average ? planes<T, true>(args, begin, end) : planes<T, false>(args, begin, end);
}

#define CONVVIZ_INSTANTIATE(T)                                                                        \
  template void pool_windows_channels_last_cpu<T>(const PoolWindowsArgs<T>&, bool, int64_t, int64_t); \
  template void pool_windows_planes_cpu<T>(const PoolWindowsArgs<T>&, bool, int64_t, int64_t);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
